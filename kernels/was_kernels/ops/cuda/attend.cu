// Attention of one decoding step: rotate q and k, append k and v to a static cache, attend to all positions so far.
//
// Blocks of one row and key head share its positions, and so do a block's warps; warps are merged in shared memory,
// blocks by the block that arrives last, in a fixed order. When IN_PARTS they are not: the launch that reads the result
// merges them (`merged_attention` in parts.cuh), and makes the sequence one longer. Positions past the end of the
// sequence are never used, so the cache's length costs nothing.
//
// Positions are walked by streams of threads (attend_streams.cuh) or, with MMA, by tiles on tensor cores
// (attend_tiles.cuh), which cost less for each position and more in all.
//
// Compiled by NVRTC with these macros: BF16, HEAD (32, 64, 128 or 256; with MMA 64 or 128), QUERIES (query heads of a key
// head; with MMA at most 8), WARPS, UNROLL (positions of a stream in flight; without MMA only), MIN_BLOCKS (of a
// multiprocessor), NORMED (RMSNorm of each head of q and k first), IN_PARTS, MMA, PDL.

#include "common.cuh"
#include "parts.cuh"
#include "attention.cuh"
#if MMA
#include "mma.cuh"
#include "attend_tiles.cuh"
#else
#include "attend_streams.cuh"
#endif

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
attend(const u16* __restrict__ q,       // [rows, key heads * QUERIES * HEAD], rows `input_stride` apart
       const u16* __restrict__ k,       // [rows, key heads * HEAD], likewise
       const u16* __restrict__ v,       // like k
       const u16* __restrict__ cosines, // [rows or 1, HEAD]
       const u16* __restrict__ sines,   // like cosines
       const u16* __restrict__ q_norm,  // [HEAD], NORMED only
       const u16* __restrict__ k_norm,  // [HEAD], NORMED only
       u16* keys, u16* values,          // [rows, key heads, longest, HEAD], last stride 1
       const u8* __restrict__ mask,     // [rows or 1, longest] or null: positions that may be seen
       long long* length,               // positions in the cache; one more at the end if `advance`
       u16* __restrict__ out,           // [rows, key heads * QUERIES * HEAD]
       float* __restrict__ parts,       // [rows * key heads, splits, QUERIES, PART]
       int* __restrict__ arrived,       // [rows * key heads + 1], zero before and after
       Strides key_strides, Strides value_strides, long long angle_stride, long long mask_stride, long long input_stride,
       float scaling, float epsilon, int key_heads, int longest, int advance) {
    __shared__ float merged[WARPS][QUERIES][PART];
#if !IN_PARTS
    __shared__ int is_last;
#endif
    const int thread = threadIdx.x, row = blockIdx.x / key_heads, head = blockIdx.x % key_heads;
    const long long wide = (long long)row * key_heads + head, of_row = row * input_stride;
    const Attention of = {q + of_row + head * QUERIES * HEAD,
                          k + of_row + head * HEAD,
                          v + of_row + head * HEAD,
                          cosines + row * angle_stride,
                          sines + row * angle_stride,
                          q_norm,
                          k_norm,
                          keys + row * key_strides.batch + head * key_strides.head,
                          values + row * value_strides.batch + head * value_strides.head,
                          mask == nullptr ? nullptr : mask + row * mask_stride,
                          length,
                          key_strides.position,
                          value_strides.position,
                          scaling * 1.4426950408889634f,
                          epsilon,
                          longest};
    const int last = walk(of, merged);
    __syncthreads();
    const int splits = gridDim.y;
    float* place = parts + (long long)blockIdx.x * splits * QUERIES * PART;
    for (int i = thread; i < QUERIES * HEAD; i += THREADS) {
        const int h = i / HEAD, c = i % HEAD;
        float peak = NOTHING, mass = 0.0f, sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) peak = fmaxf(peak, merged[w][h][HEAD]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float take = peak == NOTHING ? 0.0f : exp2f(merged[w][h][HEAD] - peak);
            mass += merged[w][h][HEAD + 1] * take;
            sum += merged[w][h][c] * take;
        }
        if (splits == 1 && !IN_PARTS) {
            out[(wide * QUERIES + h) * HEAD + c] = narrow(mass == 0.0f ? 0.0f : sum / mass);
        } else {
            float* own = place + ((long long)blockIdx.y * QUERIES + h) * PART;
            __stcg(own + c, sum);
            if (c == 0) {
                __stcg(own + HEAD, peak);
                __stcg(own + HEAD + 1, mass);
            }
        }
    }
#if !IN_PARTS
    __syncthreads();
    if (thread == 0) {
        is_last = splits > 1 && arrives_last(arrived + blockIdx.x, splits);
        if (is_last) arrived[blockIdx.x] = 0;
        // Every block has read the length by the time that it gets here.
        if (advance && arrives_last(arrived + gridDim.x, gridDim.x * splits)) {
            arrived[gridDim.x] = 0;
            *length = last + 1;
        }
    }
    __syncthreads();
    if (!is_last) return;
    for (int i = thread; i < QUERIES * HEAD; i += THREADS) {
        const int h = i / HEAD, c = i % HEAD;
        float peak = NOTHING, mass = 0.0f, sum = 0.0f;
        for (int s = 0; s < splits; s++) peak = fmaxf(peak, __ldcg(place + (s * QUERIES + h) * PART + HEAD));
        for (int s = 0; s < splits; s++) {
            const float* own = place + (s * QUERIES + h) * PART;
            const float take = peak == NOTHING ? 0.0f : exp2f(__ldcg(own + HEAD) - peak);
            mass += __ldcg(own + HEAD + 1) * take;
            sum += __ldcg(own + c) * take;
        }
        out[(wide * QUERIES + h) * HEAD + c] = narrow(mass == 0.0f ? 0.0f : sum / mass);
    }
#endif
}
