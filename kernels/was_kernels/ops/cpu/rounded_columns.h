// Sums of columns whose numbers are rounded to 8 or 4 bits: W = scale * q + offset, with both of a channel's group of outputs.
//
// q goes into float32 as it is; x takes the scales, once for each channel and group, and the offsets are summed aside:
// sum of x W = sum of (x scale) q + sum of x offset. At 4 bits a byte has two outputs, so that sums lie as they come out of
// vectors of bytes: of each 2 LANES outputs first the even ones, then the odd ones.

#pragma once

#include "vectors.h"

struct Packed {
    const uint8_t *columns;  // [d, stride]
    const Float16 *scales;   // [d, groups, 2]: scale and offset
    int64_t stride, groups, group;
};

constexpr int64_t TILE = 32;  // outputs: groups are a multiple of it

// Of the numbers of a tile, the WIDE vectors from the v-th on.
template <int64_t BITS, int64_t WIDE> static inline void load_tile(const uint8_t *tile, int64_t v, Floats *to) {
    const Words words = load_bytes(tile + v * LANES * BITS / 8);
    to[0] = BITS == 8 ? whole(words) : whole_nibble(words);
    if (WIDE == 2) to[1] = whole_nibble(words >> 4);
}

// LANES outputs from ``o``, of sums as add_rounded leaves them.
static inline Floats rounded_sums(const float *sums, int64_t bits, int64_t o) {
    if (bits == 8) return load(sums + o);
    const float *block = sums + o / (2 * LANES) * (2 * LANES);
    return by_turns(load(block), load(block + LANES), o / LANES % 2);
}

static inline int64_t products_bytes(int64_t groups, int64_t rows, int64_t columns) {
    return padded((columns + 1) * rows * padded(2 * groups, LANES), LINE) * 4;
}

// x times scale and offset of the groups of COUNT channels: [ROWS, COUNT, stride]; their sums over channels grow by them.
template <int64_t ROWS, int64_t COUNT>
static inline void scale_inputs(const Packed &from, const int32_t *channels, const float *values, int64_t values_stride,
                                int64_t first, int64_t count, float *products, float *sums, int64_t stride) {
    for (int64_t c = 0; c < COUNT; c++) {
        const Float16 *pairs = from.scales + (channels[c] * from.groups + first) * 2;
        for (int64_t i = 0; i < 2 * count; i += LANES) {
            const Floats numbers = load_some(pairs + i, 2 * count - i);
            for (int64_t r = 0; r < ROWS; r++) {
                const Floats product = numbers * values[r * values_stride + c];
                store(products + (r * COUNT + c) * stride + i, product);
                store(sums + r * stride + i, load(sums + r * stride + i) + product);
            }
        }
    }
}

// Adds the tiles of COUNT columns to the sums [ROWS, sums_stride].
template <int64_t BITS, int64_t ROWS, int64_t COUNT>
static inline void add_tile(const uint8_t *const *column, int64_t at, const float (*scaled)[COUNT], float *sums,
                            int64_t sums_stride) {
    constexpr int64_t WIDE = 8 / BITS;  // vectors from one of bytes
#pragma GCC unroll 8
    for (int64_t v = 0; v < TILE / LANES; v += WIDE) {
        Floats totals[ROWS][WIDE];
#pragma GCC unroll 8
        for (int64_t r = 0; r < ROWS; r++)
#pragma GCC unroll 2
            for (int64_t w = 0; w < WIDE; w++) totals[r][w] = load(sums + r * sums_stride + (v + w) * LANES);
#pragma GCC unroll 8
        for (int64_t c = 0; c < COUNT; c++) {
            Floats numbers[WIDE];
            load_tile<BITS, WIDE>(column[c] + at, v, numbers);
#pragma GCC unroll 8
            for (int64_t r = 0; r < ROWS; r++)
#pragma GCC unroll 2
                for (int64_t w = 0; w < WIDE; w++) totals[r][w] += numbers[w] * scaled[r][c];
        }
#pragma GCC unroll 8
        for (int64_t r = 0; r < ROWS; r++)
#pragma GCC unroll 2
            for (int64_t w = 0; w < WIDE; w++) store(sums + r * sums_stride + (v + w) * LANES, totals[r][w]);
    }
}

// Adds COUNT columns to the sums [ROWS, sums_stride] of the outputs from ``from`` to ``to``, offsets left out.
template <int64_t BITS, int64_t ROWS, int64_t COUNT>
static inline void add_packed(const Packed &weight, const int32_t *channels, int64_t ahead, const float *products,
                              int64_t stride, float *sums, int64_t sums_stride, int64_t from, int64_t to) {
    constexpr int64_t PER_LINE = LINE * 8 / BITS;  // outputs
    const uint8_t *column[COUNT], *next[COUNT];
    for (int64_t c = 0; c < COUNT; c++) {
        column[c] = weight.columns + channels[c] * weight.stride;
        next[c] = weight.columns + channels[c + ahead] * weight.stride;
    }
    const int64_t first = from / weight.group;
    for (int64_t o = from; o < to;) {
        const int64_t g = o / weight.group, end = (g + 1) * weight.group < to ? (g + 1) * weight.group : to;
        float scaled[ROWS][COUNT];
        for (int64_t r = 0; r < ROWS; r++)
            for (int64_t c = 0; c < COUNT; c++) scaled[r][c] = products[(r * COUNT + c) * stride + 2 * (g - first)];
        for (; o + TILE <= end; o += TILE) {
            if ((o - from) % PER_LINE == 0)
#pragma GCC unroll 8
                for (int64_t c = 0; c < COUNT; c++) __builtin_prefetch(next[c] + o * BITS / 8);
            add_tile<BITS, ROWS, COUNT>(column, o * BITS / 8, scaled, sums + o, sums_stride);
        }
        if (o < end) {  // the width's last outputs
            uint8_t rest[COUNT][TILE] = {};
            const uint8_t *rests[COUNT];
            for (int64_t c = 0; c < COUNT; c++) {
                memcpy(rest[c], column[c] + o * BITS / 8, ((end - o) * BITS + 7) / 8);
                rests[c] = rest[c];
            }
            add_tile<BITS, ROWS, COUNT>(rests, 0, scaled, sums + o, sums_stride);
            o = end;
        }
    }
}

// The sums of the listed columns from ``start`` to ``end``, for the outputs from ``from`` to ``to``, both multiples of TILE
// or the width.
template <int64_t BITS, int64_t ROWS, int64_t COLUMNS>
static void add_rounded(const Packed &weight, const int32_t *channels, const float *values, int64_t values_stride,
                        int64_t start, int64_t end, int64_t ahead, float *memory, float *sums, int64_t sums_stride,
                        int64_t from, int64_t to) {
    const int64_t first = from / weight.group, count = (to - 1) / weight.group + 1 - first, stride = padded(2 * count, LANES);
    float *of_offsets = memory + COLUMNS * ROWS * stride;
    memset(of_offsets, 0, ROWS * stride * sizeof(float));
    for (int64_t r = 0; r < ROWS; r++) memset(sums + r * sums_stride + from, 0, padded(to - from, TILE) * sizeof(float));
    int64_t i = start;
    for (; i + COLUMNS <= end; i += COLUMNS) {
        scale_inputs<ROWS, COLUMNS>(weight, channels + i, values + i, values_stride, first, count, memory, of_offsets, stride);
        add_packed<BITS, ROWS, COLUMNS>(weight, channels + i, ahead, memory, stride, sums, sums_stride, from, to);
    }
    for (; i < end; i++) {
        scale_inputs<ROWS, 1>(weight, channels + i, values + i, values_stride, first, count, memory, of_offsets, stride);
        add_packed<BITS, ROWS, 1>(weight, channels + i, ahead, memory, stride, sums, sums_stride, from, to);
    }
    for (int64_t r = 0; r < ROWS; r++)
        for (int64_t o = from; o < to; o += TILE) {
            const float offset = of_offsets[r * stride + 2 * (o / weight.group - first) + 1];
            for (int64_t v = 0; v < TILE; v += LANES) {
                float *total = sums + r * sums_stride + o + v;
                store(total, load(total) + offset);
            }
        }
}

// The numbers of channel ``j`` as the model stores them: y [width].
template <int64_t BITS, class T> static void write_out(const Packed &weight, int64_t j, int64_t width, T *y) {
    constexpr int64_t WIDE = 8 / BITS;
    const uint8_t *column = weight.columns + j * weight.stride;
    for (int64_t o = 0; o < width; o += TILE) {
        const Float16 *pair = weight.scales + (j * weight.groups + o / weight.group) * 2;
        const Floats numbers = load_some(pair, 2);
        const float scale = numbers[0], offset = numbers[1];
        uint8_t tile[TILE] = {};
        const int64_t some = width - o < TILE ? width - o : TILE;
        memcpy(tile, column + o * BITS / 8, (some * BITS + 7) / 8);
        float whole[TILE];
        for (int64_t v = 0; v < TILE / LANES; v += WIDE) {
            Floats found[WIDE];
            load_tile<BITS, WIDE>(tile, v, found);
            for (int64_t w = 0; w < WIDE; w++) store(whole + (v + w) * LANES, found[w]);
        }
        for (int64_t v = 0; v < some; v += LANES)  // a product of 8 and 11 bits is exact: it is rounded once, after the sum
            store_some(y + o + v, rounded_sums(whole, BITS, v) * scale + offset, some - v);
    }
}
