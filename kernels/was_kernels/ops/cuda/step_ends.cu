// What a decoding step does before its first block and after its last one.
//
// Compiled by NVRTC with these macros: BF16, THREADS, PDL.

#include "common.cuh"

__device__ __forceinline__ float squares_of(const uint4& v) {
    const u32 word[4] = {v.x, v.y, v.z, v.w};
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < 4; w++) total += low(word[w]) * low(word[w]) + high(word[w]) * high(word[w]);
    return total;
}

__device__ __forceinline__ float sum_of_block(float v, float* of_warps) {
    v = sum_of_warp(v);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = v;
    __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < THREADS / 32; w++) total += of_warps[w];
    return total;
}

// Embeddings of the new tokens, the angles of their positions, and whether they lie in the dense prefix.
// A block copies a piece of one row; the first piece of a row also makes its angles.
extern "C" __global__ void __launch_bounds__(THREADS)
begin_step(const long long* __restrict__ tokens,     // [rows], `token_stride` apart
           const u16* __restrict__ table,            // [vocabulary, d]
           const long long* __restrict__ positions,  // [rows or 1], `position_stride` apart
           const float* __restrict__ frequencies,    // [head / 2]
           u16* __restrict__ hidden,                 // [rows, d]
           u16* __restrict__ cosines,                // [rows or 1, head]
           u16* __restrict__ sines,                  // like cosines
           u8* __restrict__ dense,                   // [rows] or null
           float* __restrict__ squares,              // [rows, blocks along y]: sums of the embeddings' squares
           long long token_stride, long long position_stride, long long prefix, float scaling, int rows, int vocabulary,
           int d, int half_head, int angle_rows) {
    __shared__ float squares_of_warps[THREADS / 32];
    let_next_start();
    const int row = blockIdx.x, thread = threadIdx.x;
    const long long token = tokens[row * token_stride];
    if (token < 0 || token >= vocabulary) asm volatile("trap;");
    const int first = (blockIdx.y * THREADS + thread) * 8;
    float total = 0.0f;
    if (first < d) {
        const uint4 v = *reinterpret_cast<const uint4*>(table + token * d + first);
        *reinterpret_cast<uint4*>(hidden + (long long)row * d + first) = v;
        total = squares_of(v);
    }
    total = sum_of_block(total, squares_of_warps);
    if (thread == 0) squares[row * gridDim.y + blockIdx.y] = total;
    if (blockIdx.y > 0) return;
    const long long position = positions[row * position_stride];
    if (dense != nullptr && thread == 0) dense[row] = position < prefix;
    if (row >= angle_rows) return;
    for (int i = thread; i < half_head; i += THREADS) {
        const float angle = (float)position * frequencies[i];
        const u16 cosine = narrow(cosf(angle) * scaling), sine = narrow(sinf(angle) * scaling);
        cosines[row * 2 * half_head + i] = cosines[row * 2 * half_head + half_head + i] = cosine;
        sines[row * 2 * half_head + i] = sines[row * 2 * half_head + half_head + i] = sine;
    }
}

// RMSNorm of each row of x [rows, d], d a multiple of 8, as Llama's; one block a row.
extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm(const u16* __restrict__ x, const u16* __restrict__ weight, u16* __restrict__ out, float epsilon, int d) {
    __shared__ float squares[THREADS / 32];
    const int thread = threadIdx.x;
    const u16* own = x + (long long)blockIdx.x * d;
    wait_for_input();
    float total = 0.0f;
    for (int c = thread * 8; c < d; c += THREADS * 8) total += squares_of(*reinterpret_cast<const uint4*>(own + c));
    total = sum_of_block(total, squares);
    const float scale = rsqrtf(total / d + epsilon);
    for (int c = thread; c < d; c += THREADS)
        out[(long long)blockIdx.x * d + c] = narrow(widen(weight[c]) * rounded(widen(own[c]) * scale));
}
