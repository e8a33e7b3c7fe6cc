// Products of the listed channels on tensor cores: a warp takes 64 outputs and 16 channels at a time.
//
// Of each tile of 8 rows and pair of a lane's outputs, `total` gets output 0 in rows 2q and 2q + 1, output 1 likewise
// (q is the lane % 4). A negative `column` lies past the weight's end: nothing is read for it.
// Macros and Projection are those of gather_gemv.cu.

#define ACROSS (COLUMNS / 64)              // warps along the outputs of a block
#define DEEP (WARPS / ACROSS)              // warps along its channels
#define STEPS (UNROLL / 4)                 // of 16 channels each that a warp has in flight
#define TILES (ROWS / 8)
#define PITCH (CAPACITY + DEEP * STEPS * 16 + 8)  // of a row of inputs; lanes of a warp then meet different banks

__device__ __forceinline__ void accumulate(float (*total)[4][4], const u16* list, u16 (*values)[PITCH], int n,
                                           const Projection& own, int column, unsigned long long policy) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group_lane = lane / 4, quarter = lane % 4;
    const bool there = column >= 0;
    const u16* weight = own.weight + column;
    for (int first = warp / ACROSS * (STEPS * 16); first < n; first += DEEP * STEPS * 16) {
        uint4 v[STEPS][4];
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            const int i = first + s * 16 + quarter * 2;
            const u32 near = *reinterpret_cast<const u32*>(list + i), far = *reinterpret_cast<const u32*>(list + i + 8);
            const u32 channel[4] = {near & 0xffffu, near >> 16, far & 0xffffu, far >> 16};
#pragma unroll
            for (int k = 0; k < 4; k++) {
                v[s][k] = make_uint4(0u, 0u, 0u, 0u);
                if (there && i + (k & 1) + (k / 2) * 8 < n) v[s][k] = stream(weight + channel[k] * own.stride, policy);
            }
        }
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            const int i = first + s * 16 + quarter * 2;
            u32 input[TILES][2];
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                input[t][0] = *reinterpret_cast<const u32*>(&values[t * 8 + group_lane][i]);
                input[t][1] = *reinterpret_cast<const u32*>(&values[t * 8 + group_lane][i + 8]);
            }
            const u32 word[4][4] = {{v[s][0].x, v[s][0].y, v[s][0].z, v[s][0].w},
                                    {v[s][1].x, v[s][1].y, v[s][1].z, v[s][1].w},
                                    {v[s][2].x, v[s][2].y, v[s][2].z, v[s][2].w},
                                    {v[s][3].x, v[s][3].y, v[s][3].z, v[s][3].w}};
#pragma unroll
            for (int w = 0; w < 4; w++) {
                const u32 weights[4] = {low_halves(word[0][w], word[1][w]), high_halves(word[0][w], word[1][w]),
                                        low_halves(word[2][w], word[3][w]), high_halves(word[2][w], word[3][w])};
#pragma unroll
                for (int t = 0; t < TILES; t++) multiply(total[t][w], weights, input[t][0], input[t][1]);
            }
        }
    }
}
