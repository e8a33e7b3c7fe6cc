// A walk of tiles on tensor cores: a warp takes every so-many-th 16 positions. Scores [8 queries, 8 positions] are queries
// times keys, sums [16 channels, 8 queries] values times weights: a lane reads 16 bytes of a key or value at a time, just
// as these lie in the cache, since the order of channels in a product is free. Queries past QUERIES are zero.
// The macros of attention.cuh come from attend.cu, which includes this after mma.cuh.

#define TILE 16
#define CHUNKS (HEAD / 32)  // reads of a lane for one key: 8 channels of every 32
#define SETS (HEAD / 64)    // reads of a lane for one value: 8 channels of every 64

__device__ __forceinline__ u32 word_of(const uint4& from, int i) { return i == 0 ? from.x : i == 1 ? from.y : i == 2 ? from.z : from.w; }

// Of the tile at `base`; lane 4 g + q has keys g and g + 8, channels 8 q and on of every 32.
__device__ __forceinline__ void read_keys(uint4 (&words)[2][CHUNKS], const Attention& of, int base, int end) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int s = 0; s < 2; s++) {
        const int p = base + s * 8 + lane / 4;
        const u16* from = of.keys + p * of.key_stride + lane % 4 * 8;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            words[s][c] = make_uint4(0u, 0u, 0u, 0u);
            if (p < end) words[s][c] = *reinterpret_cast<const uint4*>(from + c * 32);
        }
    }
}

// The place in the tile of a lane's i-th position: 2 q, 2 q + 1, 2 q + 8, 2 q + 9. It weighs these, for query g.
__device__ __forceinline__ int place_of(int i) { return i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2; }

// Lane 4 g + q has its four positions, channels 8 g and on of every 64.
__device__ __forceinline__ void read_values(uint4 (&words)[4][SETS], const Attention& of, int base, int end) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int p = base + place_of(i);
        const u16* from = of.values + p * of.value_stride + lane / 4 * 8;
#pragma unroll
        for (int c = 0; c < SETS; c++) {
            words[i][c] = make_uint4(0u, 0u, 0u, 0u);
            if (p < end) words[i][c] = *reinterpret_cast<const uint4*>(from + c * 64);
        }
    }
}

// Queries, key and value of the new token, normed and rotated, [QUERIES + 2, HEAD]; one block also appends the key and
// the value to the cache.
__device__ __forceinline__ void prepare_all(u16 (*into)[HEAD], const Attention& of, int last, bool appends) {
    const int lane = threadIdx.x % LANES;
    float cos[8], sin[8];
    unpack(of.cosines + lane * 8, cos);
    unpack(of.sines + lane * 8, sin);
    wait_for_input();
    let_next_start();
#pragma unroll
    for (int first = 0; first < QUERIES + 2; first += THREADS / LANES) {
        const int r = first + threadIdx.x / LANES;
        const u16* from = r < QUERIES ? of.q + r * HEAD : r == QUERIES ? of.k : of.v;
        const uint4 given = *reinterpret_cast<const uint4*>(from + lane * 8);
        float x[8];
        widen_all(given, x);
        prepare(x, r < QUERIES ? of.q_norm : of.k_norm, of.epsilon, cos, sin, lane);
        const uint4 made = r <= QUERIES ? pack(x) : given;
        if (r < QUERIES + 2) *reinterpret_cast<uint4*>(into[r] + lane * 8) = made;
        if (appends && r == QUERIES) *reinterpret_cast<uint4*>(of.keys + last * of.key_stride + lane * 8) = made;
        if (appends && r == QUERIES + 1) *reinterpret_cast<uint4*>(of.values + last * of.value_stride + lane * 8) = made;
    }
    __syncthreads();
}

// Attends to this block's positions: sums, peak and mass of each warp and query. Returns the new token's position.
__device__ __forceinline__ int walk(const Attention& of, float (*merged)[QUERIES][PART]) {
    __shared__ __attribute__((aligned(16))) u16 prepared[QUERIES + 2][HEAD];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
    const int step = gridDim.y * WARPS * TILE;
    int base = (blockIdx.y * WARPS + warp) * TILE;

    // All but q, k and v of the new token were made before the kernel before this one: they are read while it ends.
    // The first tile is read before it is known how long the sequence is: the cache is that long in any case.
    uint4 key_words[2][CHUNKS], value_words[4][SETS], query[CHUNKS];
    read_keys(key_words, of, base, of.longest);
    read_values(value_words, of, base, of.longest);
    const int last = new_position(of);
    prepare_all(prepared, of, last, last / TILE / WARPS % gridDim.y == blockIdx.y);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        query[c] = make_uint4(0u, 0u, 0u, 0u);
        if (group < QUERIES) query[c] = *reinterpret_cast<const uint4*>(prepared[group] + c * 32 + quad * 8);
    }

    float total[SETS][4][4], peak = NOTHING, mass = 0.0f;
#pragma unroll
    for (int c = 0; c < SETS; c++)
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int r = 0; r < 4; r++) total[c][i][r] = 0.0f;
    for (; base <= last; base += step) {
        float score[2][4];
#pragma unroll
        for (int s = 0; s < 2; s++) {
            score[s][0] = score[s][1] = score[s][2] = score[s][3] = 0.0f;
            const bool is_new = base + s * 8 + group == last;
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                uint4 word = key_words[s][c];
                if (is_new) word = *reinterpret_cast<const uint4*>(prepared[QUERIES] + c * 32 + quad * 8);
                const u32 first[4] = {query[c].x, 0u, query[c].y, 0u}, second[4] = {query[c].z, 0u, query[c].w, 0u};
                multiply(score[s], first, word.x, word.y);
                multiply(score[s], second, word.z, word.w);
            }
        }
        read_keys(key_words, of, base + step, last);

        bool there[4];
        float weight[4], top = peak;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int p = base + place_of(i);
            const float dot = score[i / 2][i % 2] * of.to_log2;
            there[i] = p <= last && (of.seen == nullptr || of.seen[p]);
            // A score that is not a number must not pass for nothing: as infinity it makes its row NaN.
            weight[i] = !there[i] ? NOTHING : dot == dot ? dot : -NOTHING;
            top = fmaxf(top, weight[i]);
        }
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        const float keep = top == NOTHING ? 1.0f : exp2f(peak - top);
        peak = top;
        mass *= keep;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            weight[i] = there[i] ? rounded(exp2f(weight[i] - top)) : 0.0f;
            mass += weight[i];
        }
        // A lane scores query g and sums over queries 2 q and 2 q + 1.
        const float keeps[2] = {__shfl_sync(~0u, keep, quad * 8), __shfl_sync(~0u, keep, quad * 8 + 4)};
        const u32 low_weights = (u32)narrow(weight[0]) | ((u32)narrow(weight[1]) << 16);
        const u32 high_weights = (u32)narrow(weight[2]) | ((u32)narrow(weight[3]) << 16);
#pragma unroll
        for (int c = 0; c < SETS; c++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (!there[i]) value_words[i][c] = make_uint4(0u, 0u, 0u, 0u);  // what was read there may be anything
                if (base + place_of(i) == last && there[i])
                    value_words[i][c] = *reinterpret_cast<const uint4*>(prepared[QUERIES + 1] + c * 64 + group * 8);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const u32 w[4] = {word_of(value_words[0][c], i), word_of(value_words[1][c], i), word_of(value_words[2][c], i),
                                  word_of(value_words[3][c], i)};
                const u32 channels[4] = {low_halves(w[0], w[1]), high_halves(w[0], w[1]), low_halves(w[2], w[3]),
                                         high_halves(w[2], w[3])};
#pragma unroll
                for (int r = 0; r < 4; r++) total[c][i][r] *= keeps[r % 2];
                multiply(total[c][i], channels, low_weights, high_weights);
            }
        }
        read_values(value_words, of, base + step, last);
    }

    mass += __shfl_xor_sync(~0u, mass, 1);
    mass += __shfl_xor_sync(~0u, mass, 2);
    if (group < QUERIES && quad == 0) {
        merged[warp][group][HEAD] = peak;
        merged[warp][group][HEAD + 1] = mass;
    }
#pragma unroll
    for (int c = 0; c < SETS; c++)
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const int h = quad * 2 + r % 2;
                if (h < QUERIES) merged[warp][h][c * 64 + group * 8 + i * 2 + r / 2] = total[c][i][r];
            }
    return last;
}
