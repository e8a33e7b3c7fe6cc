// Sparse GEMV of one decoding step: y = W[:, kept] x[kept] for up to ROWS rows of x and PARTS projections at once.
//
// A block owns COLUMNS outputs of one projection and a share of the input channels. It scores its channels, lists the
// kept ones in shared memory, and its warps stream their weight rows: every lane reads 16 contiguous bytes, UNROLL
// rows in flight. The block that arrives last adds the shares in their order, so that two runs give the same bits.
// When GATED, blocks of gate and up alternate and the last of both makes silu(gate) * up. With ONE_LIST both have one
// mask: a block's lanes read gate in their first half and up in their second, behind one list.
//
// Compiled by NVRTC with these macros: BF16, LANES (threads along a weight row: 8, 16 or 32), WARPS, UNROLL, ROWS,
// PARTS, GATED, ONE_LIST (GATED only), NORMED (RMSNorm of x first), CAPACITY (channels of a block at most, a multiple of the block size),
// MIN_BLOCKS (of a multiprocessor), PDL (wait for the kernel before as late as possible).

#include "common.cuh"

#define THREADS (WARPS * 32)
#define COLUMNS (LANES * 8)
#define GROUPS (THREADS / LANES)
#define PASSES (CAPACITY / THREADS)
#define PHASES (GATED && !ONE_LIST ? 2 : 1)
#define SUMS (GATED ? 2 : 1)
#define OUTPUTS (ONE_LIST ? COLUMNS / 2 : COLUMNS)
#define STRIPE 16

struct Projection {
    const u16* weight;   // [d_in, width], rows `stride` apart
    const float* norms;  // [d_in]
    const u16* bias;     // [width] or null
    u16* out;            // [rows, width], rows `out_stride` apart
    long long stride;
    float threshold;
    int width;
    long long first_block;  // among the launch's column blocks; 0 when GATED
};

struct Group {
    Projection part[PARTS];
};

// Weights are read once a step: they should not push out what is read again.
__device__ __forceinline__ unsigned long long read_once() {
    unsigned long long policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ uint4 stream(const u16* p, unsigned long long policy) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p), "l"(policy));
    return v;
}

// Share s of `shares` owns every shares-th stripe of 16 channels: neighbours tend to be kept together.
__device__ __forceinline__ int channel_of(int place, int share, int shares) {
    return ((place / STRIPE) * shares + share) * STRIPE + place % STRIPE;
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
gather_gemv(const u16* __restrict__ x,           // [rows, d_in], rows `x_stride` apart
            const u16* __restrict__ norm_weight, // [d_in], NORMED only
            const u16* __restrict__ residual,    // like out or null: added to the output
            const u8* __restrict__ dense,        // [rows] or null: rows that keep every channel
            float* __restrict__ parts,           // [blocks, shares, ROWS, COLUMNS]
            int* __restrict__ arrived,           // [column blocks], zero before and after
            const __grid_constant__ Group group, long long x_stride, long long out_stride, float epsilon, int rows, int d_in) {
    __shared__ u16 list[CAPACITY];
    __shared__ float values[CAPACITY][ROWS];
    __shared__ u8 counts[PASSES * WARPS];
    __shared__ float sums[WARPS][COLUMNS];
#if NORMED
    __shared__ float squares[ROWS][WARPS];
#endif
    __shared__ int is_last;

    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int share = blockIdx.y, shares = gridDim.y;
    const int stripes = (d_in + STRIPE - 1) / STRIPE;
    const int capacity = ((stripes + shares - 1) / shares) * STRIPE;

    int which = 0;
#if ONE_LIST
    const int block = blockIdx.x;
#elif GATED
    which = blockIdx.x % 2;
    const int block = blockIdx.x / 2;
#else
#pragma unroll
    for (int p = 1; p < PARTS; p++)
        if (blockIdx.x >= group.part[p].first_block) which = p;
    const int block = blockIdx.x;
#endif
    const Projection& own = group.part[which];
    const int first_column = (block - (int)own.first_block) * OUTPUTS;

    // What does not depend on the kernel before. The residual was made by an earlier one.
    float norms[PASSES];
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        const int place = pass * THREADS + thread;
        const int channel = channel_of(place, share, shares);
        norms[pass] = place < capacity && channel < d_in ? own.norms[channel] : 0.0f;
    }
#if NORMED
    float norm_weights[PASSES];
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        const int place = pass * THREADS + thread;
        const int channel = channel_of(place, share, shares);
        norm_weights[pass] = place < capacity && channel < d_in ? widen(norm_weight[channel]) : 0.0f;
    }
#endif
    wait_for_input();
    let_next_start();

    float input[ROWS][PASSES];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            const int place = pass * THREADS + thread;
            const int channel = channel_of(place, share, shares);
            const bool there = place < capacity && channel < d_in && r < rows;
            input[r][pass] = there ? widen(x[r * x_stride + channel]) : 0.0f;
        }
#if NORMED
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
#endif

    // Which rows keep which of this thread's channels; one ballot a pass.
    u32 ballots[PASSES];
    u32 kept[PASSES];
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        const int place = pass * THREADS + thread;
        const int channel = channel_of(place, share, shares);
        u32 keep = 0;
        if (place < capacity && channel < d_in) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const bool all = own.threshold <= 0.0f || (dense != nullptr && r < rows && dense[r]);
                const bool scored = fabsf(input[r][pass]) * norms[pass] >= own.threshold;
                if (r < rows && (all || scored)) keep |= 1u << r;
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
            list[at] = (u16)channel_of(pass * THREADS + thread, share, shares);
#pragma unroll
            for (int r = 0; r < ROWS; r++) values[at][r] = (kept[pass] >> r) & 1u ? input[r][pass] : 0.0f;
        }
    }
    __syncthreads();

#if ONE_LIST
    const int column = first_column + (lane % (LANES / 2)) * 8;
    const Projection& read = group.part[lane % LANES / (LANES / 2)];
#else
    const int column = first_column + (lane % LANES) * 8;
    const Projection& read = own;
#endif
    if (column >= own.width) n = 0;
    const u16* weight = read.weight + column;
    const unsigned long long policy = read_once();
    float total[ROWS][8];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int c = 0; c < 8; c++) total[r][c] = 0.0f;
    for (int first = thread / LANES; first < n; first += GROUPS * UNROLL) {
        uint4 v[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int i = first + u * GROUPS;
            v[u] = make_uint4(0u, 0u, 0u, 0u);
            if (i < n) v[u] = stream(weight + list[i] * read.stride, policy);
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

    // Warps in shared memory, then blocks: [column block, gate or up, share, row, column].
    float* place = parts + (long long)block * PHASES * shares * (ROWS * COLUMNS);
    float* mine = place + ((PHASES == 2 ? which : 0) * shares + share) * (ROWS * COLUMNS);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int c = 0; c < 8; c++) {
#pragma unroll
            for (int step = 16; step >= LANES; step /= 2) total[r][c] += __shfl_xor_sync(~0u, total[r][c], step);
            if (lane < LANES) sums[warp][lane * 8 + c] = total[r][c];
        }
        __syncthreads();
        for (int i = thread; i < COLUMNS; i += THREADS) {
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += sums[w][i];
            __stcg(mine + r * COLUMNS + i, sum);
        }
        __syncthreads();
    }
    if (thread == 0) {
        is_last = arrives_last(arrived + block, PHASES * shares);
        if (is_last) arrived[block] = 0;
    }
    __syncthreads();
    if (!is_last) return;

    for (int i = thread; i < ROWS * OUTPUTS; i += THREADS) {
        const int r = i / OUTPUTS, out = first_column + i % OUTPUTS;
        if (r >= rows || out >= own.width) continue;
        const float beside = residual == nullptr ? 0.0f : widen(residual[r * out_stride + out]);
        float sum[SUMS];
#pragma unroll
        for (int f = 0; f < SUMS; f++) {
            sum[f] = 0.0f;
#if ONE_LIST
            const float* from = place + r * COLUMNS + f * OUTPUTS + i % OUTPUTS;
#else
            const float* from = place + f * shares * (ROWS * COLUMNS) + i;
#endif
#pragma unroll 8
            for (int s = 0; s < shares; s++) sum[f] += __ldcg(from + s * (ROWS * COLUMNS));
            const u16* bias = group.part[GATED ? f : which].bias;
            if (bias != nullptr) sum[f] += widen(bias[out]);
        }
        float result = rounded(sum[0]);
#if GATED
        result = rounded(result / (1.0f + __expf(-result))) * rounded(sum[1]);
#endif
        if (residual != nullptr) result = beside + rounded(result);
        group.part[GATED ? 0 : which].out[r * out_stride + out] = narrow(result);
    }
}
