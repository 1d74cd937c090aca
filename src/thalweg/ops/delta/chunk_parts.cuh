// The small functions of kda_chunks.cu and gdn_chunks.cu.

constexpr int SUB = 16;  // tokens of a sub-block
constexpr float SCALE = 0.08838834764831845f;  // 128^-0.5, of queries

constexpr float LOG2_E = 1.4426950408889634f;
// The decay of a token's channel from what projects to it, with the bias in units of ln 2.
__device__ __forceinline__ float decay(float x, float bias, float rate) {
    const float y = x * LOG2_E + bias;
    return exp2f(-rate * fmaxf(y, __log2f(1.0f + exp2f(fminf(y, 64.0f)))));  // above 64, 1 counts for nothing
}
__device__ __forceinline__ u32 pack_half(float2 x) { return pack_half(x.x, x.y); }
__device__ __forceinline__ float2 times(float2 a, float2 b) { return {a.x * b.x, a.y * b.y}; }

// Sums of v[i] over the lanes of a warp, in lanes i and i + 16.
__device__ __forceinline__ float sum_of_16(float (&v)[16], int lane) {
    halve<8>(v, lane, 8), halve<4>(v, lane, 4), halve<2>(v, lane, 2), halve<1>(v, lane, 1);
    return v[0] + __shfl_xor_sync(~0u, v[0], 16);
}

// Of 2 HALF tokens each, the second half decayed from its beginning, the first to its end or, for queries, which are in
// no pair there, not at all. `store(tile, t, x, y)` takes what becomes of tokens t and t + 8.
template <int HALF, class Store>
__device__ __forceinline__ void decay_halves(const u32 (&k)[SUB], const u32 (&q)[SUB], const float2 (&a)[SUB], u8* k_to,
                                             u8* q_to, Store store) {
    if constexpr (HALF == 8) {
        u32 k_first[8];
        float2 x = {1.0f, 1.0f};
        k_first[7] = k[7];
#pragma unroll
        for (int t = 6; t >= 0; t--) x = times(x, a[t + 1]), k_first[t] = mul_halves(k[t], pack_half(x));
        x = {1.0f, 1.0f};
#pragma unroll
        for (int t = 0; t < 8; t++) {
            x = times(x, a[t + 8]);
            const u32 factor = pack_half(x);
            store(k_to, t, k_first[t], mul_halves(k[t + 8], factor));
            store(q_to, t, q[t], mul_halves(q[t + 8], factor));
        }
    } else {
#pragma unroll
        for (int g = 0; g < 8; g += 2 * HALF) {
            const int middle = g + HALF - 1;
            float2 x = {1.0f, 1.0f}, y = {1.0f, 1.0f};
            store(k_to, middle, k[middle], k[middle + 8]);
            store(q_to, middle, q[middle], q[middle + 8]);
#pragma unroll
            for (int t = middle - 1; t >= g; t--) {
                x = times(x, a[t + 1]), y = times(y, a[t + 9]);
                store(k_to, t, mul_halves(k[t], pack_half(x)), mul_halves(k[t + 8], pack_half(y)));
                store(q_to, t, q[t], q[t + 8]);
            }
            x = y = {1.0f, 1.0f};
#pragma unroll
            for (int t = middle + 1; t < g + 2 * HALF; t++) {
                x = times(x, a[t]), y = times(y, a[t + 8]);
                const u32 one = pack_half(x), other = pack_half(y);
                store(k_to, t, mul_halves(k[t], one), mul_halves(k[t + 8], other));
                store(q_to, t, mul_halves(q[t], one), mul_halves(q[t + 8], other));
            }
        }
    }
}

// Two results of 16 rows and 8 columns as a block.
__device__ __forceinline__ uint4 pack_block(const float (&a)[4], const float (&b)[4]) {
    return make_uint4(pack(a[0], a[1]), pack(a[2], a[3]), pack(b[0], b[1]), pack(b[2], b[3]));
}
__device__ __forceinline__ uint4 pack_block_half(const float (&a)[4], const float (&b)[4]) {
    return make_uint4(pack_half(a[0], a[1]), pack_half(a[2], a[3]), pack_half(b[0], b[1]), pack_half(b[2], b[3]));
}

// Lower triangular matrices of 16 by 16: the pairs {upper left, lower left, lower right} of a lane.
__device__ __forceinline__ void multiply(float (&c)[6], const u32 (&x)[3], const u32 (&y_transposed)[3]) {
    float left[4] = {}, right[4] = {};
    mma_fp16(left, x[0], x[1], 0, x[2], y_transposed[0], y_transposed[1]);
    mma_fp16(right, x[0], x[1], 0, x[2], 0, y_transposed[2]);
#pragma unroll
    for (int e = 0; e < 4; e++) c[e] = left[e];
    c[4] = right[2], c[5] = right[3];
}
__device__ __forceinline__ void pack_blocks(u32 (&to)[3], const float (&x)[6]) {
#pragma unroll
    for (int e = 0; e < 3; e++) to[e] = pack_half(x[2 * e], x[2 * e + 1]);
}
__device__ __forceinline__ void transpose_blocks(u32 (&to)[3], const float (&x)[6]) {
#pragma unroll
    for (int e = 0; e < 3; e++) to[e] = transpose_matrix(pack_half(x[2 * e], x[2 * e + 1]));
}
// Whether this lane's element {0, 1} of an 8 by 8 block pairs tokens of neighbouring halves of `half`.
__device__ __forceinline__ bool pairs(int lane, int e, int half) {
    const int i = lane / 4, j = 2 * (lane % 4) + e;
    return i > j && (i ^ j) >= half && (i ^ j) < 2 * half;
}
