// The channels of a block's share that any row keeps, listed in shared memory with their inputs.
// A row keeps a channel if |input| * norm reaches the threshold, or if it keeps every channel.
// ROWS, PASSES, WARPS, MMA and THERE are macros of gather_gemv.cu; PITCH, DEEP and STEPS of accumulate_mma.cuh, FIRST of
// accumulate_half.cuh (undefined: warps have no lists of their own).

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

// What is kept of the channels of a warp's threads.
struct Kept {
    u32 rows[PASSES];     // that keep the thread's channel, a bit each
    u32 ballots[PASSES];  // lanes whose channel any row keeps
};

__device__ __forceinline__ Kept kept_channels(const float (&input)[ROWS][PASSES], const float (&norms)[PASSES],
                                              float threshold, u32 whole, int rows, int d_in) {
    Kept kept;
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        kept.rows[pass] = 0;
        if (channel_of(pass, d_in).there)
            kept.rows[pass] = rows_that_keep(input, pass, norms[pass], threshold, whole, rows);
        kept.ballots[pass] = __ballot_sync(~0u, kept.rows[pass] != 0);
    }
    return kept;
}

// Writes a channel, which the rows of the bits `keep` keep, into a list at place `at`; a row's input that it does not keep is 0.
__device__ __forceinline__ void list_channel(u16* list, Values* values, int at, int channel, u32 keep,
                                             const float (&input)[ROWS][PASSES], int pass) {
    list[at] = (u16)channel;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const float value = (keep >> r) & 1u ? input[r][pass] : 0.0f;
#if MMA
        values[r][at] = narrow(value);
#else
        values[at][r] = value;
#endif
    }
}

#if FIRST
// Takes the first FIRST of a warp's kept channels out of `kept` into a list of its own, which the warp may read when
// this returns: their weights are asked for while the block lists the others. Returns how many there are.
__device__ __forceinline__ int list_first(u16* list, Values* values, Kept& kept, const float (&input)[ROWS][PASSES],
                                          int d_in) {
    const int lane = threadIdx.x % 32;
    int n = 0;
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        const int at = n + __popc(kept.ballots[pass] & ((1u << lane) - 1u));
        n += __popc(kept.ballots[pass]);
        if (kept.rows[pass] && at < FIRST) {
            list_channel(list, values, at, channel_of(pass, d_in).number, kept.rows[pass], input, pass);
            kept.rows[pass] = 0;
        }
        kept.ballots[pass] = __ballot_sync(~0u, kept.rows[pass] != 0);
    }
    __syncwarp();
    return n < FIRST ? n : FIRST;
}
#endif

// Lists what is left in `kept` of the block's channels, in their order; returns how many there are. Every thread of the
// block calls this, and may read the list when it returns.
__device__ __forceinline__ int list_kept(u16* list, Values* values, const Kept& kept,
                                         const float (&input)[ROWS][PASSES], int d_in) {
    __shared__ u8 counts[PASSES * WARPS];
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++)
        if (lane == 0) counts[pass * WARPS + warp] = (u8)__popc(kept.ballots[pass]);
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
        const int at = mine + __popc(kept.ballots[pass] & ((1u << lane) - 1u));
        if (kept.rows[pass])
            list_channel(list, values, at, channel_of(pass, d_in).number, kept.rows[pass], input, pass);
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
