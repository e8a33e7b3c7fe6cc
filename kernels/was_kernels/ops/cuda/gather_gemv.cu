// Sparse GEMV of one decoding step: y = W[:, kept] x[kept] for up to ROWS rows of x and PARTS projections at once.
//
// A block owns COLUMNS outputs of one projection and a share of the input channels. It scores its channels, lists the
// kept ones in shared memory, and its warps stream their weight rows: every lane reads 16 contiguous bytes, UNROLL
// rows in flight. The block that arrives last adds the shares in their order, so that two runs give the same bits.
// When GATED, blocks of gate and up alternate and the last of both makes silu(gate) * up.
//
// With several rows and BITS 16 the products are tensor cores' (MMA): a warp takes 64 outputs and 16 listed channels at
// a time, of which a lane reads 8 outputs of 4 channels; the rows of x are columns of the product, in tiles of 8.
//
// Weights are of BITS 16, or rounded to 8 or 4 bits with a scale and an offset for each channel and GROUP of outputs:
// w = scale * q + offset. A lane's outputs lie in one group, so the scale goes into x and the offset into one sum.
//
// Compiled by NVRTC with these macros: BF16, MMA, BITS, PER_LANE (outputs of a lane: 8 at 16 bits, else 8 to 32), GROUP,
// LANES (threads along a weight row: 4, 8, 16 or 32), WARPS, UNROLL (weight rows in flight), ROWS (8 or 16 with MMA),
// PARTS, GATED, NORMED (RMSNorm of x first: 1, or 2 if whoever made x left sums of its
// squares), SPLITS (x is attention in so many parts, of query heads of HEAD channels, QUERIES to a key head; undefined:
// x is x), SHARES (of the channels: blocks along y), CAPACITY (channels of a block at most, a multiple of the block
// size), MIN_BLOCKS (of a multiprocessor), PDL (wait for the kernel before as late as possible).

#include "common.cuh"
#ifdef SPLITS
#include "parts.cuh"
#endif

#define THREADS (WARPS * 32)
#define COLUMNS (LANES * PER_LANE)
#define GROUPS (THREADS / LANES)
#define PASSES (CAPACITY / THREADS)
#define SUMS (GATED ? 2 : 1)  // projections that make one output
#define STRIPE 16
#define THERE(r) (ROWS == 1 || (r) < rows)
// What a thread of the last block reads at once: partial sums one after the other cost a trip to L2 each.
#define MOST_AT_ONCE (16 / SUMS)
#define AT_ONCE (SHARES < MOST_AT_ONCE ? SHARES : MOST_AT_ONCE)  // partial sums of a result
#define RESULT_PASSES ((ROWS * COLUMNS + THREADS - 1) / THREADS)
#define MOST_TOGETHER (32 / (SUMS * AT_ONCE))
#define TOGETHER (RESULT_PASSES < MOST_TOGETHER ? RESULT_PASSES : MOST_TOGETHER)  // results

#if MMA
#define ACROSS (COLUMNS / 64)              // warps along the outputs of a block
#define DEEP (WARPS / ACROSS)              // warps along its channels
#define STEPS (UNROLL / 4)                 // of 16 channels each that a warp has in flight
#define TILES (ROWS / 8)
#define PITCH (CAPACITY + DEEP * STEPS * 16 + 8)  // of a row of inputs; lanes of a warp then meet different banks
#define INPUT_BYTES (ROWS * PITCH * 2)
#define SUM_BYTES (DEEP * ROWS * COLUMNS * 4)
#endif

#if BITS == 16
typedef u16 Stored;
// Of a lane's c-th output among a warp's sums.
#define PLACE(l, c) ((l) * PER_LANE + (c))
#else
typedef u8 Stored;
#define WORDS (PER_LANE * BITS / 32)
#define PLACE(l, c) ((l) * PER_LANE + ((c) + (l)) % PER_LANE)
#endif

struct Projection {
    const Stored* weight;  // [d_in, width * BITS / 8 bytes], rows `stride` apart
    const u32* scales;     // [d_in, groups]: scale and offset in float16; BITS < 16 only
    const float* norms;  // [d_in]
    const u16* bias;     // [width] or null
    u16* out;            // [rows, width], rows `out_stride` apart
    long long stride;
    float threshold;
    int width;
    long long first_block;  // among the launch's column blocks; 0 when GATED
    long long groups;
};

struct Group {
    Projection part[PARTS];
};

#include "weights.cuh"
#if MMA
#include "accumulate_mma.cuh"
#elif BITS == 16
#include "accumulate_half.cuh"
#else
#include "accumulate_rounded.cuh"
#endif

// A share owns every SHARES-th stripe of 16 channels: neighbours tend to be kept together.
__device__ __forceinline__ int channel_of(int place, int share) {
    return ((place / STRIPE) * SHARES + share) * STRIPE + place % STRIPE;
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
gather_gemv(const u16* __restrict__ x,           // [rows, d_in], rows `x_stride` apart
            const u16* __restrict__ norm_weight, // [d_in], NORMED only
            const u16* __restrict__ residual,    // like out or null: added to the output
            const u8* __restrict__ dense,        // [rows] or null: rows that keep every channel
            float* __restrict__ parts,           // [blocks, SHARES, ROWS, COLUMNS]
            int* __restrict__ arrived,           // [column blocks], zero before and after
            const float* __restrict__ attended,  // parts of attention, SPLITS only
            long long* length,                   // of the sequence that attended, made one longer; SPLITS only
            const float* __restrict__ squares_of_x,  // [rows, n_squares]: sums of x's squares, NORMED 2 only
            float* __restrict__ squares_of_out,      // [rows, column blocks] or null: the same of the output
            const __grid_constant__ Group group, long long x_stride, long long out_stride, float epsilon, int rows, int d_in,
            int n_squares) {
#if MMA
    // Inputs, and once all are used the warps' sums in their place.
    __shared__ __align__(16) u16 list[PITCH];
    __shared__ __align__(16) u8 space[INPUT_BYTES > SUM_BYTES ? INPUT_BYTES : SUM_BYTES];
    u16(*values)[PITCH] = reinterpret_cast<u16(*)[PITCH]>(space);
    float(*sums)[ROWS][COLUMNS] = reinterpret_cast<float(*)[ROWS][COLUMNS]>(space);
#else
    __shared__ u16 list[CAPACITY];
    __shared__ float values[CAPACITY][ROWS];
    __shared__ float sums[WARPS][COLUMNS];
#endif
    __shared__ u8 counts[PASSES * WARPS];
#if NORMED == 1
    __shared__ float squares[ROWS][WARPS];
#elif NORMED == 2 && ROWS > 2
    __shared__ float scales_of_rows[ROWS];
#endif
    __shared__ float result_squares[ROWS * COLUMNS / 32];
    __shared__ int is_last;

    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int share = blockIdx.y;
    const int stripes = (d_in + STRIPE - 1) / STRIPE;
    const int capacity = ((stripes + SHARES - 1) / SHARES) * STRIPE;

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

    // What does not depend on the kernel before. The residual was made by an earlier one.
    float norms[PASSES];
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        const int place = pass * THREADS + thread;
        const int channel = channel_of(place, share);
        norms[pass] = place < capacity && channel < d_in ? own.norms[channel] : 0.0f;
    }
#if NORMED
    float norm_weights[PASSES];
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        const int place = pass * THREADS + thread;
        const int channel = channel_of(place, share);
        norm_weights[pass] = place < capacity && channel < d_in ? widen(norm_weight[channel]) : 0.0f;
    }
#endif
    wait_for_input();
    let_next_start();
#ifdef SPLITS
    if (blockIdx.x == 0 && share == 0 && thread == 0) *length += 1;
#endif

    u32 whole = 0;  // rows that keep every channel
#pragma unroll
    for (int r = 0; r < ROWS; r++) whole |= (dense != nullptr && THERE(r) && dense[r] ? 1u : 0u) << r;
#if NORMED == 2 && ROWS <= 2
    // Of few rows every warp adds all squares, which costs no meeting of the block.
    float scales_of_rows[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        scales_of_rows[r] = THERE(r) && lane < n_squares ? __ldcg(squares_of_x + r * n_squares + lane) : 0.0f;
#endif
    float input[ROWS][PASSES];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            const int place = pass * THREADS + thread;
            const int channel = channel_of(place, share);
            const bool there = place < capacity && channel < d_in && THERE(r);
#ifdef SPLITS
            input[r][pass] = there ? merged_attention(attended, r, channel, d_in) : 0.0f;
#else
            input[r][pass] = there ? widen(x[r * x_stride + channel]) : 0.0f;
#endif
        }
#if NORMED == 1
    for (int r = 0; r < rows; r++) {
        float total = 0.0f;
        for (int first = thread * 8; first < d_in; first += THREADS * 8 * 4) {
            uint4 v[4];
#pragma unroll
            for (int u = 0; u < 4; u++) {
                const int c = first + u * THREADS * 8;
                v[u] = make_uint4(0u, 0u, 0u, 0u);
                if (c < d_in) v[u] = *reinterpret_cast<const uint4*>(x + r * x_stride + c);
            }
#pragma unroll
            for (int u = 0; u < 4; u++) {
                const u32 word[4] = {v[u].x, v[u].y, v[u].z, v[u].w};
#pragma unroll
                for (int w = 0; w < 4; w++) total += low(word[w]) * low(word[w]) + high(word[w]) * high(word[w]);
            }
        }
#pragma unroll
        for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
        if (lane == 0) squares[r][warp] = total;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += r < rows ? squares[r][w] : 0.0f;
        const float scale = rsqrtf(total / d_in + epsilon);
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++)
            input[r][pass] = rounded(norm_weights[pass] * rounded(input[r][pass] * scale));
    }
#elif NORMED == 2
#pragma unroll
    for (int r = ROWS > 2 ? warp : 0; r < ROWS; r += ROWS > 2 ? WARPS : 1) {
        float total = ROWS > 2 ? 0.0f : scales_of_rows[r];
        if (THERE(r))
            for (int i = ROWS > 2 ? lane : lane + 32; i < n_squares; i += 32)
                total += __ldcg(squares_of_x + r * n_squares + i);
#pragma unroll
        for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
        if (ROWS <= 2 || lane == 0) scales_of_rows[r] = THERE(r) ? rsqrtf(total / d_in + epsilon) : 0.0f;
    }
#if ROWS > 2
    __syncthreads();
#endif
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const float scale = scales_of_rows[r];
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++)
            input[r][pass] = rounded(norm_weights[pass] * rounded(input[r][pass] * scale));
    }
#endif

    // Which rows keep which of this thread's channels; one ballot a pass.
    u32 ballots[PASSES];
    u32 kept[PASSES];
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        const int place = pass * THREADS + thread;
        const int channel = channel_of(place, share);
        u32 keep = 0;
        if (place < capacity && channel < d_in) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const bool scored = fabsf(input[r][pass]) * norms[pass] >= own.threshold;
                if (THERE(r) && (scored || (whole >> r) & 1u || own.threshold <= 0.0f)) keep |= 1u << r;
            }
        }
        kept[pass] = keep;
        ballots[pass] = __ballot_sync(~0u, keep != 0);
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
            list[at] = (u16)channel_of(pass * THREADS + thread, share);
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
    // What a last step reads behind the list.
    for (int i = thread; i < DEEP * STEPS * 16; i += THREADS) {
        list[n + i] = 0;
#pragma unroll
        for (int r = 0; r < ROWS; r++) values[r][n + i] = 0;
    }
#endif
    __syncthreads();

    const unsigned long long policy = read_once();
#if MMA
    const int group_lane = lane / 4, quarter = lane % 4;
    const int in_block = (warp % ACROSS) * 64 + group_lane * 8;
    const int column = first_column + in_block;
    const bool there = column < own.width;
    float total[TILES][4][4];  // [tile of rows][pair of outputs][output 0 and rows 2q, 2q + 1; output 1 likewise]
#pragma unroll
    for (int i = 0; i < TILES * 16; i++) (&total[0][0][0])[i] = 0.0f;
    accumulate(total, list, values, n, own, there ? column : -1, policy);
#else
    const int column = first_column + (lane % LANES) * PER_LANE;
    if (column >= own.width) n = 0;
    float total[ROWS][PER_LANE];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int c = 0; c < PER_LANE; c++) total[r][c] = 0.0f;
    accumulate(total, list, values, n, own, column, policy);
#endif

    // Warps in shared memory, then blocks: [column block, gate or up, share, row, column].
    float* place = parts + (long long)block * SUMS * SHARES * (ROWS * COLUMNS);
    float* mine = place + ((SUMS == 2 ? which : 0) * SHARES + share) * (ROWS * COLUMNS);
#if MMA
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
        if (i / COLUMNS < rows) __stcg(mine + i, sum);
    }
    __syncthreads();
#else
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
            __stcg(mine + r * COLUMNS + i, sum);
        }
        __syncthreads();
    }
#endif
    if (thread == 0) {
        is_last = arrives_last(arrived + block, SUMS * SHARES);
        if (is_last) arrived[block] = 0;
    }
    __syncthreads();
    if (!is_last) return;

    for (int first_pass = 0; first_pass < RESULT_PASSES; first_pass += TOGETHER) {
        float sum[TOGETHER][SUMS], added[TOGETHER][SUMS], beside[TOGETHER];
#pragma unroll
        for (int t = 0; t < TOGETHER; t++) {
            const int i = (first_pass + t) * THREADS + thread, r = i / COLUMNS, out = first_column + i % COLUMNS;
            const bool there = r < rows && out < own.width;
            beside[t] = there && residual != nullptr ? widen(residual[r * out_stride + out]) : 0.0f;
#pragma unroll
            for (int f = 0; f < SUMS; f++) {
                const u16* bias = group.part[GATED ? f : which].bias;
                added[t][f] = there && bias != nullptr ? widen(bias[out]) : 0.0f;
                sum[t][f] = 0.0f;
            }
        }
#pragma unroll 1
        for (int first = 0; first < SHARES; first += AT_ONCE) {
            float v[TOGETHER][SUMS][AT_ONCE];
#pragma unroll
            for (int t = 0; t < TOGETHER; t++)
#pragma unroll
                for (int f = 0; f < SUMS; f++)
#pragma unroll
                    for (int s = 0; s < AT_ONCE; s++) {
                        const int i = (first_pass + t) * THREADS + thread;
                        const float* from = place + f * SHARES * (ROWS * COLUMNS) + i;
                        const bool there = i < rows * COLUMNS && (SHARES % AT_ONCE == 0 || first + s < SHARES);
                        v[t][f][s] = there ? __ldcg(from + (first + s) * (ROWS * COLUMNS)) : 0.0f;
                    }
#pragma unroll
            for (int t = 0; t < TOGETHER; t++)
#pragma unroll
                for (int f = 0; f < SUMS; f++)
#pragma unroll
                    for (int s = 0; s < AT_ONCE; s++) sum[t][f] += v[t][f][s];
        }
#pragma unroll
        for (int t = 0; t < TOGETHER; t++) {
            const int i = (first_pass + t) * THREADS + thread;
            if (i >= ROWS * COLUMNS) break;
            const int r = i / COLUMNS, out = first_column + i % COLUMNS;
            float result = 0.0f;
            if (r < rows && out < own.width) {
                result = rounded(sum[t][0] + added[t][0]);
#if GATED
                result = rounded(result / (1.0f + __expf(-result))) * rounded(sum[t][1] + added[t][1]);
#endif
                if (residual != nullptr) result = beside[t] + rounded(result);
                result = rounded(result);
                group.part[GATED ? 0 : which].out[r * out_stride + out] = narrow(result);
            }
            if (squares_of_out != nullptr) {  // a warp's outputs lie in one row
                float square = result * result;
#pragma unroll
                for (int step = 16; step > 0; step /= 2) square += __shfl_xor_sync(~0u, square, step);
                if (lane == 0) result_squares[i / 32] = square;
            }
        }
    }
    if (squares_of_out == nullptr) return;
    __syncthreads();
    for (int r = thread; r < rows; r += THREADS) {
        float total = 0.0f;
        for (int i = 0; i < COLUMNS / 32; i++) total += result_squares[r * (COLUMNS / 32) + i];
        __stcg(squares_of_out + r * gridDim.x + block, total);
    }
}
