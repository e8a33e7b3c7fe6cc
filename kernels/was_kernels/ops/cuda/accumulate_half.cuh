// Products of the listed channels with weights of 16 bits on the plain cores: groups of LANES lanes take the channels in
// turn, a lane 8 of their outputs, UNROLL channels in flight. Macros and Projection are those of gather_gemv.cu.
//
// The first round is of channels that a warp kept itself, so that it is on its way while the block makes its list.

#define GROUPS (THREADS / LANES)  // of lanes, each of which takes other channels
#define OF_WARP (32 / LANES)      // groups of a warp
#define FIRST (UNROLL * OF_WARP)  // channels that a warp takes before there is a list

struct Weights {
    uint4 of[UNROLL];
};

// A group's weights of the channels at places `first`, `first + step`, ... of a list of n.
__device__ __forceinline__ Weights read_weights(const Projection& own, int column, const u16* list, int first, int step,
                                                int n, unsigned long long policy) {
    const u16* weight = own.weight + column;
    Weights v;
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
        const int i = first + u * step;
        v.of[u] = make_uint4(0u, 0u, 0u, 0u);
        if (i < n) v.of[u] = stream(weight + list[i] * own.stride, policy);
    }
    return v;
}

__device__ __forceinline__ void add_products(float (*total)[PER_LANE], const Weights& v, float (*values)[ROWS],
                                             int first, int step, int n) {
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
        const int i = first + u * step;
        const u32 word[4] = {v.of[u].x, v.of[u].y, v.of[u].z, v.of[u].w};
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

__device__ __forceinline__ void accumulate(float (*total)[PER_LANE], const u16* list, float (*values)[ROWS], int n,
                                           const Projection& own, int column, unsigned long long policy) {
    for (int first = threadIdx.x / LANES; first < n; first += GROUPS * UNROLL) {
        const Weights v = read_weights(own, column, list, first, GROUPS, n, policy);
        add_products(total, v, values, first, GROUPS, n);
    }
}
