// Attention of one new token over a cache of keys and values.
//
// The positions are cut into chunks of a fixed length, whatever the number of threads: a chunk gives the largest score,
// the sum of the exponentials and the weighted sum of values, and the chunks of a head are added in order.

#pragma once

#include "vectors.h"

constexpr int64_t CHUNK = 64;  // positions

struct Cache {
    void *keys;    // [B, key heads, longest, size], each position contiguous
    void *values;  // shaped like keys
    int64_t key_row, key_head, key_position, value_row, value_head, value_position;  // strides in numbers
};

struct Mask {
    const void *data;    // [B or 1, positions], or null: every position is seen
    int64_t row_stride;  // in elements; 0 where all rows share one
    int64_t kind;        // 0: bool, what is true is seen; 1: float32, 2: the model's dtype, added to the scores
};

// What a chunk leaves for one query head: size sums, then the largest score and the sum of exponentials.
static inline int64_t chunk_floats(int64_t size) { return padded(size + 2, LINE / 4); }

template <class T> static inline float masked_score(const Mask &mask, int64_t row, int64_t position, float score) {
    const int64_t at = row * mask.row_stride + position;
    if (mask.kind == 0) return ((const uint8_t *)mask.data)[at] ? score : -__builtin_inff();
    if (mask.kind == 1) return score + ((const float *)mask.data)[at];
    T numbers[LANES] = {((const T *)mask.data)[at]};
    return score + load(numbers)[0];
}

// The largest score and the sum of exponentials of one head's scores, which become these exponentials.
static void weigh(float *scores, int64_t count, float *most_and_sum) {
    float most = -__builtin_inff();
    for (int64_t p = 0; p < count; p++) most = scores[p] > most ? scores[p] : most;
    for (int64_t p = count; p < padded(count, LANES); p++) scores[p] = -__builtin_inff();
    const float base = most == -__builtin_inff() ? 0.0f : most;
    Floats sums = Floats{};
    for (int64_t p = 0; p < count; p += LANES) {
        const Floats score = load(scores + p);
        const Floats weight = choose(score == all(-__builtin_inff()), Floats{}, exponential(score - base));
        store(scores + p, weight);
        sums += weight;
    }
    most_and_sum[0] = most;
    most_and_sum[1] = sum(sums);
}

// The scores of HEADS query heads, CHUNK apart, at AT positions, whose keys are read and widened once.
template <int HEADS, int AT, class T>
static inline void score(const T *keys, int64_t key_position, const float *queries, int64_t size, float scaling,
                         float *scores) {
    Floats products[AT][HEADS] = {};
    for (int64_t i = 0; i < size; i += LANES) {
        Floats query[HEADS];
#pragma GCC unroll 4
        for (int g = 0; g < HEADS; g++) query[g] = load(queries + g * size + i);
#pragma GCC unroll 4
        for (int p = 0; p < AT; p++) {
            const Floats key = load(keys + p * key_position + i);
#pragma GCC unroll 4
            for (int g = 0; g < HEADS; g++) products[p][g] += query[g] * key;
        }
    }
#pragma GCC unroll 4
    for (int p = 0; p < AT; p++)
#pragma GCC unroll 4
        for (int g = 0; g < HEADS; g++) scores[g * CHUNK + p] = sum(products[p][g]) * scaling;
}

// The sums of VECTORS vectors of values for HEADS heads, each value read and widened once.
template <int HEADS, int VECTORS, class T>
static inline void add_values(const T *values, int64_t value_position, int64_t count, const float *weights,
                              float *found, int64_t found_stride) {
    Floats totals[HEADS][VECTORS] = {};
    for (int64_t p = 0; p < count; p++) {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            const Floats value = load(values + p * value_position + v * LANES);
#pragma GCC unroll 4
            for (int g = 0; g < HEADS; g++) totals[g][v] += value * weights[g * CHUNK + p];
        }
    }
#pragma GCC unroll 4
    for (int g = 0; g < HEADS; g++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) store(found + g * found_stride + v * LANES, totals[g][v]);
}

// One chunk of one key head of one row, for HEADS query heads that share it.
template <int HEADS, class T>
static void attend_heads(const T *keys, int64_t key_position, const T *values, int64_t value_position,
                         const float *queries, int64_t size, float scaling, const Mask &mask, int64_t row, int64_t first,
                         int64_t count, float *found, int64_t found_stride) {
    constexpr int AT = HEADS > 2 ? 2 : 4;    // positions at once: as many products as registers hold
    constexpr int WIDE = HEADS > 2 ? 2 : 4;  // vectors of values at once, likewise
    float scores[HEADS * CHUNK];
    int64_t p = 0;
    for (; p + AT <= count; p += AT)
        score<HEADS, AT>(keys + p * key_position, key_position, queries, size, scaling, scores + p);
    for (; p < count; p++)
        score<HEADS, 1>(keys + p * key_position, key_position, queries, size, scaling, scores + p);
    for (int g = 0; g < HEADS; g++) {
        if (mask.data)
            for (p = 0; p < count; p++) scores[g * CHUNK + p] = masked_score<T>(mask, row, first + p, scores[g * CHUNK + p]);
        weigh(scores + g * CHUNK, count, found + g * found_stride + size);
    }
    int64_t i = 0;
    for (; i + WIDE * LANES <= size; i += WIDE * LANES)
        add_values<HEADS, WIDE>(values + i, value_position, count, scores, found + i, found_stride);
    for (; i < size; i += LANES) add_values<HEADS, 1>(values + i, value_position, count, scores, found + i, found_stride);
}

// One chunk of one key head of one row, for the ``group`` query heads that share it, whose queries are [group, size].
template <class T>
static void attend_chunk(const T *keys, int64_t key_position, const T *values, int64_t value_position,
                         const float *queries, int64_t group, int64_t size, float scaling, const Mask &mask, int64_t row,
                         int64_t first, int64_t count, float *found, int64_t found_stride) {
    for (int64_t g = 0; g < group; g += 4) {
        const auto attend = group - g >= 4   ? attend_heads<4, T>
                            : group - g == 3 ? attend_heads<3, T>
                            : group - g == 2 ? attend_heads<2, T>
                                             : attend_heads<1, T>;
        attend(keys, key_position, values, value_position, queries + g * size, size, scaling, mask, row, first, count,
               found + g * found_stride, found_stride);
    }
}

// The output [size] of one query head from its chunks, rounded to T.
template <class T>
static void join_chunks(const float *found, int64_t chunk_stride, int64_t chunks, int64_t size, float *out) {
    float most = -__builtin_inff();
    for (int64_t c = 0; c < chunks; c++) most = found[c * chunk_stride + size] > most ? found[c * chunk_stride + size] : most;
    const float base = most == -__builtin_inff() ? 0.0f : most;
    float total = 0.0f;
    for (int64_t i = 0; i < size; i += LANES) store(out + i, Floats{});
    for (int64_t c = 0; c < chunks; c++) {
        const float *chunk = found + c * chunk_stride;
        const float weight = chunk[size] == -__builtin_inff() ? 0.0f : exponential(all(chunk[size] - base))[0];
        total += chunk[size + 1] * weight;
        for (int64_t i = 0; i < size; i += LANES) store(out + i, load(out + i) + load(chunk + i) * weight);
    }
    for (int64_t i = 0; i < size; i += LANES) store(out + i, rounded(load(out + i) / total, (const T *)nullptr));
}
