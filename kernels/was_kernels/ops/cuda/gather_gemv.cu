// Sparse GEMV of one decoding step: y = W[:, kept] x[kept] for up to ROWS rows of x and PARTS projections at once.
//
// A block owns COLUMNS outputs of one projection and a share of the input channels. It scores its channels, lists the
// kept ones in shared memory, and its warps stream their weight rows: every lane reads 16 contiguous bytes, UNROLL
// rows in flight, the first of them before the list is made where weights are of 16 bits and not MMA. The block of the
// last share adds all in their order, so that two runs give the same bits.
// When GATED, blocks of gate and up alternate and up's makes silu(gate) * up.
//
// With several rows and BITS 16 the products are tensor cores' (MMA): a warp takes 64 outputs and 16 listed channels at
// a time, of which a lane reads 8 outputs of 4 channels; the rows of x are columns of the product, in tiles of 8.
//
// Weights are of BITS 16, or rounded to 8 or 4 bits with a scale and an offset for each channel and GROUP of outputs:
// w = scale * q + offset. A lane's outputs lie in one group, so the scale goes into x and the offset into one sum.
//
// Compiled by NVRTC with these macros: BF16, MMA, BITS, PER_LANE (outputs of a lane: 8 at 16 bits, else 8 to 32),
// GROUP, LANES (threads along a weight row: 4, 8, 16 or 32), WARPS, UNROLL (weight rows in flight), ROWS (8 or 16 with
// MMA), PARTS, GATED, CORRECTED (rows that are not dense have a scale and a constant), NORMED (RMSNorm of x first: 1, or 2 if whoever made x left sums of its squares), SPLITS (x is
// attention in that number of parts, of query heads of HEAD channels, QUERIES to a key head; undefined: x is x), SHARES
// (of the channels: blocks along y), CAPACITY (channels of a block at most, a multiple of the block size), MIN_BLOCKS
// (of a multiprocessor), PDL (wait for the kernel before as late as possible).
//
// The steps lie in headers, in the order in which the kernel takes them: inputs.cuh, list_kept.cuh, one of
// accumulate_{mma,half,rounded}.cuh, add_shares.cuh, results.cuh.

#include "common.cuh"
#ifdef SPLITS
#include "parts.cuh"
#endif

#define THREADS (WARPS * 32)
#define COLUMNS (LANES * PER_LANE)
#define PASSES (CAPACITY / THREADS)
#define SUMS (GATED ? 2 : 1)  // projections that make one output
#define THERE(r) (ROWS == 1 || (r) < rows)

#if BITS == 16
typedef u16 Stored;
#else
typedef u8 Stored;
#endif

struct Projection {
    const Stored* weight;  // [d_in, width * BITS / 8 bytes], rows `stride` apart
    const u32* scales;     // [d_in, groups]: scale and offset in float16; BITS < 16 only
    const float* norms;    // [d_in]
    const u16* bias;       // [width] or null
    const float* scale;    // [width]: what sums of masked rows are multiplied by; CORRECTED only
    const float* constant; // [width]: what is added to them then, in the place of the bias; CORRECTED only
    u16* out;              // [rows, width], rows `out_stride` apart
    long long stride;
    float threshold;
    int width;
    long long first_block;  // among the launch's column blocks; 0 when GATED
    long long groups;
};

struct Group {
    Projection part[PARTS];
};

#include "inputs.cuh"
#include "weights.cuh"
#if MMA
#include "mma.cuh"
#include "accumulate_mma.cuh"
#elif BITS == 16
#include "accumulate_half.cuh"
#else
#include "accumulate_rounded.cuh"
#endif
#include "list_kept.cuh"
#include "add_shares.cuh"
#include "results.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
gather_gemv(const u16* __restrict__ x,           // [rows, d_in], rows `x_stride` apart
            const u16* __restrict__ norm_weight, // [d_in], NORMED only
            const u16* __restrict__ residual,    // like out or null: added to the output
            const u8* __restrict__ dense,        // [rows] or null: rows that keep every channel
            u32* every_share,                    // [blocks, SHARES, ROWS, COLUMNS] bits of floats, 0 before and after
            const float* __restrict__ attended,  // parts of attention, SPLITS only
            long long* length,                   // of the sequence that attended, made one longer; SPLITS only
            const float* __restrict__ squares_of_x,  // [rows, n_squares]: sums of x's squares, NORMED 2 only
            float* __restrict__ squares_of_out,      // [rows, column blocks] or null: the same of the output
            const __grid_constant__ Group group, long long x_stride, long long out_stride, float epsilon, int rows,
            int d_in, int n_squares) {
#if MMA
    // Inputs, and once all are used the warps' sums in their place.
    constexpr int INPUT_BYTES = ROWS * sizeof(Values), SUM_BYTES = DEEP * sizeof(Sums);
    __shared__ __align__(16) u16 list[PITCH];
    __shared__ __align__(16) u8 space[INPUT_BYTES > SUM_BYTES ? INPUT_BYTES : SUM_BYTES];
    Values* values = reinterpret_cast<Values*>(space);
    Sums* sums = reinterpret_cast<Sums*>(space);
#else
    __shared__ u16 list[CAPACITY];
    __shared__ Values values[CAPACITY];
    __shared__ Sums sums[WARPS];
    __shared__ float own_sums[ROWS * COLUMNS];
#if FIRST
    __shared__ u16 first_list[WARPS][FIRST];
    __shared__ Values first_values[WARPS][FIRST];
#endif
#endif
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, share = blockIdx.y;

    int which = 0;
#if GATED
    which = blockIdx.x % 2;
    const int block = blockIdx.x / 2;
#else
#pragma unroll
    for (int p = 1; p < PARTS; p++)
        if (blockIdx.x >= group.part[p].first_block) which = p;
    const int block = blockIdx.x;
#endif
    const Projection& own = group.part[which];
    const int first_column = (block - (int)own.first_block) * COLUMNS;

    const bool adds = share == SHARES - 1 && (!GATED || which == 1);  // the others' shares to its own

    // What does not depend on the kernel before.
#if CORRECTED
    if (share == SHARES - 1) fetch_corrections(own, first_column);
#endif
    float norms[PASSES];
    read_channels(norms, own.norms, d_in);
#if NORMED
    float norm_weights[PASSES];
    read_channels(norm_weights, norm_weight, d_in);
#endif
    wait_for_input();
    let_next_start();
#ifdef SPLITS
    if (blockIdx.x == 0 && share == 0 && thread == 0) *length += 1;
#endif

    // Flags, squares and inputs are asked for together: each would be a trip to L2 of its own.
    const Source source = {x, attended, squares_of_x, x_stride, epsilon, rows, d_in, n_squares};
    const u32 whole = dense_rows(dense, rows);
    float input[ROWS][PASSES];
#if NORMED == 2 && ROWS <= 2
    float first_squares[ROWS];
    read_first_squares(first_squares, source);
    read_inputs(input, source);
    norm_inputs(input, norm_weights, first_squares, source);
#elif NORMED
    read_inputs(input, source);
    norm_inputs(input, norm_weights, source);
#else
    read_inputs(input, source);
#endif

    Kept kept = kept_channels(input, norms, own.threshold, whole, rows, d_in);

    const unsigned long long policy = read_once();
    u32* shares = every_share + (long long)block * SUMS * SHARES * (ROWS * COLUMNS);
    u32* mine = adds ? nullptr : shares + ((GATED ? which : 0) * SHARES + share) * (ROWS * COLUMNS);
#if MMA
    const int n = list_kept(list, values, kept, input, d_in);
    const int column = first_column + (warp % ACROSS) * 64 + lane / 4 * 8;
    float total[TILES][4][4];  // [tile of rows][pair of outputs][output 0 and rows 2q, 2q + 1; output 1 likewise]
#pragma unroll
    for (int i = 0; i < TILES * 16; i++) (&total[0][0][0])[i] = 0.0f;
    accumulate(total, list, values, n, own, column < own.width ? column : -1, policy);
    leave_share(mine, sums, total, rows);
    const float* own_sums = &sums[0][0][0];
#else
    const int column = first_column + (lane % LANES) * PER_LANE;
    const bool there = column < own.width;
    float total[ROWS][PER_LANE];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int c = 0; c < PER_LANE; c++) total[r][c] = 0.0f;
#if FIRST
    const int n_first = list_first(first_list[warp], first_values[warp], kept, input, d_in);
    const Weights ahead = read_weights(own, column, first_list[warp], lane / LANES, OF_WARP, there ? n_first : 0, policy);
#endif
    const int n = list_kept(list, values, kept, input, d_in);
#if FIRST
    add_products(total, ahead, first_values[warp], lane / LANES, OF_WARP, n_first);
#endif
    accumulate(total, list, values, there ? n : 0, own, column, policy);
    leave_share(mine, own_sums, sums, total, rows);
#endif
    if (!adds) return;
    __syncthreads();
    write_results(group, which, block, first_column, shares, own_sums,
                  {residual, out_stride, squares_of_out, rows, whole});
}
