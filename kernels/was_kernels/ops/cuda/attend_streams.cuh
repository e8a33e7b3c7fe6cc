// A walk of streams: HEAD / 8 threads take every so-many-th position, with a running softmax of each query.
// UNROLL (positions of a stream in flight) and the macros of attention.cuh come from attend.cu, which includes this.

#define STREAMS (THREADS / LANES)

struct Running {
    float peak, mass, sum[8];
};

__device__ __forceinline__ void merge(Running& into, float peak, float mass, const float* sum) {
    const float top = fmaxf(into.peak, peak);
    const float keep = top == NOTHING ? 0.0f : exp2f(into.peak - top);
    const float take = top == NOTHING ? 0.0f : exp2f(peak - top);
    into.peak = top;
    into.mass = into.mass * keep + mass * take;
#pragma unroll
    for (int c = 0; c < 8; c++) into.sum[c] = into.sum[c] * keep + sum[c] * take;
}

// Attends to this block's positions: sums, peak and mass of each warp and query. Returns the new token's position.
__device__ __forceinline__ int walk(const Attention& of, float (*merged)[QUERIES][PART]) {
    const int thread = threadIdx.x, lane = thread % LANES, stream = blockIdx.y * STREAMS + thread / LANES;
    const int streams = gridDim.y * STREAMS;
    u16 *own_keys = of.keys + lane * 8, *own_values = of.values + lane * 8;

    // All but q, k and v of the new token were made before the kernel before this one: they are read while it ends.
    // The first round is read before it is known how long the sequence is: the cache is that long in any case.
    uint4 key_words[UNROLL], value_words[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
        const int p = stream + u * streams;
        key_words[u] = value_words[u] = make_uint4(0u, 0u, 0u, 0u);
        if (p < of.longest) {
            key_words[u] = *reinterpret_cast<const uint4*>(own_keys + p * of.key_stride);
            value_words[u] = *reinterpret_cast<const uint4*>(own_values + p * of.value_stride);
        }
    }
    const int last = new_position(of);
    float cos[8], sin[8], query[QUERIES][8], key[8], value[8];
    unpack(of.cosines + lane * 8, cos);
    unpack(of.sines + lane * 8, sin);
    wait_for_input();
    let_next_start();
#pragma unroll
    for (int h = 0; h < QUERIES; h++) unpack(of.q + h * HEAD + lane * 8, query[h]);
    unpack(of.k + lane * 8, key);
    unpack(of.v + lane * 8, value);
#pragma unroll
    for (int h = 0; h < QUERIES; h++) prepare(query[h], of.q_norm, of.epsilon, cos, sin, lane);
    prepare(key, of.k_norm, of.epsilon, cos, sin, lane);
    if (last % streams == stream) {
        *reinterpret_cast<uint4*>(own_keys + last * of.key_stride) = pack(key);
        *reinterpret_cast<uint4*>(own_values + last * of.value_stride) = pack(value);
    }

    Running running[QUERIES];
#pragma unroll
    for (int h = 0; h < QUERIES; h++) {
        running[h].peak = NOTHING;
        running[h].mass = 0.0f;
#pragma unroll
        for (int c = 0; c < 8; c++) running[h].sum[c] = 0.0f;
    }
    // All lanes of a warp walk the same number of rounds: shuffles need them.
    for (int first = 0; first <= last; first += streams * UNROLL) {
        if (first > 0) {
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                const int p = first + stream + u * streams;
                if (p < last) {
                    key_words[u] = *reinterpret_cast<const uint4*>(own_keys + p * of.key_stride);
                    value_words[u] = *reinterpret_cast<const uint4*>(own_values + p * of.value_stride);
                }
            }
        }
        float score[QUERIES][UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int p = first + stream + u * streams;
            if (p == last) {
                key_words[u] = pack(key);
                value_words[u] = pack(value);
            }
            const bool there = p <= last && (of.seen == nullptr || of.seen[p]);
            float key_values[8];
            widen_all(key_words[u], key_values);
#pragma unroll
            for (int h = 0; h < QUERIES; h++) {
                float dot = 0.0f;
#pragma unroll
                for (int c = 0; c < 8; c++) dot += query[h][c] * key_values[c];
                dot = over_stream(dot) * of.to_log2;
                // A score that is not a number must not pass for nothing: as infinity it makes its row NaN.
                score[h][u] = !there ? NOTHING : dot == dot ? dot : -NOTHING;
            }
        }
#pragma unroll
        for (int h = 0; h < QUERIES; h++) {
            float top = running[h].peak;
#pragma unroll
            for (int u = 0; u < UNROLL; u++) top = fmaxf(top, score[h][u]);
            if (top == NOTHING) continue;
            const float keep = exp2f(running[h].peak - top);
            running[h].peak = top;
            running[h].mass *= keep;
#pragma unroll
            for (int c = 0; c < 8; c++) running[h].sum[c] *= keep;
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                if (score[h][u] == NOTHING) continue;  // what was read there may be anything
                const float take = exp2f(score[h][u] - top);
                float of_value[8];
                widen_all(value_words[u], of_value);
                running[h].mass += take;
#pragma unroll
                for (int c = 0; c < 8; c++) running[h].sum[c] += of_value[c] * take;
            }
        }
    }

    // Streams of a warp, then warps, then blocks.
#pragma unroll
    for (int h = 0; h < QUERIES; h++)
#pragma unroll
        for (int step = LANES; step < 32; step *= 2) {
            const float peak = __shfl_xor_sync(~0u, running[h].peak, step);
            const float mass = __shfl_xor_sync(~0u, running[h].mass, step);
            float sum[8];
#pragma unroll
            for (int c = 0; c < 8; c++) sum[c] = __shfl_xor_sync(~0u, running[h].sum[c], step);
            merge(running[h], peak, mass, sum);
        }
    if (thread % 32 < LANES) {
#pragma unroll
        for (int h = 0; h < QUERIES; h++) {
#pragma unroll
            for (int c = 0; c < 8; c++) merged[thread / 32][h][lane * 8 + c] = running[h].sum[c];
            if (lane == 0) {
                merged[thread / 32][h][HEAD] = running[h].peak;
                merged[thread / 32][h][HEAD + 1] = running[h].mass;
            }
        }
    }
    return last;
}
