// y[b] = sum over kept j of x[b, j] * W[:, j], for maps of one input: masks, lists of kept channels, sums.
//
// W lies by columns, [d, width]. The kept columns are cut into a fixed number of parts, each summed in float32 in order,
// and the parts in order: so the bits do not depend on the number of threads, which share parts and outputs.

#pragma once

#include "rounded_columns.h"

constexpr int64_t COLUMNS = 8;      // read at once: accumulators are loaded and stored once for all of them
constexpr int64_t MOST_AHEAD = 64;  // columns that a prefetch runs ahead at most
constexpr int64_t MOST_ROWS = 8;    // that one pass over the weights takes

struct Map {
    const void *columns;    // [d, width], one of them ``stride`` numbers (bytes, if they are rounded) after another
    const void *scales;     // those of rounded columns; null: they are as the model's numbers
    const float *cutoffs;   // [d], of the least magnitudes that are kept; null: all are
    const void *bias;       // [width], or null
    const float *scale;     // [width], or null: with constant, what makes scale * y + constant of masked rows
    const float *constant;
    int64_t width, stride;
    int64_t bits, group;    // of an output, and outputs that share a scale
    int64_t list;           // the first map of the group that has the same mask
};

struct Group {
    const Map *maps;
    int64_t count;
    int64_t d;
};

// How many parts a row's kept columns are cut into. Short columns are read faster as a whole than by pieces.
static inline int64_t parts_of(const Map &map) { return map.width * map.bits / 8 >= 8192 ? 1 : 4; }

static inline int64_t groups_of(const Map &map) { return (map.width + map.group - 1) / map.group; }

static inline int64_t part_start(int64_t kept, int64_t part, int64_t parts) {
    const int64_t start = padded((kept * part + parts - 1) / parts, COLUMNS);
    return start < kept ? start : kept;
}

static inline Packed packed(const Map &map) {
    return {(const uint8_t *)map.columns, (const Float16 *)map.scales, map.stride, groups_of(map), map.group};
}

// A list of the channels that any of some rows keeps, with each row's value, zero where that row drops the channel.
struct List {
    int32_t *channels;  // [d + 2 MOST_AHEAD]; those after the last repeat it, so that prefetches need no check
    float *values;      // [rows, stride]
    int64_t stride, kept;
};

static inline int64_t list_bytes(int64_t d, int64_t rows) {
    return padded((d + 2 * MOST_AHEAD) * 4, LINE) + padded(d + LANES, LINE) * rows * 4;
}

static inline List list_at(char *memory, int64_t d) {
    float *values = (float *)(memory + padded((d + 2 * MOST_AHEAD) * 4, LINE));
    return List{(int32_t *)memory, values, padded(d + LANES, LINE), 0};
}

// Lists the kept channels of ``rows`` rows x [rows, d], of ``x_stride`` numbers each; values have ``slots`` >= rows of them.
static inline void make_list(List &list, const float *x, int64_t x_stride, const float *cutoffs, int64_t d, int64_t rows,
                             int64_t slots, const uint8_t *dense) {
    const float *least[MOST_ROWS];  // of each row, or null
    for (int64_t r = 0; r < rows; r++) least[r] = dense && dense[r] ? nullptr : cutoffs;
    for (int64_t r = rows; r < slots; r++) memset(list.values + r * list.stride, 0, list.stride * sizeof(float));
    int64_t kept = 0, j = 0;
#if defined(__AVX512F__)
    __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; j + LANES <= d; j += LANES) {
        __mmask16 keep[MOST_ROWS], any = 0;
        for (int64_t r = 0; r < rows; r++) {
            const __m512 size = _mm512_abs_ps(_mm512_loadu_ps(x + r * x_stride + j));
            keep[r] = least[r] ? _mm512_cmp_ps_mask(size, _mm512_loadu_ps(least[r] + j), _CMP_GE_OQ) : (__mmask16)-1;
            any |= keep[r];
        }
        _mm512_storeu_si512(list.channels + kept, _mm512_maskz_compress_epi32(any, lane));
        for (int64_t r = 0; r < rows; r++) {
            const __m512 value = _mm512_maskz_loadu_ps(keep[r], x + r * x_stride + j);
            _mm512_storeu_ps(list.values + r * list.stride + kept, _mm512_maskz_compress_ps(any, value));
        }
        kept += __builtin_popcount(any);
        lane = _mm512_add_epi32(lane, _mm512_set1_epi32(LANES));
    }
#endif
    for (; j < d; j++) {  // without a branch: half of them would be mispredicted
        bool any = false;
        for (int64_t r = 0; r < rows; r++) {
            const float value = x[r * x_stride + j];
            const bool keep = least[r] == nullptr || __builtin_fabsf(value) >= least[r][j];
            list.values[r * list.stride + kept] = keep ? value : 0.0f;
            any |= keep;
        }
        list.channels[kept] = (int32_t)j;
        kept += any;
    }
    list.kept = kept;
    const int32_t last = kept ? list.channels[kept - 1] : 0;
    for (int64_t i = 0; i < 2 * MOST_AHEAD; i++) list.channels[kept + i] = last;
}

// Adds COUNT columns to the sums [ROWS, sums_stride] of the outputs from ``from`` to ``to``.
template <class T, int64_t ROWS, int64_t COUNT>
static inline void add_columns(const T *columns, int64_t stride, const int32_t *channels, const float *values,
                               int64_t values_stride, int64_t ahead, float *sums, int64_t sums_stride, int64_t from, int64_t to) {
    constexpr int64_t PER_LINE = LINE / (int64_t)sizeof(T) / LANES;  // vectors of outputs in a cache line of weights
    // In registers at once: AVX-512 has 32, and each row takes its value for all of them.
    constexpr int64_t WIDE = VECTOR_BYTES == 64 && PER_LINE > 1 && ROWS > 2 ? 2 : 1;
    const T *column[COUNT], *next[COUNT];
    for (int64_t c = 0; c < COUNT; c++) {
        column[c] = columns + channels[c] * stride;
        next[c] = columns + channels[c + ahead] * stride;
    }
    int64_t o = from;
    for (; o + PER_LINE * LANES <= to; o += PER_LINE * LANES) {
#pragma GCC unroll 8
        for (int64_t c = 0; c < COUNT; c++) __builtin_prefetch(next[c] + o);
#pragma GCC unroll 8
        for (int64_t v = 0; v < PER_LINE; v += WIDE) {
            const int64_t at = o + v * LANES;
            Floats weights[COUNT][WIDE];
#pragma GCC unroll 8
            for (int64_t c = 0; c < COUNT; c++)
#pragma GCC unroll 2
                for (int64_t w = 0; w < WIDE; w++) weights[c][w] = load(column[c] + at + w * LANES);
#pragma GCC unroll 8
            for (int64_t r = 0; r < ROWS; r++) {
                float *total = sums + r * sums_stride + at;
                Floats totals[WIDE];
#pragma GCC unroll 2
                for (int64_t w = 0; w < WIDE; w++) totals[w] = load(total + w * LANES);
#pragma GCC unroll 8
                for (int64_t c = 0; c < COUNT; c++) {
                    const float value = values[r * values_stride + c];
#pragma GCC unroll 2
                    for (int64_t w = 0; w < WIDE; w++) totals[w] += weights[c][w] * value;
                }
#pragma GCC unroll 2
                for (int64_t w = 0; w < WIDE; w++) store(total + w * LANES, totals[w]);
            }
        }
    }
    for (; o < to; o += LANES)
        for (int64_t r = 0; r < ROWS; r++) {
            Floats total = load(sums + r * sums_stride + o);
            for (int64_t c = 0; c < COUNT; c++) total += load_some(column[c] + o, to - o) * values[r * values_stride + c];
            store(sums + r * sums_stride + o, total);
        }
}

// How many columns a prefetch runs ahead, of which so many bytes each are read.
static inline int64_t columns_ahead(int64_t bytes) {
    const int64_t ahead = padded(16384 / (bytes + 1), COLUMNS);
    return ahead < COLUMNS ? COLUMNS : ahead > MOST_AHEAD ? MOST_AHEAD : ahead;
}

// The sums of the listed columns from ``start`` to ``end``, for the outputs from ``from`` to ``to``.
template <class T, int64_t ROWS>
static void add_part(const Map &map, const List &list, int64_t start, int64_t end, float *sums, int64_t sums_stride,
                     int64_t from, int64_t to) {
    const T *columns = (const T *)map.columns;
    for (int64_t r = 0; r < ROWS; r++) memset(sums + r * sums_stride + from, 0, padded(to - from, LANES) * sizeof(float));
    const int64_t ahead = columns_ahead((to - from) * (int64_t)sizeof(T));
    int64_t i = start;
    for (; i + COLUMNS <= end; i += COLUMNS)
        add_columns<T, ROWS, COLUMNS>(columns, map.stride, list.channels + i, list.values + i, list.stride, ahead, sums,
                                      sums_stride, from, to);
    for (; i < end; i++)
        add_columns<T, ROWS, 1>(columns, map.stride, list.channels + i, list.values + i, list.stride, ahead, sums,
                                sums_stride, from, to);
}

// The same of rounded columns.
template <int64_t ROWS>
static void add_rounded_part(const Map &map, const List &list, int64_t start, int64_t end, float *memory, float *sums,
                             int64_t sums_stride, int64_t from, int64_t to) {
    const Packed weight = packed(map);
    const int64_t ahead = columns_ahead((to - from) * map.bits / 8);
    const auto add = map.bits == 8 ? add_rounded<8, ROWS, COLUMNS> : add_rounded<4, ROWS, COLUMNS>;
    add(weight, list.channels, list.values, list.stride, start, end, ahead, memory, sums, sums_stride, from, to);
}

// How outputs lie among the sums of a group: map after map, each with its parts, each with its rows.
static inline int64_t sums_stride(const Map &map) { return padded(map.width, TILE); }

static inline int64_t sums_of(const Map &map, int64_t slots) { return sums_stride(map) * parts_of(map) * slots; }

static inline int64_t sums_of(const Group &group, int64_t slots) {
    int64_t floats = 0;
    for (int64_t m = 0; m < group.count; m++) floats += sums_of(group.maps[m], slots);
    return floats;
}

// What a thread needs for itself in add_share: a list, and after it the scaled inputs of rounded columns.
static inline int64_t own_bytes(const Group &group, int64_t slots) {
    int64_t most = 0;
    for (int64_t m = 0; m < group.count; m++) {
        const int64_t bytes = group.maps[m].scales ? products_bytes(groups_of(group.maps[m]), slots, COLUMNS) : 0;
        most = bytes > most ? bytes : most;
    }
    return list_bytes(group.d, slots) + most;
}

// Thread ``thread`` of ``threads``' share of the sums of a group; all shares are needed before ``total`` reads them.
template <class T, int64_t ROWS>
static void add_share(const Group &group, const float *x, int64_t stride, int64_t rows, const uint8_t *dense,
                      float *sums, char *own, int64_t thread, int64_t threads) {
    constexpr int64_t BLOCK = TILE;
    List list = list_at(own, group.d);
    float *scaled = (float *)(own + list_bytes(group.d, ROWS));
    for (int64_t first = 0; first < group.count; first++) {
        if (group.maps[first].list != first) continue;
        make_list(list, x, stride, group.maps[first].cutoffs, group.d, rows, ROWS, dense);
        float *at = sums;
        for (int64_t m = 0; m < group.count; at += sums_of(group.maps[m], ROWS), m++) {
            const Map &map = group.maps[m];
            if (map.list != first) continue;
            const int64_t parts = parts_of(map), blocks = (map.width + BLOCK - 1) / BLOCK;
            const int64_t begin = parts * blocks * thread / threads, end = parts * blocks * (thread + 1) / threads;
            for (int64_t unit = begin; unit < end;) {
                const int64_t part = unit / blocks, from = unit % blocks;
                const int64_t to = end - unit < blocks - from ? from + end - unit : blocks;
                const int64_t start = part_start(list.kept, part, parts), stop = part_start(list.kept, part + 1, parts);
                const int64_t last = to * BLOCK < map.width ? to * BLOCK : map.width;
                float *of_part = at + part * ROWS * sums_stride(map);
                if (map.scales)
                    add_rounded_part<ROWS>(map, list, start, stop, scaled, of_part, sums_stride(map), from * BLOCK, last);
                else
                    add_part<T, ROWS>(map, list, start, stop, of_part, sums_stride(map), from * BLOCK, last);
                unit += to - from;
            }
        }
    }
}

template <class T>
static inline void add_share(int64_t slots, const Group &group, const float *x, int64_t stride, int64_t rows,
                             const uint8_t *dense, float *sums, char *own, int64_t thread, int64_t threads) {
    if (slots == 1)
        add_share<T, 1>(group, x, stride, rows, dense, sums, own, thread, threads);
    else if (slots == 2)
        add_share<T, 2>(group, x, stride, rows, dense, sums, own, thread, threads);
    else if (slots == 4)
        add_share<T, 4>(group, x, stride, rows, dense, sums, own, thread, threads);
    else
        add_share<T, 8>(group, x, stride, rows, dense, sums, own, thread, threads);
}

static inline int64_t slots_of(int64_t rows) { return rows <= 2 ? rows : rows <= 4 ? 4 : 8; }

static inline Floats sums_at(const Map &map, const float *sums, int64_t o) {
    return map.scales ? rounded_sums(sums, map.bits, o) : load(sums + o);
}

// Row r's outputs from ``o``, LANES of them, of a map whose sums begin at ``sums``: biased or corrected, not yet rounded.
template <class T>
static inline Floats total(const Map &map, const float *sums, int64_t slots, int64_t r, int64_t o, bool dense) {
    const int64_t stride = sums_stride(map), parts = parts_of(map), left = map.width - o;
    Floats value = sums_at(map, sums + r * stride, o);
    for (int64_t part = 1; part < parts; part++) value += sums_at(map, sums + (part * slots + r) * stride, o);
    if (map.scale && !dense) return value * load_some(map.scale + o, left) + load_some(map.constant + o, left);
    return map.bias ? value + load_some((const T *)map.bias + o, left) : value;
}
