// Vectors of float32 as wide as the CPU has them, and the numbers that weights and inputs are stored in.
//
// The compiler's own vector types: they are right on every CPU, and as fast as intrinsics on those that have the width.

#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

#if defined(__AVX__)
#include <immintrin.h>
#endif

constexpr int64_t LANES = VECTOR_BYTES / 4;
constexpr int64_t LINE = 64;  // bytes of a cache line; any other value is as right

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Signed __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Shorts __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint8_t Bytes __attribute__((vector_size(VECTOR_BYTES / 4)));

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

static inline Floats all(float value) { return Floats{} + value; }

static inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ---- LANES numbers, and fewer of them

static inline Floats load(const float *from) {
    Floats value;
    memcpy(&value, from, sizeof value);
    return value;
}

static inline Floats load(const BFloat16 *from) {
#if defined(__AVX512F__)  // GCC would widen by halves
    return (Floats)((Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)) << 16);
#elif defined(__AVX2__)
    return (Floats)((Words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)) << 16);
#else
    Shorts value;
    memcpy(&value, from, sizeof value);
    return (Floats)(__builtin_convertvector(value, Words) << 16);
#endif
}

// LANES bytes, each in a word of its own.
static inline Words load_bytes(const uint8_t *from) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif defined(__AVX2__)
    return (Words)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    Bytes value;
    memcpy(&value, from, sizeof value);
    return __builtin_convertvector(value, Words);
#endif
}

static inline Floats whole(Words value) { return __builtin_convertvector((Signed)value, Floats); }

// The lowest four bits.
static inline Floats whole_nibble(Words value) {
#if defined(__AVX512F__)  // one look-up for a mask and a conversion: it takes the lowest four bits of each word
    const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (Floats)_mm512_permutexvar_ps((__m512i)value, table);
#else
    return whole(value & 15u);
#endif
}

// a's and b's numbers by turns: the first LANES of them, or the second.
static inline Floats by_turns(Floats a, Floats b, bool second) {
    Floats value;
    for (int64_t i = 0; i < LANES; i++) value[i] = (i % 2 ? b : a)[(second ? LANES / 2 : 0) + i / 2];
    return value;
}

static inline void store(float *to, Floats value) { memcpy(to, &value, sizeof value); }

static inline Words nearest_bfloat16(Floats value) {  // to even; in the high halves, the low ones hold anything
    const Words bits = (Words)value;
    const Words up = bits + 0x7fffu + ((bits >> 16) & 1u);
    const Words is_nan = (Words)((bits & 0x7fffffffu) > 0x7f800000u);
    return (up & ~is_nan) | ((bits | 0x400000u) & is_nan);
}

static inline void store(BFloat16 *to, Floats value) {
    const Shorts bits = __builtin_convertvector(nearest_bfloat16(value) >> 16, Shorts);
    memcpy(to, &bits, sizeof bits);
}

static inline Floats rounded(Floats value, const float *) { return value; }

static inline Floats rounded(Floats value, const BFloat16 *) { return (Floats)(nearest_bfloat16(value) & 0xffff0000u); }

#if defined(__AVX512F__)
static inline Floats load(const Float16 *from) {
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}
static inline void store(Float16 *to, Floats value) {
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX__) && defined(__F16C__)
static inline Floats load(const Float16 *from) { return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)); }
static inline void store(Float16 *to, Floats value) {
    _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__FLT16_MANT_DIG__)
static inline Floats load(const Float16 *from) {
    _Float16 numbers[LANES];
    memcpy(numbers, from, sizeof numbers);
    Floats value;
    for (int64_t i = 0; i < LANES; i++) value[i] = (float)numbers[i];
    return value;
}
static inline void store(Float16 *to, Floats value) {
    _Float16 numbers[LANES];
    for (int64_t i = 0; i < LANES; i++) numbers[i] = (_Float16)value[i];
    memcpy(to, numbers, sizeof numbers);
}
#else
#define NO_FLOAT16  // weights of that type are then refused by the compiler, and another product takes them
static inline Floats load(const Float16 *from) {
    Shorts value;
    memcpy(&value, from, sizeof value);
    const Words bits = __builtin_convertvector(value, Words), size = bits & 0x7fffu;
    const Words special = (Words)(size > 0x7bffu) & 0x7f800000u;  // infinities and NaN, which the product misses
    return (Floats)((Words)((Floats)(size << 13) * 0x1p112f) | special | (bits & 0x8000u) << 16);
}
#endif

#ifndef NO_FLOAT16
static inline Floats rounded(Floats value, const Float16 *) {
    Float16 numbers[LANES];
    store(numbers, value);
    return load(numbers);
}
#endif

template <class T> static inline Floats load_some(const T *from, int64_t count) {
    if (count >= LANES) return load(from);
    T numbers[LANES];
    memset(numbers, 0, sizeof numbers);
    memcpy(numbers, from, count * sizeof(T));
    return load(numbers);
}

template <class T> static inline void store_some(T *to, Floats value, int64_t count) {
    if (count >= LANES) {
        store(to, value);
        return;
    }
    T numbers[LANES];
    store(numbers, value);
    memcpy(to, numbers, count * sizeof(T));
}

// ---- functions of them

static inline Floats choose(Signed which, Floats yes, Floats no) {
    return (Floats)(((Signed)yes & which) | ((Signed)no & ~which));
}

static inline Floats absolute(Floats value) { return (Floats)((Words)value & 0x7fffffffu); }

// The sum of the lanes, in one order on a CPU.
static inline float sum(Floats value) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)value);
#elif defined(__AVX__)
    __m128 part = _mm_add_ps(_mm256_castps256_ps128((__m256)value), _mm256_extractf128_ps((__m256)value, 1));
    part = _mm_add_ps(part, _mm_movehl_ps(part, part));
    return _mm_cvtss_f32(_mm_add_ss(part, _mm_movehdup_ps(part)));
#endif
    float numbers[LANES];
    store(numbers, value);
    for (int64_t half = LANES / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; i++) numbers[i] += numbers[i + half];
    return numbers[0];
}

// exp to about two units in the last place: the polynomial of Cephes' expf; what overflows is 2^127.9, as little as e^-87.3.
static inline Floats exponential(Floats x) {
    x = choose(x > all(88.3f), all(88.3f), x);
    x = choose(x < all(-87.3f), all(-87.3f), x);
    const Floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: what is added is rounded to whole numbers
    const Floats whole = shifted - 12582912.0f;
    const Floats rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Floats p = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    p = p * rest * rest + rest + 1.0f;
    return p * (Floats)(((Signed)shifted - 0x4b400000 + 127) << 23);
}

static inline Floats silu(Floats x) { return x / (1.0f + exponential(-x)); }
