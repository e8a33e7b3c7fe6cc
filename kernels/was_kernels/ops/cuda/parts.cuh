// Attention that several blocks made a part of each: how the parts lie, and what they come to.
// HEAD, and QUERIES and SPLITS for `merged_attention`, are macros of the source that includes this.

#define PART (HEAD + 2)                     // sums over values, then the peak of the scores, then their mass
#define NOTHING __int_as_float(0xff800000)  // minus infinity

#ifdef SPLITS
#define AT_ONCE (SPLITS < 16 ? SPLITS : 16)  // parts that are read together

// Channel `channel` of the output of row `row`, from parts [rows, key heads, SPLITS, QUERIES, PART].
__device__ __forceinline__ float merged_attention(const float* parts, int row, int channel, int channels) {
    const int head = channel / HEAD, key_head = head / QUERIES, key_heads = channels / (HEAD * QUERIES);
    const long long first = ((long long)row * key_heads + key_head) * SPLITS * QUERIES + head % QUERIES;
    const float* own = parts + first * PART;
    float peak = NOTHING, mass = 0.0f, sum = 0.0f;
#pragma unroll 1
    for (int first = 0; first < SPLITS; first += AT_ONCE) {
        float sums[AT_ONCE], peaks[AT_ONCE], masses[AT_ONCE], top = peak;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const bool there = SPLITS % AT_ONCE == 0 || first + i < SPLITS;
            const float* part = own + (there ? first + i : 0) * QUERIES * PART;
            peaks[i] = there ? __ldcg(part + HEAD) : NOTHING;
            masses[i] = __ldcg(part + HEAD + 1);
            sums[i] = __ldcg(part + channel % HEAD);
            top = fmaxf(top, peaks[i]);
        }
        const float keep = top == NOTHING ? 0.0f : exp2f(peak - top);
        mass *= keep;
        sum *= keep;
        peak = top;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const float take = top == NOTHING ? 0.0f : exp2f(peaks[i] - top);
            mass += masses[i] * take;
            sum += sums[i] * take;
        }
    }
    return rounded(mass == 0.0f ? 0.0f : sum / mass);
}
#endif
