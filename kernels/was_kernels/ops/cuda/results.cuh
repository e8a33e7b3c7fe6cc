// What the sums of shares become: with bias, SiLU and product (GATED) and residual, the launch's results, and sums of
// their squares for the norm of whoever reads them. Each step is rounded as the plain ops round.
// ROWS, COLUMNS, THREADS, SUMS and GATED are macros of gather_gemv.cu, RESULT_PASSES and TOGETHER of add_shares.cuh.

struct Output {
    const u16* residual;  // like out or null: added
    long long stride;     // of rows of out
    float* squares;       // [rows, column blocks] or null: sums of the results' squares
    int rows;
};

// Of the outputs from `first_column` on of projection `which`, or of the gated pair; `shares` are those of the block.
__device__ __forceinline__ void write_results(const Group& group, int which, int block, int first_column,
                                              const float* shares, const Output& to) {
    __shared__ __align__(16) float squares[ROWS * COLUMNS / 32];
    const int thread = threadIdx.x, width = group.part[which].width;
    for (int first_pass = 0; first_pass < RESULT_PASSES; first_pass += TOGETHER) {
        float sum[TOGETHER][SUMS], added[TOGETHER][SUMS], beside[TOGETHER];
#pragma unroll
        for (int t = 0; t < TOGETHER; t++) {
            const int i = (first_pass + t) * THREADS + thread, r = i / COLUMNS, out = first_column + i % COLUMNS;
            const bool there = r < to.rows && out < width;
            beside[t] = there && to.residual != nullptr ? widen(to.residual[r * to.stride + out]) : 0.0f;
#pragma unroll
            for (int f = 0; f < SUMS; f++) {
                const u16* bias = group.part[GATED ? f : which].bias;
                added[t][f] = there && bias != nullptr ? widen(bias[out]) : 0.0f;
            }
        }
        add_shares(sum, shares, first_pass);
#pragma unroll
        for (int t = 0; t < TOGETHER; t++) {
            const int i = (first_pass + t) * THREADS + thread;
            if (i >= ROWS * COLUMNS) break;
            const int r = i / COLUMNS, out = first_column + i % COLUMNS;
            float result = 0.0f;
            if (r < to.rows && out < width) {
                result = rounded(sum[t][0] + added[t][0]);
#if GATED
                result = rounded(result / (1.0f + __expf(-result))) * rounded(sum[t][1] + added[t][1]);
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
