// What the CUDA sources need of a GPU, for a C++ compiler: a block's threads are threads of the processor, which meet
// at real barriers; blocks run one after another, in an order that is given. Shared memory is never cleared.

#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

struct Index {
    unsigned x, y, z;
};
static thread_local Index threadIdx, blockIdx;
static Index gridDim;

struct alignas(16) uint4 {
    std::uint32_t x, y, z, w;
};
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return uint4{x, y, z, w}; }

static std::unique_ptr<std::barrier<>> block_meets;
static std::vector<std::unique_ptr<std::barrier<>>> warp_meets;
static std::uint32_t told[32][32];  // by the lanes of each warp

static inline void __syncthreads() { block_meets->arrive_and_wait(); }

template <class Read>
static inline auto among_lanes(std::uint32_t own, Read read) {
    const unsigned warp = threadIdx.x / 32;
    told[warp][threadIdx.x % 32] = own;
    warp_meets[warp]->arrive_and_wait();
    const auto found = read(told[warp], threadIdx.x % 32);
    warp_meets[warp]->arrive_and_wait();
    return found;
}

template <class To, class From>
static inline To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

static inline float __shfl_xor_sync(unsigned, float value, int step) {
    return same_bits<float>(among_lanes(same_bits<std::uint32_t>(value), [=](auto& of, int lane) { return of[lane ^ step]; }));
}

static inline unsigned __ballot_sync(unsigned, bool vote) {
    return among_lanes(vote, [](auto& of, int) {
        unsigned votes = 0;
        for (int lane = 0; lane < 32; lane++) votes |= of[lane] << lane;
        return votes;
    });
}

static inline int __popc(unsigned v) { return __builtin_popcount(v); }
static inline float __uint_as_float(unsigned v) { return same_bits<float>(v); }
static inline float __int_as_float(int v) { return same_bits<float>(v); }
static inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
static inline float emulated_exp(float v) { return std::exp(v); }
#define __expf emulated_exp

static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const std::uint64_t bytes = (std::uint64_t)b << 32 | a;
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
    if ((std::uintptr_t)p % 16) __builtin_trap();
    uint4 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// mma.m16n8k16 by the layout of its operands in PTX's manual; `widened` makes a float of a half.
struct Operands {
    std::uint32_t a[4], b[2];
};
static Operands operands[32][32];

template <class Widened>
static inline void matrix_product(float* sums, const std::uint32_t* a, std::uint32_t b0, std::uint32_t b1, Widened widened) {
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    operands[warp][lane] = Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}};
    warp_meets[warp]->arrive_and_wait();
    for (int c = 0; c < 4; c++) {
        const int row = lane / 4 + 8 * (c / 2), column = 2 * (lane % 4) + c % 2;
        for (int k = 0; k < 16; k++) {
            const std::uint32_t left = operands[warp][row % 8 * 4 + k % 8 / 2].a[row / 8 + 2 * (k / 8)];
            const std::uint32_t right = operands[warp][column * 4 + k % 8 / 2].b[k / 8];
            sums[c] += widened(left >> (16 * (k % 2)) & 0xffff) * widened(right >> (16 * (k % 2)) & 0xffff);
        }
    }
    warp_meets[warp]->arrive_and_wait();
}

#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))

template <class Kernel>
static void run_grid(Kernel kernel, int width, int height, int n_threads, const int* order) {
    gridDim = Index{(unsigned)width, (unsigned)height, 1};
    block_meets = std::make_unique<std::barrier<>>(n_threads);
    warp_meets.clear();
    for (int warp = 0; warp < n_threads / 32; warp++) warp_meets.push_back(std::make_unique<std::barrier<>>(32));
    std::vector<std::thread> threads;
    for (int t = 0; t < n_threads; t++)
        threads.emplace_back([=] {
            threadIdx = Index{(unsigned)t, 0, 0};
            for (int i = 0; i < width * height; i++) {
                blockIdx = Index{(unsigned)(order[i] % width), (unsigned)(order[i] / width), 0};
                kernel();
                __syncthreads();
            }
        });
    for (auto& thread : threads) thread.join();
}
