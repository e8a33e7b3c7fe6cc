// What the kernels share: half precision to float32 and back, sums of a warp, and how a kernel meets the one before and
// after. BF16 and PDL are macros of the source that includes this.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

__device__ __forceinline__ float widen(u16 v) {
#if BF16
    return __uint_as_float((u32)v << 16);
#else
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
    return f;
#endif
}

__device__ __forceinline__ u16 narrow(float v) {
    u16 r;
#if BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
#endif
    return r;
}

__device__ __forceinline__ float rounded(float v) { return widen(narrow(v)); }

__device__ __forceinline__ float low(u32 v) {
#if BF16
    return __uint_as_float(v << 16);
#else
    return widen((u16)(v & 0xffffu));
#endif
}

__device__ __forceinline__ float high(u32 v) {
#if BF16
    return __uint_as_float(v & 0xffff0000u);
#else
    return widen((u16)(v >> 16));
#endif
}

// To every lane of the warp.
__device__ __forceinline__ float sum_of_warp(float v) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
    return v;
}

__device__ __forceinline__ void wait_for_input() {
#if PDL
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_start() {
#if PDL
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Counts a block that has written its part; the one that gets total - 1 sees what all others wrote before.
__device__ __forceinline__ bool arrives_last(int* counter, int total) {
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before == total - 1;
}
