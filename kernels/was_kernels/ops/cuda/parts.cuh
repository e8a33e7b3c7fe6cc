// Attention that several blocks made a part of each: how the parts lie, and what they come to.
// HEAD, and QUERIES and SPLITS for `merged_attention`, are macros of the source that includes this.

#define PART (HEAD + 2)                     // sums over values, then the peak of the scores, then their mass
#define NOTHING __int_as_float(0xff800000)  // minus infinity

#ifdef SPLITS
// Channel `channel` of the output of row `row`, from parts [rows, key heads, SPLITS, QUERIES, PART].
__device__ __forceinline__ float merged_attention(const float* parts, int row, int channel, int channels) {
    const int head = channel / HEAD, key_head = head / QUERIES, key_heads = channels / (HEAD * QUERIES);
    const long long first = ((long long)row * key_heads + key_head) * SPLITS * QUERIES + head % QUERIES;
    const float* own = parts + first * PART;
    float sums[SPLITS], peaks[SPLITS], masses[SPLITS];
#pragma unroll
    for (int s = 0; s < SPLITS; s++) {
        peaks[s] = __ldcg(own + s * QUERIES * PART + HEAD);
        masses[s] = __ldcg(own + s * QUERIES * PART + HEAD + 1);
        sums[s] = __ldcg(own + s * QUERIES * PART + channel % HEAD);
    }
    float peak = NOTHING, mass = 0.0f, sum = 0.0f;
#pragma unroll
    for (int s = 0; s < SPLITS; s++) peak = fmaxf(peak, peaks[s]);
#pragma unroll
    for (int s = 0; s < SPLITS; s++) {
        const float take = peak == NOTHING ? 0.0f : exp2f(peaks[s] - peak);
        mass += masses[s] * take;
        sum += sums[s] * take;
    }
    return rounded(mass == 0.0f ? 0.0f : sum / mass);
}
#endif
