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

// One chunk of one key head of one row, for the ``group`` query heads that share it, whose queries are [group, size].
template <class T>
static void attend_chunk(const T *keys, int64_t key_position, const T *values, int64_t value_position,
                         const float *queries, int64_t group, int64_t size, float scaling, const Mask &mask, int64_t row,
                         int64_t first, int64_t count, float *found, int64_t found_stride) {
    constexpr int64_t WIDE = 4;  // vectors of outputs that are kept in registers
    for (int64_t g = 0; g < group; g++) {
        float *out = found + g * found_stride;
        const float *query = queries + g * size;
        float weights[CHUNK];
        float most = -__builtin_inff();
        for (int64_t p = 0; p < count; p++) {
            const T *key = keys + p * key_position;
            Floats product = Floats{};
            for (int64_t i = 0; i < size; i += LANES) product += load(query + i) * load(key + i);
            const float score = sum(product) * scaling;
            weights[p] = mask.data ? masked_score<T>(mask, row, first + p, score) : score;
            most = weights[p] > most ? weights[p] : most;
        }
        for (int64_t p = count; p < padded(count, LANES); p++) weights[p] = -__builtin_inff();
        const float base = most == -__builtin_inff() ? 0.0f : most;
        Floats sums = Floats{};
        for (int64_t p = 0; p < count; p += LANES) {
            const Floats score = load(weights + p);
            const Floats weight = choose(score == all(-__builtin_inff()), Floats{}, exponential(score - base));
            store(weights + p, weight);
            sums += weight;
        }
        for (int64_t i = 0; i < size; i += WIDE * LANES) {
            const int64_t wide = size - i < WIDE * LANES ? (size - i) / LANES : WIDE;
            Floats totals[WIDE] = {};
            if (wide == WIDE)
                for (int64_t p = 0; p < count; p++)
#pragma GCC unroll 4
                    for (int64_t v = 0; v < WIDE; v++)
                        totals[v] += load(values + p * value_position + i + v * LANES) * weights[p];
            else
                for (int64_t p = 0; p < count; p++)
                    for (int64_t v = 0; v < wide; v++)
                        totals[v] += load(values + p * value_position + i + v * LANES) * weights[p];
            for (int64_t v = 0; v < wide; v++) store(out + i + v * LANES, totals[v]);
        }
        out[size] = most;
        out[size + 1] = sum(sums);
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
