// Attention of one decoding step: rotate q and k, append k and v to a static cache, attend to all positions so far.
//
// A stream of HEAD / 8 threads walks every so-many-th position with its own running softmax; streams are merged in
// shared memory, blocks of one head by the block that arrives last, in a fixed order. When IN_PARTS they are not:
// the launch that reads the result merges them (`merged_attention` in parts.cuh), and makes the sequence one longer.
// Positions past the end of the sequence are never read, so the cache's length costs nothing.
//
// Compiled by NVRTC with these macros: BF16, HEAD (32, 64, 128 or 256), QUERIES (query heads of a key head), WARPS,
// UNROLL (positions of a stream in flight), NORMED (RMSNorm of each head of q and k first), IN_PARTS, PDL.

#include "common.cuh"
#include "parts.cuh"

#define THREADS (WARPS * 32)
#define LANES (HEAD / 8)
#define STREAMS (THREADS / LANES)

struct Strides {
    long long batch, head, position;  // elements
};

struct Running {
    float peak, mass, sum[8];
};

__device__ __forceinline__ void widen_all(const uint4& from, float* into) {
    const u32 word[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int w = 0; w < 4; w++) {
        into[2 * w] = low(word[w]);
        into[2 * w + 1] = high(word[w]);
    }
}

__device__ __forceinline__ void unpack(const u16* from, float* into) {
    widen_all(*reinterpret_cast<const uint4*>(from), into);
}

__device__ __forceinline__ uint4 pack(const float* from) {
    u32 word[4];
#pragma unroll
    for (int w = 0; w < 4; w++) word[w] = (u32)narrow(from[2 * w]) | ((u32)narrow(from[2 * w + 1]) << 16);
    return make_uint4(word[0], word[1], word[2], word[3]);
}

__device__ __forceinline__ float over_stream(float v) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
    return v;
}

// RMSNorm over the head if there is one, then the rotation of halves; all lanes of a warp take part.
__device__ __forceinline__ void prepare(float* x, const u16* norm_weight, float epsilon, const float* cos,
                                        const float* sin, int lane) {
#if NORMED
    float squares = 0.0f, weight[8];
#pragma unroll
    for (int c = 0; c < 8; c++) squares += x[c] * x[c];
    const float scale = rsqrtf(over_stream(squares) / HEAD + epsilon);
    unpack(norm_weight + lane * 8, weight);
#pragma unroll
    for (int c = 0; c < 8; c++) x[c] = rounded(weight[c] * rounded(x[c] * scale));
#endif
#pragma unroll
    for (int c = 0; c < 8; c++) {
        const float other = __shfl_xor_sync(~0u, x[c], LANES / 2);
        x[c] = rounded(x[c] * cos[c] + (lane < LANES / 2 ? -other : other) * sin[c]);
    }
}

__device__ __forceinline__ void merge(Running& into, float peak, float mass, const float* sum) {
    const float top = fmaxf(into.peak, peak);
    const float keep = top == NOTHING ? 0.0f : exp2f(into.peak - top);
    const float take = top == NOTHING ? 0.0f : exp2f(peak - top);
    into.peak = top;
    into.mass = into.mass * keep + mass * take;
#pragma unroll
    for (int c = 0; c < 8; c++) into.sum[c] = into.sum[c] * keep + sum[c] * take;
}

extern "C" __global__ void __launch_bounds__(THREADS)
attend(const u16* __restrict__ q,       // [rows, key heads * QUERIES * HEAD], rows `input_stride` apart
       const u16* __restrict__ k,       // [rows, key heads * HEAD], likewise
       const u16* __restrict__ v,       // like k
       const u16* __restrict__ cosines, // [rows or 1, HEAD]
       const u16* __restrict__ sines,   // like cosines
       const u16* __restrict__ q_norm,  // [HEAD], NORMED only
       const u16* __restrict__ k_norm,  // [HEAD], NORMED only
       u16* keys, u16* values,          // [rows, key heads, longest, HEAD], last stride 1
       const u8* __restrict__ mask,     // [rows or 1, longest] or null: positions that may be seen
       long long* length,               // positions in the cache; one more at the end if `advance`
       u16* __restrict__ out,           // [rows, key heads * QUERIES * HEAD]
       float* __restrict__ parts,       // [rows * key heads, splits, QUERIES, PART]
       int* __restrict__ arrived,       // [rows * key heads + 1], zero before and after
       Strides key_strides, Strides value_strides, long long angle_stride, long long mask_stride, long long input_stride,
       float scaling, float epsilon, int key_heads, int longest, int advance) {
    __shared__ float merged[WARPS][QUERIES][PART];
#if !IN_PARTS
    __shared__ int is_last;
#endif
    const int thread = threadIdx.x, lane = thread % LANES, stream = blockIdx.y * STREAMS + thread / LANES;
    const int streams = gridDim.y * STREAMS;
    const int row = blockIdx.x / key_heads, head = blockIdx.x % key_heads;
    const long long wide = (long long)row * key_heads + head;
    u16* own_keys = keys + row * key_strides.batch + head * key_strides.head + lane * 8;
    u16* own_values = values + row * value_strides.batch + head * value_strides.head + lane * 8;
    const u8* seen = mask == nullptr ? nullptr : mask + row * mask_stride;

    // All but q, k and v of the new token were made before the kernel before this one: they are read while it ends.
    // The first round is read before it is known how long the sequence is: the cache is that long in any case.
    uint4 key_words[UNROLL], value_words[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
        const int p = stream + u * streams;
        key_words[u] = value_words[u] = make_uint4(0u, 0u, 0u, 0u);
        if (p < longest) {
            key_words[u] = *reinterpret_cast<const uint4*>(own_keys + p * key_strides.position);
            value_words[u] = *reinterpret_cast<const uint4*>(own_values + p * value_strides.position);
        }
    }
    const int last = (int)*length;
    if (last < 0 || last >= longest) asm volatile("trap;");  // the cache is full: the next position is another head's
    float cos[8], sin[8], query[QUERIES][8], key[8], value[8];
    unpack(cosines + row * angle_stride + lane * 8, cos);
    unpack(sines + row * angle_stride + lane * 8, sin);
    wait_for_input();
    let_next_start();
    const long long of_row = row * input_stride;
#pragma unroll
    for (int h = 0; h < QUERIES; h++) unpack(q + of_row + (head * QUERIES + h) * HEAD + lane * 8, query[h]);
    unpack(k + of_row + head * HEAD + lane * 8, key);
    unpack(v + of_row + head * HEAD + lane * 8, value);
#pragma unroll
    for (int h = 0; h < QUERIES; h++) prepare(query[h], q_norm, epsilon, cos, sin, lane);
    prepare(key, k_norm, epsilon, cos, sin, lane);
    if (last % streams == stream) {
        *reinterpret_cast<uint4*>(own_keys + last * key_strides.position) = pack(key);
        *reinterpret_cast<uint4*>(own_values + last * value_strides.position) = pack(value);
    }

    Running running[QUERIES];
#pragma unroll
    for (int h = 0; h < QUERIES; h++) {
        running[h].peak = NOTHING;
        running[h].mass = 0.0f;
#pragma unroll
        for (int c = 0; c < 8; c++) running[h].sum[c] = 0.0f;
    }
    const float to_log2 = scaling * 1.4426950408889634f;
    // All lanes of a warp walk the same number of rounds: shuffles need them.
    for (int first = 0; first <= last; first += streams * UNROLL) {
        if (first > 0) {
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                const int p = first + stream + u * streams;
                if (p < last) {
                    key_words[u] = *reinterpret_cast<const uint4*>(own_keys + p * key_strides.position);
                    value_words[u] = *reinterpret_cast<const uint4*>(own_values + p * value_strides.position);
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
            const bool there = p <= last && (seen == nullptr || seen[p]);
            float key_values[8];
            widen_all(key_words[u], key_values);
#pragma unroll
            for (int h = 0; h < QUERIES; h++) {
                float dot = 0.0f;
#pragma unroll
                for (int c = 0; c < 8; c++) dot += query[h][c] * key_values[c];
                dot = over_stream(dot) * to_log2;
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
    __syncthreads();
    const int splits = gridDim.y;
    float* place = parts + (long long)blockIdx.x * splits * QUERIES * PART;
    for (int i = thread; i < QUERIES * HEAD; i += THREADS) {
        const int h = i / HEAD, c = i % HEAD;
        float peak = NOTHING, mass = 0.0f, sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) peak = fmaxf(peak, merged[w][h][HEAD]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float take = peak == NOTHING ? 0.0f : exp2f(merged[w][h][HEAD] - peak);
            mass += merged[w][h][HEAD + 1] * take;
            sum += merged[w][h][c] * take;
        }
        if (splits == 1 && !IN_PARTS) {
            out[(wide * QUERIES + h) * HEAD + c] = narrow(mass == 0.0f ? 0.0f : sum / mass);
        } else {
            float* own = place + ((long long)blockIdx.y * QUERIES + h) * PART;
            __stcg(own + c, sum);
            if (c == 0) {
                __stcg(own + HEAD, peak);
                __stcg(own + HEAD + 1, mass);
            }
        }
    }
#if !IN_PARTS
    __syncthreads();
    if (thread == 0) {
        is_last = splits > 1 && arrives_last(arrived + blockIdx.x, splits);
        if (is_last) arrived[blockIdx.x] = 0;
        // Every block has read the length by the time that it gets here.
        if (advance && arrives_last(arrived + gridDim.x, gridDim.x * splits)) {
            arrived[gridDim.x] = 0;
            *length = last + 1;
        }
    }
    __syncthreads();
    if (!is_last) return;
    for (int i = thread; i < QUERIES * HEAD; i += THREADS) {
        const int h = i / HEAD, c = i % HEAD;
        float peak = NOTHING, mass = 0.0f, sum = 0.0f;
        for (int s = 0; s < splits; s++) peak = fmaxf(peak, __ldcg(place + (s * QUERIES + h) * PART + HEAD));
        for (int s = 0; s < splits; s++) {
            const float* own = place + (s * QUERIES + h) * PART;
            const float take = peak == NOTHING ? 0.0f : exp2f(__ldcg(own + HEAD) - peak);
            mass += __ldcg(own + HEAD + 1) * take;
            sum += __ldcg(own + c) * take;
        }
        out[(wide * QUERIES + h) * HEAD + c] = narrow(mass == 0.0f ? 0.0f : sum / mass);
    }
#endif
}
