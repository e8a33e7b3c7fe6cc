// Sparse GEMV of one decoding step: y = W[:, kept] x[kept] for up to ROWS rows of x and PARTS projections at once.
//
// A block owns COLUMNS outputs of one projection and a share of the input channels. It scores its channels, lists the
// kept ones in shared memory, and its warps stream their weight rows: every lane reads 16 contiguous bytes, UNROLL
// rows in flight. The block that arrives last adds the shares in their order, so that two runs give the same bits.
// When GATED, blocks of gate and up alternate and the last of both makes silu(gate) * up. With ONE_LIST both have one
// mask: a block's lanes read gate in their first half and up in their second, behind one list.
//
// Weights are of BITS 16, or rounded to 8 or 4 bits with a scale and an offset for each channel and GROUP of outputs:
// w = scale * q + offset. A lane's outputs lie in one group, so the scale goes into x and the offset into one sum.
//
// Compiled by NVRTC with these macros: BF16, BITS, PER_LANE (outputs of a lane: 8 at 16 bits, else 8 to 32), GROUP,
// LANES (threads along a weight row: 4, 8, 16 or 32), WARPS, UNROLL, ROWS, PARTS, GATED, ONE_LIST (GATED only, 16 bits), NORMED (RMSNorm of x first), CAPACITY (channels of a block at most, a multiple of the block size),
// MIN_BLOCKS (of a multiprocessor), PDL (wait for the kernel before as late as possible).

#include "common.cuh"

#define THREADS (WARPS * 32)
#define COLUMNS (LANES * PER_LANE)
#define GROUPS (THREADS / LANES)
#define PASSES (CAPACITY / THREADS)
#define PHASES (GATED && !ONE_LIST ? 2 : 1)
#define SUMS (GATED ? 2 : 1)
#define OUTPUTS (ONE_LIST ? COLUMNS / 2 : COLUMNS)
#define STRIPE 16

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

#if BITS < 16
struct Words {
    u32 word[WORDS];
};

__device__ __forceinline__ Words stream_words(const u8* p, unsigned long long policy) {
    Words v;
#if WORDS == 4
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(p), "l"(policy));
#elif WORDS == 2
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;"
                 : "=r"(v.word[0]), "=r"(v.word[1])
                 : "l"(p), "l"(policy));
#else
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.u32 %0, [%1], %2;" : "=r"(v.word[0]) : "l"(p), "l"(policy));
#endif
    return v;
}

__device__ __forceinline__ float half_low(u32 v) {
    float f;
    asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(f) : "r"(v));
    return f;
}

__device__ __forceinline__ float half_high(u32 v) {
    float f;
    asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(f) : "r"(v));
    return f;
}

// The c-th code of a word, exact: at 8 bits q itself, out of 2^23 + q; at 4 bits 1 + q / 16, put into the mantissa.
__device__ __forceinline__ float code(u32 word, int c) {
#if BITS == 8
    return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440u | c)) - 8388608.0f;
#else
    const u32 moved = 4 * c <= 19 ? word << (19 - 4 * c) : word >> (4 * c - 19);
    return __uint_as_float((moved & 0x00780000u) | 0x3f800000u);
#endif
}
#endif

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
    const int column = first_column + (lane % (LANES / 2)) * PER_LANE;
    const Projection& read = group.part[lane % LANES / (LANES / 2)];
#else
    const int column = first_column + (lane % LANES) * PER_LANE;
    const Projection& read = own;
#endif
    if (column >= own.width) n = 0;
    const Stored* weight = read.weight + (BITS == 16 ? column : column * BITS / 8);
    const unsigned long long policy = read_once();
    float total[ROWS][PER_LANE];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int c = 0; c < PER_LANE; c++) total[r][c] = 0.0f;
#if BITS == 16
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

#else
    const u32* scales = own.scales + column / GROUP;
    float common[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) common[r] = 0.0f;
    for (int first = thread / LANES; first < n; first += GROUPS * UNROLL) {
        Words v[UNROLL];
        u32 pair[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int i = first + u * GROUPS;
            pair[u] = 0u;
#pragma unroll
            for (int w = 0; w < WORDS; w++) v[u].word[w] = 0u;
            if (i < n) {
                v[u] = stream_words(weight + list[i] * own.stride, policy);
                pair[u] = __ldg(scales + list[i] * own.groups);
            }
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int i = first + u * GROUPS;
            // At 4 bits a code is 1 + q / 16: 16 scales of it are scale * q and 16 scales too much.
            const float scale = half_low(pair[u]) * (BITS == 4 ? 16.0f : 1.0f);
            const float offset = half_high(pair[u]) - (BITS == 4 ? scale : 0.0f);
            float scaled[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const float value = i < n ? values[i][r] : 0.0f;
                scaled[r] = value * scale;
                common[r] += value * offset;
            }
#pragma unroll
            for (int c = 0; c < PER_LANE; c++) {
                const float q = code(v[u].word[c * BITS / 32], c % (32 / BITS));
#pragma unroll
                for (int r = 0; r < ROWS; r++) total[r][c] += q * scaled[r];
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int c = 0; c < PER_LANE; c++) total[r][c] += common[r];
#endif

    // Warps in shared memory, then blocks: [column block, gate or up, share, row, column].
    float* place = parts + (long long)block * PHASES * shares * (ROWS * COLUMNS);
    float* mine = place + ((PHASES == 2 ? which : 0) * shares + share) * (ROWS * COLUMNS);
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
