// What a thread scores and multiplies: the inputs of its channels in every row, read or merged from parts of attention,
// and normed. A block's share of the channels is every SHARES-th stripe of 32, as neighbours tend to be kept together;
// a thread has one channel of it in each of PASSES passes.
// ROWS, PASSES, THREADS, WARPS, SHARES, NORMED, SPLITS and THERE are macros of gather_gemv.cu, which includes this.

#define STRIPE 32  // channels: those of a warp in a pass

struct Channel {
    int number;
    bool there;  // in the share and in x
};

__device__ __forceinline__ Channel channel_of(int pass, int d_in) {
    const int stripes = (d_in + STRIPE - 1) / STRIPE;
    const int capacity = ((stripes + SHARES - 1) / SHARES) * STRIPE;
    const int place = pass * THREADS + (int)threadIdx.x;
    const int number = ((place / STRIPE) * SHARES + (int)blockIdx.y) * STRIPE + place % STRIPE;
    return {number, place < capacity && number < d_in};
}

// Of [d_in] what belongs to this thread's channels.
__device__ __forceinline__ void read_channels(float (&found)[PASSES], const float* of_channels, int d_in) {
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        const Channel channel = channel_of(pass, d_in);
        found[pass] = channel.there ? of_channels[channel.number] : 0.0f;
    }
}

__device__ __forceinline__ void read_channels(float (&found)[PASSES], const u16* of_channels, int d_in) {
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        const Channel channel = channel_of(pass, d_in);
        found[pass] = channel.there ? widen(of_channels[channel.number]) : 0.0f;
    }
}

// Where inputs come from, and their RMSNorm.
struct Source {
    const u16* x;           // [rows, d_in], rows `stride` apart; unless SPLITS
    const float* attended;  // parts of attention, SPLITS only
    const float* squares;   // [rows, n_squares]: sums of x's squares, NORMED 2 only
    long long stride;
    float epsilon;
    int rows, d_in, n_squares;
};

__device__ __forceinline__ void read_inputs(float (&input)[ROWS][PASSES], const Source& from) {
    const int rows = from.rows;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            const Channel channel = channel_of(pass, from.d_in);
            const bool there = channel.there && THERE(r);
#ifdef SPLITS
            // A warp's channels are a stripe, which is there as a whole and lies in one head: all lanes take part, or none.
            input[r][pass] = 0.0f;
            if (there) input[r][pass] = merged_attention(from.attended, r, channel.number, from.d_in);
#else
            input[r][pass] = there ? widen(from.x[r * from.stride + channel.number]) : 0.0f;
#endif
        }
}

#if NORMED
__device__ __forceinline__ float scale_of_norm(float squares, const Source& from) {
    return rsqrtf(squares / from.d_in + from.epsilon);
}

__device__ __forceinline__ void norm_row(float (&input)[PASSES], const float (&weights)[PASSES], float scale) {
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) input[pass] = rounded(weights[pass] * rounded(input[pass] * scale));
}
#endif

#if NORMED == 1
// The block reads all of x for the sums of its squares.
__device__ __forceinline__ void norm_inputs(float (&input)[ROWS][PASSES], const float (&weights)[PASSES],
                                            const Source& from) {
    __shared__ float squares[ROWS][WARPS];
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, rows = from.rows, d_in = from.d_in;
    for (int r = 0; r < rows; r++) {
        float total = 0.0f;
        for (int first = thread * 8; first < d_in; first += THREADS * 8 * 4) {
            uint4 v[4];
#pragma unroll
            for (int u = 0; u < 4; u++) {
                const int c = first + u * THREADS * 8;
                v[u] = make_uint4(0u, 0u, 0u, 0u);
                if (c < d_in) v[u] = *reinterpret_cast<const uint4*>(from.x + r * from.stride + c);
            }
#pragma unroll
            for (int u = 0; u < 4; u++) {
                const u32 word[4] = {v[u].x, v[u].y, v[u].z, v[u].w};
#pragma unroll
                for (int w = 0; w < 4; w++) total += low(word[w]) * low(word[w]) + high(word[w]) * high(word[w]);
            }
        }
        total = sum_of_warp(total);
        if (lane == 0) squares[r][warp] = total;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += r < rows ? squares[r][w] : 0.0f;
        norm_row(input[r], weights, scale_of_norm(total, from));
    }
}
#elif NORMED == 2 && ROWS <= 2
// Of few rows every warp adds all squares, which costs no meeting of the block. A lane's first ones are asked for
// together with x: later they would be another trip to L2.
__device__ __forceinline__ void read_first_squares(float (&first)[ROWS], const Source& from) {
    const int thread = threadIdx.x, lane = thread % 32, rows = from.rows;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        first[r] = THERE(r) && lane < from.n_squares ? __ldcg(from.squares + r * from.n_squares + lane) : 0.0f;
}

__device__ __forceinline__ void norm_inputs(float (&input)[ROWS][PASSES], const float (&weights)[PASSES],
                                            const float (&first)[ROWS], const Source& from) {
    const int thread = threadIdx.x, lane = thread % 32, rows = from.rows;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float total = first[r];
        if (THERE(r))
            for (int i = lane + 32; i < from.n_squares; i += 32) total += __ldcg(from.squares + r * from.n_squares + i);
        total = sum_of_warp(total);
        norm_row(input[r], weights, THERE(r) ? scale_of_norm(total, from) : 0.0f);
    }
}
#elif NORMED == 2
// A warp adds the squares of every WARPS-th row.
__device__ __forceinline__ void norm_inputs(float (&input)[ROWS][PASSES], const float (&weights)[PASSES],
                                            const Source& from) {
    __shared__ float scales[ROWS];
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, rows = from.rows;
#pragma unroll
    for (int r = warp; r < ROWS; r += WARPS) {
        float total = 0.0f;
        if (THERE(r))
            for (int i = lane; i < from.n_squares; i += 32) total += __ldcg(from.squares + r * from.n_squares + i);
        total = sum_of_warp(total);
        if (lane == 0) scales[r] = THERE(r) ? scale_of_norm(total, from) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS; r++) norm_row(input[r], weights, scales[r]);
}
#endif
