// What the CUDA sources need of a GPU, for a C++ compiler: a block's threads take turns, each with a stack of its own,
// and the next one goes on where one waits at a barrier. Their order is turned around from block to block, so that a
// read that a missing barrier lets come too early finds a stale value in one of them. Blocks run one after another, in
// an order that is given. Shared memory is never cleared.

//
// C's headers only, and the functions of math.h by hand: C++'s take several times as long to compile as a source does.

#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <ucontext.h>

extern "C" float cosf(float), exp2f(float), expf(float), fabsf(float), fmaxf(float, float), sinf(float), sqrtf(float);

struct Index {
    unsigned x, y, z;
};
static Index threadIdx, blockIdx, gridDim;

struct alignas(8) float2 {
    float x, y;
};

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return uint4{x, y, z, w}; }

struct Turn {
    jmp_buf here;
    ucontext_t start;
    bool begun, ended;
};
static constexpr size_t STACK_BYTES = 1 << 17;
static Turn turns[1024];
static unsigned n_turns, n_ended;
static bool backwards;
static jmp_buf all_ended;

[[noreturn]] static void go_on(unsigned thread) {
    threadIdx = Index{thread, 0, 0};
    if (turns[thread].begun) _longjmp(turns[thread].here, 1);
    turns[thread].begun = true;
    setcontext(&turns[thread].start);
    __builtin_unreachable();
}

static unsigned next_thread() {
    unsigned thread = threadIdx.x;
    do thread = (thread + (backwards ? n_turns - 1 : 1)) % n_turns;
    while (turns[thread].ended);
    return thread;
}

__attribute__((noinline)) static void yield() {
    if (!_setjmp(turns[threadIdx.x].here)) go_on(next_thread());
}

class Barrier {
  public:
    void arrive_and_wait(unsigned expected) {
        const unsigned before = passed;
        if (++arrived == expected) {
            arrived = 0;
            passed++;
        }
        while (passed == before) yield();
    }

  private:
    unsigned arrived = 0, passed = 0;
};
static Barrier block_meets, warp_meets[32];

static uint32_t told[32][32];  // by the lanes of each warp

static inline void __syncthreads() { block_meets.arrive_and_wait(n_turns); }

template <class Read>
static inline auto among_lanes(uint32_t own, Read read) {
    const unsigned warp = threadIdx.x / 32;
    told[warp][threadIdx.x % 32] = own;
    warp_meets[warp].arrive_and_wait(32);
    const auto found = read(told[warp], threadIdx.x % 32);
    warp_meets[warp].arrive_and_wait(32);
    return found;
}

template <class To, class From>
static inline To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

static inline float __shfl_xor_sync(unsigned, float value, int step) {
    return same_bits<float>(among_lanes(same_bits<uint32_t>(value), [=](auto& of, int lane) { return of[lane ^ step]; }));
}

static inline float __shfl_sync(unsigned, float value, int from) {
    return same_bits<float>(among_lanes(same_bits<uint32_t>(value), [=](auto& of, int) { return of[from]; }));
}

static inline unsigned __ballot_sync(unsigned, bool vote) {
    return among_lanes(vote, [](auto& of, int) {
        unsigned votes = 0;
        for (int lane = 0; lane < 32; lane++) votes |= of[lane] << lane;
        return votes;
    });
}

static inline void __syncwarp() { warp_meets[threadIdx.x / 32].arrive_and_wait(32); }

static inline int __popc(unsigned v) { return __builtin_popcount(v); }
static inline float __uint_as_float(unsigned v) { return same_bits<float>(v); }
static inline unsigned __float_as_uint(float v) { return same_bits<unsigned>(v); }
static inline float __int_as_float(int v) { return same_bits<float>(v); }
static inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
static inline float emulated_exp(float v) { return expf(v); }
#define __expf emulated_exp

static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = (uint64_t)b << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) result |= (unsigned)(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
    return result;
}

template <class T>
static inline T __ldcg(const T* p) { return *p; }
template <class T>
static inline T __ldg(const T* p) { return *p; }
template <class T>
static inline void __stcg(T* p, T v) { *p = v; }

// 16 bytes, which a GPU reads at multiples of 16 only.
static inline uint4 aligned_read(const void* p) {
    if ((uintptr_t)p % 16) __builtin_trap();
    uint4 v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

// mma.m16n8k16 by the layout of its operands in PTX's manual; `widened` makes a float of a half.
struct Operands {
    uint32_t a[4], b[2];
};
static Operands operands[32][32];

template <class Widened>
static inline void matrix_product(float* sums, const uint32_t* a, uint32_t b0, uint32_t b1, Widened widened) {
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    operands[warp][lane] = Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}};
    warp_meets[warp].arrive_and_wait(32);
    for (int c = 0; c < 4; c++) {
        const int row = lane / 4 + 8 * (c / 2), column = 2 * (lane % 4) + c % 2;
        for (int k = 0; k < 16; k++) {
            const uint32_t left = operands[warp][row % 8 * 4 + k % 8 / 2].a[row / 8 + 2 * (k / 8)];
            const uint32_t right = operands[warp][column * 4 + k % 8 / 2].b[k / 8];
            sums[c] += widened(left >> (16 * (k % 2)) & 0xffff) * widened(right >> (16 * (k % 2)) & 0xffff);
        }
    }
    warp_meets[warp].arrive_and_wait(32);
}

#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))

static const void* running_kernel;
static const int* block_order;

template <class Kernel>
static void run_thread() {
    for (unsigned i = 0; i < gridDim.x * gridDim.y; i++) {
        blockIdx = Index{block_order[i] % gridDim.x, block_order[i] / gridDim.x, 0};
        backwards = i % 2;
        (*(const Kernel*)running_kernel)();
        __syncthreads();
    }
    turns[threadIdx.x].ended = true;
    if (++n_ended == n_turns) _longjmp(all_ended, 1);
    go_on(next_thread());
}

template <class Kernel>
static void run_grid(Kernel kernel, int width, int height, int n_threads, const int* order) {
    gridDim = Index{(unsigned)width, (unsigned)height, 1};
    running_kernel = &kernel, block_order = order;
    n_turns = n_threads, n_ended = 0;
    char* stacks = (char*)malloc(n_threads * STACK_BYTES);
    for (int i = 0; i < n_threads; i++) {
        Turn& turn = turns[i];
        turn.begun = turn.ended = false;
        getcontext(&turn.start);
        turn.start.uc_stack.ss_sp = stacks + i * STACK_BYTES;
        turn.start.uc_stack.ss_size = STACK_BYTES;
        turn.start.uc_link = nullptr;
        makecontext(&turn.start, run_thread<Kernel>, 0);
    }
    if (!_setjmp(all_ended)) go_on(0);
    free(stacks);
}
