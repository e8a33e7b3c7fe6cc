// Sparse GEMV of one decoding step: y = W[:, kept] x[kept] for up to ROWS rows of x and PARTS projections at once.
//
// A block owns COLUMNS outputs of one projection (of gate and up together when GATED) and a share of the input
// channels. It scores its channels, lists the kept ones in shared memory, and its warps stream their weight rows:
// every lane reads 16 contiguous bytes, UNROLL rows in flight. The block that arrives last adds the shares in their
// order, so that two runs give the same bits.
//
// Compiled by NVRTC with these macros: BF16, LANES (threads along a weight row: 8, 16 or 32), WARPS, UNROLL, ROWS,
// PARTS, GATED, NORMED (RMSNorm of x first), CAPACITY (channels of a block at most, a multiple of the block size),
// MIN_BLOCKS (of a multiprocessor), PDL (wait for the kernel before as late as possible).

#include "common.cuh"

#define THREADS (WARPS * 32)
#define COLUMNS (LANES * 8)
#define GROUPS (THREADS / LANES)
#define PASSES (CAPACITY / THREADS)
#define PHASES (GATED ? 2 : 1)
#define SUMS (PHASES * COLUMNS)
#define STRIPE 16

struct Projection {
    const u16* weight;   // [d_in, width], rows `stride` apart
    const float* norms;  // [d_in]
    const u16* bias;     // [width] or null
    u16* out;            // [rows, width], rows `out_stride` apart
    long long stride;
    float threshold;
    int width;
    int first_block;
    int ahead;           // channels of a block whose weights are fetched before it is known whether they are kept
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

__device__ __forceinline__ void fetch_ahead(const u16* p, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes));
#else
    for (int at = 0; at < bytes; at += 128) asm volatile("prefetch.global.L2 [%0];" ::"l"(p + at / 2));
#endif
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
            float* __restrict__ parts,           // [blocks, shares, ROWS, SUMS]
            int* __restrict__ arrived,           // [blocks], zero before and after
            Group group, long long x_stride, long long out_stride, float epsilon, int rows, int d_in) {
    __shared__ u16 list[PHASES][CAPACITY];
    __shared__ float values[PHASES][CAPACITY][ROWS];
    __shared__ u8 counts[PHASES][PASSES * WARPS];
    __shared__ float sums[WARPS][SUMS];
#if NORMED
    __shared__ float squares[ROWS][WARPS];
#endif
    __shared__ int is_last;

    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int share = blockIdx.y, shares = gridDim.y;
    const int stripes = (d_in + STRIPE - 1) / STRIPE;
    const int capacity = ((stripes + shares - 1) / shares) * STRIPE;

    int which = 0;
#if !GATED
#pragma unroll
    for (int p = 1; p < PARTS; p++)
        if ((int)blockIdx.x >= group.part[p].first_block) which = p;
#endif
    const int first_column = (blockIdx.x - group.part[which].first_block) * COLUMNS;

    // What does not depend on the kernel before: the norms, and weights that are likely to be wanted.
    float norms[PHASES][PASSES];
#pragma unroll
    for (int f = 0; f < PHASES; f++) {
        const Projection& own = group.part[GATED ? f : which];
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            const int place = pass * THREADS + thread;
            const int channel = channel_of(place, share, shares);
            const bool there = place < capacity && channel < d_in;
            norms[f][pass] = there ? own.norms[channel] : 0.0f;
            if (there && place < own.ahead)
                fetch_ahead(own.weight + channel * own.stride + first_column,
                            min(COLUMNS, own.width - first_column) * 2);
        }
    }
    wait_for_input();
    let_next_start();

#if NORMED
    for (int r = 0; r < rows; r++) {
        float total = 0.0f;
        for (int c = thread * 8; c < d_in; c += THREADS * 8) {
            const uint4 v = *reinterpret_cast<const uint4*>(x + r * x_stride + c);
            const u32 word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int w = 0; w < 4; w++) total += low(word[w]) * low(word[w]) + high(word[w]) * high(word[w]);
        }
#pragma unroll
        for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
        if (lane == 0) squares[r][warp] = total;
    }
#endif

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
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += r < rows ? squares[r][w] : 0.0f;
        const float scale = rsqrtf(total / d_in + epsilon);
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            const int place = pass * THREADS + thread;
            const int channel = channel_of(place, share, shares);
            if (place < capacity && channel < d_in)
                input[r][pass] = rounded(widen(norm_weight[channel]) * rounded(input[r][pass] * scale));
        }
    }
#endif

    // Which rows keep which of this thread's channels; one ballot a pass.
    u32 ballots[PHASES][PASSES];
    u32 kept[PHASES][PASSES];
#pragma unroll
    for (int f = 0; f < PHASES; f++) {
        const float threshold = group.part[GATED ? f : which].threshold;
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            const int place = pass * THREADS + thread;
            const int channel = channel_of(place, share, shares);
            u32 keep = 0;
            if (place < capacity && channel < d_in) {
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    const bool all = threshold <= 0.0f || (dense != nullptr && r < rows && dense[r]);
                    const bool scored = fabsf(input[r][pass]) * norms[f][pass] >= threshold;
                    if (r < rows && (all || scored)) keep |= 1u << r;
                }
            }
            kept[f][pass] = keep;
            ballots[f][pass] = __ballot_sync(~0u, keep != 0);
            if (lane == 0) counts[f][pass * WARPS + warp] = (u8)__popc(ballots[f][pass]);
        }
    }
    __syncthreads();
    int n_kept[PHASES];
#pragma unroll
    for (int f = 0; f < PHASES; f++) {
        int before = 0;
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            int mine = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                if (w == warp) mine = before;
                before += counts[f][pass * WARPS + w];
            }
            if (kept[f][pass]) {
                const int at = mine + __popc(ballots[f][pass] & ((1u << lane) - 1u));
                list[f][at] = (u16)channel_of(pass * THREADS + thread, share, shares);
#pragma unroll
                for (int r = 0; r < ROWS; r++) values[f][at][r] = (kept[f][pass] >> r) & 1u ? input[r][pass] : 0.0f;
            }
        }
        n_kept[f] = before;
    }
    __syncthreads();

    const int column = first_column + (lane % LANES) * 8;
    const int group_of = thread / LANES;
    const unsigned long long policy = read_once();
    float total[PHASES][ROWS][8];
#pragma unroll
    for (int f = 0; f < PHASES; f++) {
        const Projection& own = group.part[GATED ? f : which];
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int c = 0; c < 8; c++) total[f][r][c] = 0.0f;
        const int n = column < own.width ? n_kept[f] : 0;
        const u16* weight = own.weight + column;
        for (int first = group_of; first < n; first += GROUPS * UNROLL) {
            uint4 v[UNROLL];
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                const int i = first + u * GROUPS;
                v[u] = make_uint4(0u, 0u, 0u, 0u);
                if (i < n) v[u] = stream(weight + list[f][i] * own.stride, policy);
            }
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                const int i = first + u * GROUPS;
                const u32 word[4] = {v[u].x, v[u].y, v[u].z, v[u].w};
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    const float value = i < n ? values[f][i][r] : 0.0f;
#pragma unroll
                    for (int w = 0; w < 4; w++) {
                        total[f][r][2 * w] += low(word[w]) * value;
                        total[f][r][2 * w + 1] += high(word[w]) * value;
                    }
                }
            }
        }
    }

    float* place = parts + (long long)blockIdx.x * shares * (ROWS * SUMS);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int f = 0; f < PHASES; f++)
#pragma unroll
            for (int c = 0; c < 8; c++) {
#pragma unroll
                for (int step = 16; step >= LANES; step /= 2)
                    total[f][r][c] += __shfl_xor_sync(~0u, total[f][r][c], step);
                if (lane < LANES) sums[warp][f * COLUMNS + lane * 8 + c] = total[f][r][c];
            }
        __syncthreads();
        for (int i = thread; i < SUMS; i += THREADS) {
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += sums[w][i];
            __stcg(place + (share * ROWS + r) * SUMS + i, sum);
        }
        __syncthreads();
    }
    if (thread == 0) {
        is_last = arrives_last(arrived + blockIdx.x, shares);
        if (is_last) arrived[blockIdx.x] = 0;
    }
    __syncthreads();
    if (!is_last) return;

    for (int i = thread; i < ROWS * COLUMNS; i += THREADS) {
        const int r = i / COLUMNS, c = i % COLUMNS, out = first_column + c;
        const Projection& own = group.part[which];
        if (r >= rows || out >= own.width) continue;
        float sum[PHASES];
#pragma unroll
        for (int f = 0; f < PHASES; f++) {
            sum[f] = 0.0f;
#pragma unroll 8
            for (int s = 0; s < shares; s++) sum[f] += __ldcg(place + (s * ROWS + r) * SUMS + f * COLUMNS + c);
            const u16* bias = group.part[GATED ? f : which].bias;
            if (bias != nullptr) sum[f] += widen(bias[out]);
        }
        float result = rounded(sum[0]);
#if GATED
        result = rounded(result / (1.0f + __expf(-result))) * rounded(sum[1]);
#endif
        if (residual != nullptr) result = widen(residual[r * out_stride + out]) + rounded(result);
        own.out[r * out_stride + out] = narrow(result);
    }
}
