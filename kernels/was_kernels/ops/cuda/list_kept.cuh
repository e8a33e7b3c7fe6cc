// The channels of a block's share that any row keeps, listed in shared memory with their inputs.
// A row keeps a channel if |input| * norm reaches the threshold, or if it keeps every channel.
// ROWS, PASSES, WARPS, MMA and THERE are macros of gather_gemv.cu; PITCH, DEEP and STEPS of accumulate_mma.cuh.

#if MMA
typedef u16 Values[PITCH];  // of a row; the list's order
#else
typedef float Values[ROWS];  // of a listed channel
#endif

// Rows that keep every channel, a bit each.
__device__ __forceinline__ u32 dense_rows(const u8* dense, int rows) {
    u32 whole = 0;
#pragma unroll
    for (int r = 0; r < ROWS; r++) whole |= (dense != nullptr && THERE(r) && dense[r] ? 1u : 0u) << r;
    return whole;
}

__device__ __forceinline__ u32 rows_that_keep(const float (&input)[ROWS][PASSES], int pass, float norm, float threshold,
                                              u32 whole, int rows) {
    u32 keep = 0;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const bool scored = fabsf(input[r][pass]) * norm >= threshold;
        if (THERE(r) && (scored || (whole >> r) & 1u || threshold <= 0.0f)) keep |= 1u << r;
    }
    return keep;
}

// Returns how many are listed. The list is in the order of the channels; a row's input of a channel that it does not
// keep is 0. Every thread of the block calls this, and may read the list when it returns.
__device__ __forceinline__ int list_kept(u16* list, Values* values, const float (&input)[ROWS][PASSES],
                                         const float (&norms)[PASSES], float threshold, u32 whole, int rows, int d_in) {
    __shared__ u8 counts[PASSES * WARPS];
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    u32 ballots[PASSES];
    u32 kept[PASSES];  // rows that keep the thread's channel
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        kept[pass] = 0;
        if (channel_of(pass, d_in).there)
            kept[pass] = rows_that_keep(input, pass, norms[pass], threshold, whole, rows);
        ballots[pass] = __ballot_sync(~0u, kept[pass] != 0);
        if (lane == 0) counts[pass * WARPS + warp] = (u8)__popc(ballots[pass]);
    }
    __syncthreads();
    int n = 0;
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        int mine = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            if (w == warp) mine = n;
            n += counts[pass * WARPS + w];
        }
        if (kept[pass]) {
            const int at = mine + __popc(ballots[pass] & ((1u << lane) - 1u));
            list[at] = (u16)channel_of(pass, d_in).number;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const float value = (kept[pass] >> r) & 1u ? input[r][pass] : 0.0f;
#if MMA
                values[r][at] = narrow(value);
#else
                values[at][r] = value;
#endif
            }
        }
    }
#if MMA
    // What the last step of a warp reads past the list's end.
    for (int i = thread; i < DEEP * STEPS * 16; i += THREADS) {
        list[n + i] = 0;
#pragma unroll
        for (int r = 0; r < ROWS; r++) values[r][n + i] = 0;
    }
#endif
    __syncthreads();
    return n;
}
