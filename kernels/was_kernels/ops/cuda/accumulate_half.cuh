// Products of the listed channels with weights of 16 bits on the plain cores: a lane takes 8 outputs of every
// GROUPS-th channel, UNROLL of them in flight. Macros and Projection are those of gather_gemv.cu.

#define GROUPS (THREADS / LANES)  // of lanes, each of which takes other channels

__device__ __forceinline__ void accumulate(float (*total)[PER_LANE], const u16* list, float (*values)[ROWS], int n,
                                           const Projection& own, int column, unsigned long long policy) {
    const int thread = threadIdx.x;
    const u16* weight = own.weight + column;
    for (int first = thread / LANES; first < n; first += GROUPS * UNROLL) {
        uint4 v[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int i = first + u * GROUPS;
            v[u] = make_uint4(0u, 0u, 0u, 0u);
            if (i < n) v[u] = stream(weight + list[i] * own.stride, policy);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int i = first + u * GROUPS;
            const u32 word[4] = {v[u].x, v[u].y, v[u].z, v[u].w};
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const float value = i < n ? values[i][r] : 0.0f;
#pragma unroll
                for (int w = 0; w < 4; w++) {
                    total[r][2 * w] += low(word[w]) * value;
                    total[r][2 * w + 1] += high(word[w]) * value;
                }
            }
        }
    }
}
