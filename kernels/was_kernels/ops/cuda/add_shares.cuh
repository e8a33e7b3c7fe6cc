// How sums of lanes become one: a block adds its warps' in shared memory and leaves the sums, its share, in global
// memory; the block of the last share waits for the others' and adds them in their order, so that two runs give the same
// bits. Shares lie as [column block, gate or up, share, row, column].
//
// A sum is its own flag: memory is all zero bits before and after a launch, a sum of zero is left as minus zero, and
// whoever adds one writes the zero bits back. So it takes one trip to L2 from a share to its sum, and no counter.
//
// Blocks start in the order of their numbers, though CUDA does not promise it: when one of the last share waits, all
// others of its outputs have been started. In another order a launch that fits on the device would end as well.
//
// ROWS, COLUMNS, PER_LANE, LANES, BITS, THREADS, WARPS, SHARES, SUMS and MMA are macros of gather_gemv.cu; ACROSS, DEEP
// and TILES are those of accumulate_mma.cuh.

// What a thread asks for at once: shares one after the other cost a trip to L2 each.
#define MOST_AT_ONCE (16 / SUMS)
#define AT_ONCE (SHARES < MOST_AT_ONCE ? SHARES : MOST_AT_ONCE)  // shares of a result
#define RESULT_PASSES ((ROWS * COLUMNS + THREADS - 1) / THREADS)
#define MOST_TOGETHER (32 / (SUMS * AT_ONCE))
#define TOGETHER (RESULT_PASSES < MOST_TOGETHER ? RESULT_PASSES : MOST_TOGETHER)  // results

__device__ __forceinline__ u32 read_share(const u32* from) {
    u32 bits;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(bits) : "l"(from) : "memory");
    return bits;
}

__device__ __forceinline__ void write_share(u32* to, u32 bits) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(bits) : "memory");
}

__device__ __forceinline__ void leave_sum(u32* to, float sum) {
    const u32 bits = __float_as_uint(sum);
    write_share(to, bits == 0u ? 0x80000000u : bits);
}

#if MMA
typedef float Sums[ROWS][COLUMNS];  // of a warp along the channels

// Adds the block's warps and leaves the sums in `share`, or for itself in the first of `sums` if `share` is null. `sums`
// may lie where the inputs do.
__device__ __forceinline__ void leave_share(u32* share, Sums* sums, const float (&total)[TILES][4][4], int rows) {
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
        if (share == nullptr)
            (&sums[0][0][0])[i] = sum;
        else if (i / COLUMNS < rows)
            leave_sum(share + i, sum);
    }
}
#else
typedef float Sums[COLUMNS];  // of a warp

// Where the c-th output of lane l lies among a warp's sums; of 8 and 4 bits turned, so that lanes meet different banks.
#if BITS == 16
#define PLACE(l, c) ((l) * PER_LANE + (c))
#else
#define PLACE(l, c) ((l) * PER_LANE + ((c) + (l)) % PER_LANE)
#endif

// Adds the block's warps, row by row, and leaves the sums in `share`, or in `own` if `share` is null.
__device__ __forceinline__ void leave_share(u32* share, float* own, Sums* sums, float (&total)[ROWS][PER_LANE],
                                            int rows) {
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (r > 0) __syncthreads();
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
            if (share == nullptr)
                own[r * COLUMNS + i] = sum;
            else if (THERE(r))
                leave_sum(share + r * COLUMNS + i, sum);
        }
    }
}
#endif

// Whether share s of result i of the f-th projection is another block's: all are but the last of the last.
#define IS_OTHERS(f, s, i) ((s) < SHARES - ((f) == SUMS - 1) && (i) < rows * COLUMNS)

// Sums of TOGETHER results of this thread, the first of them in pass `first_pass`: of the block's outputs, whose last
// share is the block's own. Waits until they are there.
__device__ __forceinline__ void add_shares(float (&sum)[TOGETHER][SUMS], u32* shares, const float* own, int first_pass,
                                           int rows) {
#pragma unroll
    for (int t = 0; t < TOGETHER; t++)
#pragma unroll
        for (int f = 0; f < SUMS; f++) sum[t][f] = 0.0f;
#pragma unroll 1
    for (int first = 0; first < SHARES; first += AT_ONCE) {
        u32 v[TOGETHER][SUMS][AT_ONCE];
        bool waits = true, again = false;
        while (waits) {  // all are asked for before one is looked at
            waits = false;
#pragma unroll
            for (int t = 0; t < TOGETHER; t++)
#pragma unroll
                for (int f = 0; f < SUMS; f++)
#pragma unroll
                    for (int s = 0; s < AT_ONCE; s++) {
                        const int i = (first_pass + t) * THREADS + (int)threadIdx.x;
                        const u32* from = shares + (f * SHARES + first + s) * (ROWS * COLUMNS) + i;
                        if (!again) v[t][f][s] = 0u;
                        if (IS_OTHERS(f, first + s, i) && v[t][f][s] == 0u) v[t][f][s] = read_share(from);
                    }
#pragma unroll
            for (int t = 0; t < TOGETHER; t++)
#pragma unroll
                for (int f = 0; f < SUMS; f++)
#pragma unroll
                    for (int s = 0; s < AT_ONCE; s++) {
                        const int i = (first_pass + t) * THREADS + (int)threadIdx.x;
                        if (IS_OTHERS(f, first + s, i) && v[t][f][s] == 0u) waits = true;
                    }
            again = true;
        }
#pragma unroll
        for (int t = 0; t < TOGETHER; t++)
#pragma unroll
            for (int f = 0; f < SUMS; f++)
#pragma unroll
                for (int s = 0; s < AT_ONCE; s++) {
                    const int i = (first_pass + t) * THREADS + (int)threadIdx.x;
                    if (i >= rows * COLUMNS || first + s >= SHARES) continue;
                    if (f == SUMS - 1 && first + s == SHARES - 1) {
                        sum[t][f] += own[i];
                    } else {
                        sum[t][f] += __uint_as_float(v[t][f][s]);
                        write_share(shares + (f * SHARES + first + s) * (ROWS * COLUMNS) + i, 0u);
                    }
                }
    }
}
