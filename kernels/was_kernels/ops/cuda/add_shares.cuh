// How sums of lanes become one: a block adds its warps' in shared memory and leaves the sums, its share, in global
// memory; the block that arrives last adds the shares in their order, so that two runs give the same bits.
// Shares lie as [column block, gate or up, share, row, column].
// ROWS, COLUMNS, PER_LANE, LANES, BITS, THREADS, WARPS, SHARES, SUMS and MMA are macros of gather_gemv.cu; ACROSS, DEEP
// and TILES are those of accumulate_mma.cuh.

// What a thread of the last block reads at once: partial sums one after the other cost a trip to L2 each.
#define MOST_AT_ONCE (16 / SUMS)
#define AT_ONCE (SHARES < MOST_AT_ONCE ? SHARES : MOST_AT_ONCE)  // partial sums of a result
#define RESULT_PASSES ((ROWS * COLUMNS + THREADS - 1) / THREADS)
#define MOST_TOGETHER (32 / (SUMS * AT_ONCE))
#define TOGETHER (RESULT_PASSES < MOST_TOGETHER ? RESULT_PASSES : MOST_TOGETHER)  // results

#if MMA
typedef float Sums[ROWS][COLUMNS];  // of a warp along the channels

// Adds the block's warps into its `share`. `sums` may lie where the inputs do.
__device__ __forceinline__ void leave_share(float* share, Sums* sums, const float (&total)[TILES][4][4], int rows) {
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, quarter = lane % 4;
    const int in_block = (warp % ACROSS) * 64 + lane / 4 * 8;
    __syncthreads();
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int w = 0; w < 4; w++)
#pragma unroll
            for (int c = 0; c < 4; c++)
                sums[warp / ACROSS][t * 8 + quarter * 2 + (c & 1)][in_block + w * 2 + c / 2] = total[t][w][c];
    __syncthreads();
    for (int i = thread; i < ROWS * COLUMNS; i += THREADS) {
        float sum = 0.0f;
#pragma unroll
        for (int d = 0; d < DEEP; d++) sum += (&sums[d][0][0])[i];
        if (i / COLUMNS < rows) __stcg(share + i, sum);
    }
    __syncthreads();
}
#else
typedef float Sums[COLUMNS];  // of a warp

// Where the c-th output of lane l lies among a warp's sums; of 8 and 4 bits turned, so that lanes meet different banks.
#if BITS == 16
#define PLACE(l, c) ((l) * PER_LANE + (c))
#else
#define PLACE(l, c) ((l) * PER_LANE + ((c) + (l)) % PER_LANE)
#endif

// Adds the block's warps, row by row, into its `share`.
__device__ __forceinline__ void leave_share(float* share, Sums* sums, float (&total)[ROWS][PER_LANE]) {
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int c = 0; c < PER_LANE; c++) {
#pragma unroll
            for (int step = 16; step >= LANES; step /= 2) total[r][c] += __shfl_xor_sync(~0u, total[r][c], step);
            if (lane < LANES) sums[warp][PLACE(lane, c)] = total[r][c];
        }
        __syncthreads();
        for (int i = thread; i < COLUMNS; i += THREADS) {
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += sums[w][PLACE(i / PER_LANE, i % PER_LANE)];
            __stcg(share + r * COLUMNS + i, sum);
        }
        __syncthreads();
    }
}
#endif

// Whether this block is the last of those that add to its outputs, which then sees all their shares.
__device__ __forceinline__ bool is_last(int* arrived) {
    __shared__ int last;
    if (threadIdx.x == 0) {
        last = arrives_last(arrived, SUMS * SHARES);
        if (last) *arrived = 0;
    }
    __syncthreads();
    return last;
}

// Sums of TOGETHER results of this thread, the first of them in pass `first_pass`.
__device__ __forceinline__ void add_shares(float (&sum)[TOGETHER][SUMS], const float* shares, int first_pass) {
#pragma unroll
    for (int t = 0; t < TOGETHER; t++)
#pragma unroll
        for (int f = 0; f < SUMS; f++) sum[t][f] = 0.0f;
#pragma unroll 1
    for (int first = 0; first < SHARES; first += AT_ONCE) {
        float v[TOGETHER][SUMS][AT_ONCE];
#pragma unroll
        for (int t = 0; t < TOGETHER; t++)
#pragma unroll
            for (int f = 0; f < SUMS; f++)
#pragma unroll
                for (int s = 0; s < AT_ONCE; s++) {
                    const int i = (first_pass + t) * THREADS + (int)threadIdx.x;
                    const float* from = shares + f * SHARES * (ROWS * COLUMNS) + i;
                    const bool there = i < ROWS * COLUMNS && (SHARES % AT_ONCE == 0 || first + s < SHARES);
                    v[t][f][s] = there ? __ldcg(from + (first + s) * (ROWS * COLUMNS)) : 0.0f;
                }
#pragma unroll
        for (int t = 0; t < TOGETHER; t++)
#pragma unroll
            for (int f = 0; f < SUMS; f++)
#pragma unroll
                for (int s = 0; s < AT_ONCE; s++) sum[t][f] += v[t][f][s];
    }
}
