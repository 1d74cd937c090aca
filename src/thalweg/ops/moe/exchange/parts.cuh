// What a rank gives for a token: a row, or with WEIGHTED the sum of PARTS rows times their weights, in fp32 if WIDE. Rows
// whose weight is 0 are left out and not read: with many ranks these are most.

__device__ __forceinline__ void add(float (&sum)[8], uint4 v) {
    sum[0] += low(v.x), sum[1] += high(v.x), sum[2] += low(v.y), sum[3] += high(v.y);
    sum[4] += low(v.z), sum[5] += high(v.z), sum[6] += low(v.w), sum[7] += high(v.w);
}
__device__ __forceinline__ uint4 narrow(const float (&x)[8]) {
    return make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
}

__device__ __forceinline__ void take_fp32(float (&x)[8], const uint4& a, const uint4& b) {
    const u32 words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = __uint_as_float(words[i]);
}

// What this rank gives for a token, numbered over all ranks.
__device__ __forceinline__ uint4 part_of(const u8* parts, const float* weights, long long token, int column) {
    if (!WEIGHTED) return load16(parts + (token * D + column) * 2);
    float weight[PARTS], sum[8] = {};
    uint4 raw[PARTS][1 + WIDE] = {};
#pragma unroll
    for (int j = 0; j < PARTS; j++) weight[j] = load_fp32(weights + token * PARTS + j);
#pragma unroll
    for (int j = 0; j < PARTS; j++) {
        const u8* at = parts + ((token * PARTS + j) * D + column) * (2 + 2 * WIDE);
#pragma unroll
        for (int h = 0; h <= WIDE; h++)
            if (weight[j] != 0.0f) raw[j][h] = load16(at + 16 * h);
    }
#pragma unroll
    for (int j = 0; j < PARTS; j++) {
        float part[8] = {};
        if (WIDE) take_fp32(part, raw[j][0], raw[j][WIDE]);
        else add(part, raw[j][0]);
#pragma unroll
        for (int i = 0; i < 8; i++) sum[i] += weight[j] * part[i];
    }
    return narrow(sum);
}
