// Products of small matrices of halves on tensor cores. BF16 is a macro of the source that includes this.

__device__ __forceinline__ u32 low_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ u32 high_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x7632); }

// sums [16, 8] += weights [16, 16] times inputs [16, 8]. Lane 4 g + q holds, of the sums, rows g (twice) and g + 8
// (twice) in columns 2 q and 2 q + 1; of the weights rows g and g + 8 in columns 2 q and 2 q + 1, then both in columns
// 2 q + 8 and 2 q + 9; of the inputs column g in rows 2 q and 2 q + 1, then in rows 2 q + 8 and 2 q + 9.
__device__ __forceinline__ void multiply(float* sums, const u32* weights, u32 input0, u32 input1) {
    asm volatile(
#if BF16
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#else
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#endif
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(input0), "r"(input1));
}
