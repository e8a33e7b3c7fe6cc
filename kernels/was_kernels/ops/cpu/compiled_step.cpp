// One-token steps of a decoder on a CPU, and the products with kept columns alone, as plain C functions.
//
// Compiled on the machine that runs it (host_compiler.py) with NUMBER the type that the model is stored in; no header of
// torch, and the OpenMP runtime is the one that torch has loaded. Numbers between operations are rounded to the model's dtype where torch's tensors would be.

#include <stdlib.h>

#include "attend.h"
#include "kept_columns.h"
#include "threads.h"

struct Block {
    const void *input_norm, *output_norm;  // weights [hidden]
    const void *query_norm, *key_norm;     // [size], or null
    float input_epsilon, output_epsilon, query_epsilon, key_epsilon;
    Group qkv, out, gate_up, down;
};

struct Model {
    const Block *blocks;
    const void *norm;
    int64_t count, hidden, inner, heads, key_heads, size;
    float epsilon, scaling;
};

struct Step {
    const void *x;         // embedded tokens [B, hidden]
    void *y;               // [B, hidden]
    const void *cosines;   // [B or 1, size]
    const void *sines;     // likewise, those of the first half negative
    const Cache *caches;   // one for each block
    const uint8_t *dense;  // [B], or null: rows that keep every channel and are not corrected
    int64_t rows, angle_stride, position;
    Mask mask;
};

template <class T> static void widen(const T *from, float *to, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(to + i, load(from + i));
    for (; i < n; i++) store_some(to + i, load_some(from + i, 1), 1);
}

// Llama's RMSNorm of x [n]: rounded before the weight and after.
template <class T> static void rms_norm(const float *x, const T *weight, float epsilon, int64_t n, float *y) {
    Floats squares = Floats{};
    for (int64_t i = 0; i < n; i += LANES) {
        const Floats value = load_some(x + i, n - i);
        squares += value * value;
    }
    const float factor = 1.0f / __builtin_sqrtf(sum(squares) / (float)n + epsilon);
    for (int64_t i = 0; i < n; i += LANES) {
        const Floats value = rounded(load_some(x + i, n - i) * factor, weight);
        store_some(y + i, rounded(value * load_some(weight + i, n - i), weight), n - i);
    }
}

static inline int64_t share(int64_t n, int64_t thread, int64_t threads) { return n * thread / threads; }

// ---- products alone

template <class T>
static int products(const Group &group, const T *x, const uint8_t *dense, int64_t rows, T *y, int64_t threads) {
    const int64_t slots = slots_of(rows < MOST_ROWS ? rows : MOST_ROWS), d = padded(group.d, LANES);
    const int64_t of_own = own_bytes(group, slots), of_x = padded(slots * d * 4, LINE);
    const int64_t of_sums = sums_of(group, slots) * 4;
    char *memory = (char *)aligned_alloc(LINE, of_sums + threads * (of_x + of_own));
    if (memory == nullptr) return 1;
    float *sums = (float *)memory;
    int64_t width = 0;
    for (int64_t m = 0; m < group.count; m++) width += group.maps[m].width;
    in_threads(threads, [&](int64_t thread, int64_t used) {
        char *own = memory + of_sums + thread * (of_x + of_own);
        float *wide = (float *)own;
        for (int64_t first = 0; first < rows; first += MOST_ROWS) {
            const int64_t some = rows - first < MOST_ROWS ? rows - first : MOST_ROWS;
            const uint8_t *flags = dense ? dense + first : nullptr;
            for (int64_t r = 0; r < some; r++) widen(x + (first + r) * group.d, wide + r * d, group.d);
            if (first > 0) wait_for_all();
            add_share<T>(slots, group, wide, d, some, flags, sums, own + of_x, thread, used);
            wait_for_all();
            const float *at = sums;
            int64_t beside = 0;
            for (int64_t m = 0; m < group.count; m++) {
                const Map &map = group.maps[m];
                const int64_t blocks = (map.width + LANES - 1) / LANES;
                for (int64_t r = 0; r < some; r++)
                    for (int64_t b = share(blocks, thread, used); b < share(blocks, thread + 1, used); b++)
                        store_some(y + (first + r) * width + beside + b * LANES,
                                   total<T>(map, at, slots, r, b * LANES, flags && flags[r]), map.width - b * LANES);
                at += sums_of(map, slots);
                beside += map.width;
            }
        }
    });
    free(memory);
    return 0;
}

// ---- the dense product with a weight [width, d] by rows, as a model's head has it

// The outputs from ``from`` to ``to`` of ROWS rows x [ROWS, stride] in float32; the weight is read in one go.
template <class T, int64_t ROWS>
static void dense_rows(const T *weight, int64_t weight_stride, const float *x, int64_t stride, int64_t d, T *y,
                       int64_t width, int64_t from, int64_t to) {
    constexpr int64_t CHAINS = 4;  // of sums: one would wait for itself
    for (int64_t o = from; o < to; o++) {
        const T *row = weight + o * weight_stride;
        Floats totals[ROWS][CHAINS] = {};
        int64_t i = 0;
        for (; i + CHAINS * LANES <= d; i += CHAINS * LANES) {
#pragma GCC unroll 4
            for (int64_t c = 0; c < CHAINS; c++) {
                const Floats weights = load(row + i + c * LANES);
#pragma GCC unroll 4
                for (int64_t r = 0; r < ROWS; r++) totals[r][c] += weights * load(x + r * stride + i + c * LANES);
            }
        }
        for (; i < d; i += LANES) {
            const Floats weights = load_some(row + i, d - i);
#pragma GCC unroll 4
            for (int64_t r = 0; r < ROWS; r++) totals[r][0] += weights * load_some(x + r * stride + i, d - i);
        }
#pragma GCC unroll 4
        for (int64_t r = 0; r < ROWS; r++) {
            const Floats total = (totals[r][0] + totals[r][1]) + (totals[r][2] + totals[r][3]);
            store_some(y + r * width + o, all(sum(total)), 1);
        }
    }
}

template <class T>
static int dense(const T *weight, int64_t weight_stride, const T *x, int64_t rows, int64_t d, T *y, int64_t width,
                 int64_t threads) {
    const int64_t floats = padded(4 * padded(d, LANES), LINE);
    float *memory = (float *)aligned_alloc(LINE, threads * floats * 4);
    if (memory == nullptr) return 1;
    in_threads(threads, [&](int64_t thread, int64_t used) {
        const int64_t blocks = (width + LANES - 1) / LANES, last = share(blocks, thread + 1, used) * LANES;
        const int64_t from = share(blocks, thread, used) * LANES, to = last < width ? last : width;
        float *wide = memory + thread * floats;
        const int64_t stride = padded(d, LANES);
        for (int64_t r = 0; r < rows;) {
            const int64_t some = rows - r >= 4 ? 4 : rows - r >= 2 ? 2 : 1;
            for (int64_t i = 0; i < some; i++) widen(x + (r + i) * d, wide + i * stride, d);
            if (some == 4)
                dense_rows<T, 4>(weight, weight_stride, wide, stride, d, y + r * width, width, from, to);
            else if (some == 2)
                dense_rows<T, 2>(weight, weight_stride, wide, stride, d, y + r * width, width, from, to);
            else
                dense_rows<T, 1>(weight, weight_stride, wide, stride, d, y + r * width, width, from, to);
            r += some;
        }
    });
    free(memory);
    return 0;
}

// ---- steps of a decoder

struct Memory {
    float *x, *queries, *attended, *active, *sums, *chunks;
    char *own;
    int64_t own_bytes, of_normed;
};

// The most of what ``size`` says of a group.
static int64_t most_of(const Model &model, int64_t slots, int64_t (*size)(const Group &, int64_t)) {
    int64_t most = 0;
    for (int64_t b = 0; b < model.count; b++) {
        const Block &block = model.blocks[b];
        const Group *groups[] = {&block.qkv, &block.out, &block.gate_up, &block.down};
        for (const Group *group : groups) {
            const int64_t found = size(*group, slots);
            most = found > most ? found : most;
        }
    }
    return most;
}

// Adds the share of a map's outputs to x [rows, hidden].
template <class T>
static void add_to(float *x, int64_t hidden, const Group &group, const float *sums, int64_t slots, const Step &step,
                   int64_t thread, int64_t threads) {
    const int64_t blocks = (hidden + LANES - 1) / LANES;
    for (int64_t r = 0; r < step.rows; r++)
        for (int64_t b = share(blocks, thread, threads); b < share(blocks, thread + 1, threads); b++) {
            const int64_t o = b * LANES;
            const Floats more = rounded(total<T>(group.maps[0], sums, slots, r, o, step.dense && step.dense[r]), (T *)nullptr);
            store_some(x + r * hidden + o, rounded(load_some(x + r * hidden + o, hidden - o) + more, (T *)nullptr), hidden - o);
        }
}

// Head ``h`` of q, k and v of row r: biased, normed and turned; queries are kept in float32, keys and values cached.
template <class T>
static void finish_head(const Model &model, const Block &block, const Cache &cache, const Step &step, const float *sums,
                        int64_t slots, int64_t r, int64_t h, float *queries) {
    const int64_t size = model.size, half = size / 2;
    const int64_t which = h < model.heads ? 0 : h < model.heads + model.key_heads ? 1 : 2;
    const int64_t head = which == 0 ? h : which == 1 ? h - model.heads : h - model.heads - model.key_heads;
    for (int64_t m = 0; m < which; m++) sums += sums_of(block.qkv.maps[m], slots);
    float numbers[size], turned[size];
    for (int64_t i = 0; i < size; i += LANES) {
        const Floats value = total<T>(block.qkv.maps[which], sums, slots, r, head * size + i, step.dense && step.dense[r]);
        store(numbers + i, rounded(value, (T *)nullptr));
    }
    const void *norm = which == 0 ? block.query_norm : block.key_norm;
    if (which < 2 && norm != nullptr)
        rms_norm(numbers, (const T *)norm, which == 0 ? block.query_epsilon : block.key_epsilon, size, numbers);
    if (which == 2) {
        T *to = (T *)cache.values + r * cache.value_row + head * cache.value_head + step.position * cache.value_position;
        for (int64_t i = 0; i < size; i += LANES) store(to + i, load(numbers + i));
        return;
    }
    const T *cosines = (const T *)step.cosines + r * step.angle_stride, *sines = (const T *)step.sines + r * step.angle_stride;
    for (int64_t i = 0; i < size; i++) turned[i] = numbers[i < half ? i + half : i - half];
    float *to = which == 0 ? queries + (r * model.heads + head) * size : numbers;
    for (int64_t i = 0; i < size; i += LANES) {
        const Floats value = load(numbers + i) * load(cosines + i) + load(turned + i) * load(sines + i);
        store(to + i, rounded(value, (T *)nullptr));
    }
    if (which == 0) return;
    T *key = (T *)cache.keys + r * cache.key_row + head * cache.key_head + step.position * cache.key_position;
    for (int64_t i = 0; i < size; i += LANES) store(key + i, load(numbers + i));
}

template <class T>
static void run_block(const Model &model, const Block &block, const Cache &cache, const Step &step, const Memory &memory,
                      int64_t slots, int64_t thread, int64_t threads) {
    const int64_t hidden = model.hidden, size = model.size, rows = step.rows, group = model.heads / model.key_heads;
    const int64_t hidden_stride = padded(hidden, LANES), inner_stride = padded(model.inner, LANES);
    const int64_t wide = model.heads * size;
    float *normed = (float *)(memory.own + thread * memory.own_bytes);
    char *own = memory.own + thread * memory.own_bytes + memory.of_normed;

    for (int64_t r = 0; r < rows; r++)
        rms_norm(memory.x + r * hidden, (const T *)block.input_norm, block.input_epsilon, hidden, normed + r * hidden_stride);
    add_share<T>(slots, block.qkv, normed, hidden_stride, rows, step.dense, memory.sums, own, thread, threads);
    wait_for_all();
    const int64_t heads = model.heads + 2 * model.key_heads;
    for (int64_t i = share(rows * heads, thread, threads); i < share(rows * heads, thread + 1, threads); i++)
        finish_head<T>(model, block, cache, step, memory.sums, slots, i / heads, i % heads, memory.queries);
    wait_for_all();
    const int64_t length = step.position + 1, chunks = (length + CHUNK - 1) / CHUNK, stride = chunk_floats(size);
    const int64_t pieces = rows * model.key_heads * chunks;
    for (int64_t i = share(pieces, thread, threads); i < share(pieces, thread + 1, threads); i++) {
        const int64_t r = i / (model.key_heads * chunks), h = i / chunks % model.key_heads, c = i % chunks;
        const int64_t first = c * CHUNK, count = length - first < CHUNK ? length - first : CHUNK;
        attend_chunk<T>((const T *)cache.keys + r * cache.key_row + h * cache.key_head + first * cache.key_position,
                        cache.key_position,
                        (const T *)cache.values + r * cache.value_row + h * cache.value_head + first * cache.value_position,
                        cache.value_position, memory.queries + (r * model.heads + h * group) * size, group, size,
                        model.scaling, step.mask, r, first, count,
                        memory.chunks + ((r * model.heads + h * group) * chunks + c) * stride, chunks * stride);
    }
    wait_for_all();
    for (int64_t i = share(rows * model.heads, thread, threads); i < share(rows * model.heads, thread + 1, threads); i++)
        join_chunks<T>(memory.chunks + i * chunks * stride, stride, chunks, size, memory.attended + i * size);
    wait_for_all();
    add_share<T>(slots, block.out, memory.attended, wide, rows, step.dense, memory.sums, own, thread, threads);
    wait_for_all();
    add_to<T>(memory.x, hidden, block.out, memory.sums, slots, step, thread, threads);
    wait_for_all();
    for (int64_t r = 0; r < rows; r++)
        rms_norm(memory.x + r * hidden, (const T *)block.output_norm, block.output_epsilon, hidden, normed + r * hidden_stride);
    add_share<T>(slots, block.gate_up, normed, hidden_stride, rows, step.dense, memory.sums, own, thread, threads);
    wait_for_all();
    const float *up_sums = memory.sums + sums_of(block.gate_up.maps[0], slots);
    const int64_t blocks = inner_stride / LANES;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t b = share(blocks, thread, threads); b < share(blocks, thread + 1, threads); b++) {
            const bool dense = step.dense && step.dense[r];
            const Floats gate = rounded(total<T>(block.gate_up.maps[0], memory.sums, slots, r, b * LANES, dense), (T *)nullptr);
            const Floats up = rounded(total<T>(block.gate_up.maps[1], up_sums, slots, r, b * LANES, dense), (T *)nullptr);
            store(memory.active + r * inner_stride + b * LANES, rounded(rounded(silu(gate), (T *)nullptr) * up, (T *)nullptr));
        }
    wait_for_all();
    add_share<T>(slots, block.down, memory.active, inner_stride, rows, step.dense, memory.sums, own, thread, threads);
    wait_for_all();
    add_to<T>(memory.x, hidden, block.down, memory.sums, slots, step, thread, threads);
    wait_for_all();
}

template <class T> static int decode(const Model &model, const Step &step, int64_t threads) {
    const int64_t rows = step.rows, slots = slots_of(rows), hidden = model.hidden, wide = model.heads * model.size;
    const int64_t chunks = (step.position + CHUNK) / CHUNK;
    Memory memory;
    memory.of_normed = padded(rows * padded(hidden, LANES) * 4, LINE);
    memory.own_bytes = memory.of_normed + most_of(model, slots, own_bytes);
    const int64_t of_x = padded(rows * hidden, LINE), of_heads = padded(rows * wide, LINE);
    const int64_t of_active = padded(rows * padded(model.inner, LANES), LINE), of_sums = most_of(model, slots, sums_of);
    const int64_t of_chunks = rows * model.heads * chunks * chunk_floats(model.size);
    const int64_t floats = of_x + 2 * of_heads + of_active + of_sums + of_chunks;
    char *space = (char *)aligned_alloc(LINE, padded(floats * 4, LINE) + threads * memory.own_bytes);
    if (space == nullptr) return 1;
    memory.x = (float *)space;
    memory.queries = memory.x + of_x;
    memory.attended = memory.queries + of_heads;
    memory.active = memory.attended + of_heads;
    memory.sums = memory.active + of_active;
    memory.chunks = memory.sums + of_sums;
    memory.own = space + padded(floats * 4, LINE);
    widen((const T *)step.x, memory.x, rows * hidden);
    in_threads(threads, [&](int64_t thread, int64_t used) {
        for (int64_t b = 0; b < model.count; b++)
            run_block<T>(model, model.blocks[b], step.caches[b], step, memory, slots, thread, used);
        float *normed = (float *)(memory.own + thread * memory.own_bytes);
        for (int64_t r = thread; r < rows; r += used) {
            rms_norm(memory.x + r * hidden, (const T *)model.norm, model.epsilon, hidden, normed);
            for (int64_t i = 0; i < hidden; i += LANES)
                store_some((T *)step.y + r * hidden + i, load_some(normed + i, hidden - i), hidden - i);
        }
    });
    free(space);
    return 0;
}

// ---- what is called from outside; what is given back is 0, or 1 where memory is lacking

extern "C" {

// Numbers in a vector: heads of a step must be a multiple of it long.
int was_lanes() { return (int)LANES; }

// The OpenMP runtime that runs the threads: the address of a function of it.
void *was_openmp() { return (void *)&GOMP_parallel; }

// y [rows, sum of widths] of x [rows, d], both contiguous; ``dense`` [rows] or null flags rows that keep every channel.
int was_products(const Group *group, const void *x, const uint8_t *dense, int64_t rows, void *y, int64_t threads) {
    return products(*group, (const NUMBER *)x, dense, rows, (NUMBER *)y, threads);
}

// y [rows, width] of x [rows, d], both contiguous, and a weight [width, d] whose rows are ``stride`` numbers apart.
int was_dense(const void *weight, int64_t stride, const void *x, int64_t rows, int64_t d, void *y, int64_t width,
              int64_t threads) {
    return dense((const NUMBER *)weight, stride, (const NUMBER *)x, rows, d, (NUMBER *)y, width, threads);
}

// y [d, width], contiguous: the numbers that a map's rounded columns stand for.
void was_write_out(const Map *map, int64_t d, void *y, int64_t threads) {
    const Packed weight = packed(*map);
    in_threads(threads, [&](int64_t thread, int64_t used) {
        for (int64_t j = share(d, thread, used); j < share(d, thread + 1, used); j++) {
            NUMBER *to = (NUMBER *)y + j * map->width;
            map->bits == 8 ? write_out<8>(weight, j, map->width, to) : write_out<4>(weight, j, map->width, to);
        }
    });
}

// A step of up to MOST_ROWS rows.
int was_decode(const Model *model, const Step *step, int64_t threads) { return decode<NUMBER>(*model, *step, threads); }
}
