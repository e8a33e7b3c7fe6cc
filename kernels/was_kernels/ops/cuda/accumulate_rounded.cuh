// Products of the listed channels with weights of 8 or 4 bits: a lane takes PER_LANE outputs, which lie in one group.
//
// The channel's scale is multiplied into its input, and its offset into one sum for all outputs of the lane.
// Macros and Projection are those of gather_gemv.cu.

#define GROUPS (THREADS / LANES)  // of lanes, each of which takes other channels

__device__ __forceinline__ void accumulate(float (*total)[PER_LANE], const u16* list, float (*values)[ROWS], int n,
                                           const Projection& own, int column, unsigned long long policy) {
    const int thread = threadIdx.x;
    const u8* weight = own.weight + column * BITS / 8;
    const u32* scales = own.scales + column / GROUP;
    float common[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) common[r] = 0.0f;
    for (int first = thread / LANES; first < n; first += GROUPS * UNROLL) {
        Words v[UNROLL];
        u32 pair[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int i = first + u * GROUPS;
            pair[u] = 0u;
#pragma unroll
            for (int w = 0; w < WORDS; w++) v[u].word[w] = 0u;
            if (i < n) {
                v[u] = stream_words(weight + list[i] * own.stride, policy);
                pair[u] = __ldg(scales + list[i] * own.groups);
            }
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int i = first + u * GROUPS;
            // At 4 bits a code is 1 + q / 16: 16 scales of it are scale * q and 16 scales too much.
            const float scale = half_low(pair[u]) * (BITS == 4 ? 16.0f : 1.0f);
            const float offset = half_high(pair[u]) - (BITS == 4 ? scale : 0.0f);
            float scaled[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const float value = i < n ? values[i][r] : 0.0f;
                scaled[r] = value * scale;
                common[r] += value * offset;
            }
#pragma unroll
            for (int c = 0; c < PER_LANE; c++) {
                const float q = code(v[u].word[c * BITS / 32], c % (32 / BITS));
#pragma unroll
                for (int r = 0; r < ROWS; r++) total[r][c] += q * scaled[r];
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int c = 0; c < PER_LANE; c++) total[r][c] += common[r];
}
