// Attention that several blocks made a part of each: how the parts lie, and what they come to.
// HEAD, and QUERIES and SPLITS for `merged_attention`, are macros of the source that includes this.

#define PART (HEAD + 2)                     // sums over values, then the peak of the scores, then their mass
#define NOTHING __int_as_float(0xff800000)  // minus infinity

#ifdef SPLITS
#define TAKEN (SPLITS < 16 ? SPLITS : 16)  // parts that are read together

__device__ __forceinline__ float most_of_warp(float v) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, step));
    return v;
}

// Channel `channel` of the output of row `row`, from parts [rows, key heads, SPLITS, QUERIES, PART]. All lanes of a warp
// call this, for channels of one head: each weighs one of its parts for all.
__device__ __forceinline__ float merged_attention(const float* parts, int row, int channel, int channels) {
    const int head = channel / HEAD, key_head = head / QUERIES, key_heads = channels / (HEAD * QUERIES);
    const int lane = threadIdx.x % 32;
    const long long first = ((long long)row * key_heads + key_head) * SPLITS * QUERIES + head % QUERIES;
    const float* own = parts + first * PART;
    float peak = NOTHING, mass = 0.0f, sum = 0.0f;
#pragma unroll 1
    for (int first = 0; first < SPLITS; first += TAKEN) {
        const bool weighs = lane < TAKEN && first + lane < SPLITS;
        const float* end = own + (weighs ? first + lane : 0) * QUERIES * PART + HEAD;
        const float2 weighed = __ldcg(reinterpret_cast<const float2*>(end));  // peak and mass
        float sums[TAKEN];
#pragma unroll
        for (int i = 0; i < TAKEN; i++) {
            const bool there = SPLITS % TAKEN == 0 || first + i < SPLITS;
            sums[i] = __ldcg(own + (there ? first + i : 0) * QUERIES * PART + channel % HEAD);
        }
        const float own_peak = weighs ? weighed.x : NOTHING, top = fmaxf(peak, most_of_warp(own_peak));
        const float keep = top == NOTHING ? 0.0f : exp2f(peak - top), take = top == NOTHING ? 0.0f : exp2f(own_peak - top);
        mass = mass * keep + sum_of_warp(weighs ? weighed.y * take : 0.0f);
        sum *= keep;
        peak = top;
#pragma unroll
        for (int i = 0; i < TAKEN; i++) sum += sums[i] * __shfl_sync(~0u, take, i);
    }
    return rounded(mass == 0.0f ? 0.0f : sum / mass);
}
#endif
