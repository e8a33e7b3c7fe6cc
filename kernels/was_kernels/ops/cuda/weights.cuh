// How weights come out of memory: loads that push nothing else out of the caches, and rounded codes as floats.
// BITS and PER_LANE are macros of the source that includes this, after common.cuh.

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
#define WORDS (PER_LANE * BITS / 32)

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
