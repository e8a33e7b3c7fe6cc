// What the sums of shares become: with bias, or scale and constant where a row is masked (CORRECTED), SiLU and product
// (GATED) and residual, the launch's results, and sums of their squares for the norm of whoever reads them. Each step is
// rounded as the plain ops round.
// ROWS, COLUMNS, THREADS, SUMS, PARTS, GATED and CORRECTED are macros of gather_gemv.cu, RESULT_PASSES and TOGETHER of
// add_shares.cuh.

#if CORRECTED
#define AFTER(sum, t, f) (sum[t][f] * scale[t][f] + added[t][f])

__device__ __forceinline__ void fetch_line(const float* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Asks for what write_results will need of the block's outputs, which would be a trip to memory at the launch's end.
__device__ __forceinline__ void fetch_corrections(const Projection& own, int first_column) {
    constexpr int LINES = COLUMNS / 32;  // of 128 bytes
    const int line = threadIdx.x % LINES, out = first_column + line * 32;
    if (threadIdx.x < 2 * LINES && out < own.width) fetch_line((threadIdx.x < LINES ? own.scale : own.constant) + out);
}
#else
#define AFTER(sum, t, f) (sum[t][f] + added[t][f])
#endif

struct Output {
    const u16* residual;  // like out or null: added
    long long stride;     // of rows of out
    float* squares;       // [rows, column blocks] or null: sums of the results' squares
    int rows;
    u32 whole;  // rows that are dense, a bit each
};

// Of the outputs from `first_column` on of projection `which`, or of the gated pair; `shares` are those of the outputs,
// and `own` is the block's.
__device__ __forceinline__ void write_results(const Group& group, int which, int block, int first_column, u32* shares,
                                              const float* own, const Output& to) {
    __shared__ __align__(16) float squares[ROWS * COLUMNS / 32];
    const int thread = threadIdx.x, width = group.part[which].width;
    const int first_of_map = PARTS > 1 && !GATED ? (int)(group.part[which].out - group.part[0].out) : 0;  // in a row
    for (int first_pass = 0; first_pass < RESULT_PASSES; first_pass += TOGETHER) {
        float sum[TOGETHER][SUMS], added[TOGETHER][SUMS], beside[TOGETHER];
#if CORRECTED
        float scale[TOGETHER][SUMS];
#endif
#pragma unroll
        for (int t = 0; t < TOGETHER; t++) {
            const int i = (first_pass + t) * THREADS + thread, r = i / COLUMNS, out = first_column + i % COLUMNS;
            const bool there = r < to.rows && out < width;
            beside[t] = there && to.residual != nullptr ? widen(to.residual[r * to.stride + first_of_map + out]) : 0.0f;
#pragma unroll
            for (int f = 0; f < SUMS; f++) {
                const Projection& part = group.part[GATED ? f : which];
                const u16* bias = part.bias;
#if CORRECTED
                const bool masked = there && !((to.whole >> r) & 1u);
                scale[t][f] = masked ? part.scale[out] : 1.0f;
                added[t][f] = masked ? part.constant[out] : there && bias != nullptr ? widen(bias[out]) : 0.0f;
#else
                added[t][f] = there && bias != nullptr ? widen(bias[out]) : 0.0f;
#endif
            }
        }
        add_shares(sum, shares, own, first_pass, to.rows);
#pragma unroll
        for (int t = 0; t < TOGETHER; t++) {
            const int i = (first_pass + t) * THREADS + thread;
            if (i >= ROWS * COLUMNS) break;
            const int r = i / COLUMNS, out = first_column + i % COLUMNS;
            float result = 0.0f;
            if (r < to.rows && out < width) {
                result = rounded(AFTER(sum, t, 0));
#if GATED
                result = rounded(result / (1.0f + __expf(-result))) * rounded(AFTER(sum, t, 1));
#endif
                if (to.residual != nullptr) result = beside[t] + rounded(result);
                result = rounded(result);
                group.part[GATED ? 0 : which].out[r * to.stride + out] = narrow(result);
            }
            if (to.squares != nullptr) {  // a warp's outputs lie in one row
                const float square = sum_of_warp(result * result);
                if (thread % 32 == 0) squares[i / 32] = square;
            }
        }
    }
    if (to.squares == nullptr) return;
    __syncthreads();
    for (int r = thread; r < to.rows; r += THREADS) {
        float total = 0.0f;
        for (int i = 0; i < COLUMNS / 32; i++) total += squares[r * (COLUMNS / 32) + i];
        __stcg(to.squares + r * gridDim.x + block, total);
    }
}
