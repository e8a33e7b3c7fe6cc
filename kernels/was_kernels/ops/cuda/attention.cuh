// What both ways to walk a cache share: what is attended to, and a new head's norm and rotation by HEAD / 8 lanes.
// HEAD, QUERIES, WARPS and NORMED are macros of attend.cu, which includes this.

#define THREADS (WARPS * 32)
#define LANES (HEAD / 8)

struct Strides {
    long long batch, head, position;  // elements
};

// One row and key head.
struct Attention {
    const u16 *q, *k, *v;            // [QUERIES, HEAD], [HEAD], [HEAD]: of the new token
    const u16 *cosines, *sines;      // [HEAD]
    const u16 *q_norm, *k_norm;      // [HEAD], NORMED only
    u16 *keys, *values;              // [longest, HEAD], positions `key_stride` and `value_stride` apart
    const u8* seen;                  // [longest] or null
    const long long* length;         // positions before the new one
    long long key_stride, value_stride;
    float to_log2;                   // factor of the scores
    float epsilon;
    int longest;
};

__device__ __forceinline__ void widen_all(const uint4& from, float* into) {
    const u32 word[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int w = 0; w < 4; w++) {
        into[2 * w] = low(word[w]);
        into[2 * w + 1] = high(word[w]);
    }
}

__device__ __forceinline__ void unpack(const u16* from, float* into) {
    widen_all(*reinterpret_cast<const uint4*>(from), into);
}

__device__ __forceinline__ uint4 pack(const float* from) {
    u32 word[4];
#pragma unroll
    for (int w = 0; w < 4; w++) word[w] = (u32)narrow(from[2 * w]) | ((u32)narrow(from[2 * w + 1]) << 16);
    return make_uint4(word[0], word[1], word[2], word[3]);
}

__device__ __forceinline__ float over_stream(float v) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
    return v;
}

// RMSNorm over the head if there is one, then the rotation of halves; all lanes of a warp take part.
__device__ __forceinline__ void prepare(float* x, const u16* norm_weight, float epsilon, const float* cos,
                                        const float* sin, int lane) {
#if NORMED
    float squares = 0.0f, weight[8];
#pragma unroll
    for (int c = 0; c < 8; c++) squares += x[c] * x[c];
    const float scale = rsqrtf(over_stream(squares) / HEAD + epsilon);
    unpack(norm_weight + lane * 8, weight);
#pragma unroll
    for (int c = 0; c < 8; c++) x[c] = rounded(weight[c] * rounded(x[c] * scale));
#endif
#pragma unroll
    for (int c = 0; c < 8; c++) {
        const float other = __shfl_xor_sync(~0u, x[c], LANES / 2);
        x[c] = rounded(x[c] * cos[c] + (lane < LANES / 2 ? -other : other) * sin[c]);
    }
}

// Where the new token goes: positions before it are filled.
__device__ __forceinline__ int new_position(const Attention& of) {
    const int last = (int)*of.length;
    if (last < 0 || last >= of.longest) asm volatile("trap;");  // the cache is full: the next position is another head's
    return last;
}
