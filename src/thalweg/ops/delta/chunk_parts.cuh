// The small functions of chunks.cu.

constexpr int SUB = 16;  // tokens of a sub-block

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }
// The decay of a token's channel from what projects to it.
__device__ __forceinline__ float decay(float x, float rate) {
    return __expf(-rate * (fmaxf(x, 0.0f) + __logf(1.0f + __expf(-fabsf(x)))));
}
__device__ __forceinline__ u32 pack_half(float2 x) { return pack_half(x.x, x.y); }
__device__ __forceinline__ float2 times(float2 a, float2 b) { return {a.x * b.x, a.y * b.y}; }

// COUNT of twice as many sums go on in this lane, the others in the one that differs by `mask`.
template <int COUNT> __device__ __forceinline__ void halve(float (&v)[16], int lane, int mask) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const float other = __shfl_xor_sync(~0u, lane & mask ? v[i] : v[i + COUNT], mask);
        v[i] = (lane & mask ? v[i + COUNT] : v[i]) + other;
    }
}
// Sums of v[i] over the lanes of a warp, in lanes i and i + 16.
__device__ __forceinline__ float sum_of_16(float (&v)[16], int lane) {
    halve<8>(v, lane, 8), halve<4>(v, lane, 4), halve<2>(v, lane, 2), halve<1>(v, lane, 1);
    return v[0] + __shfl_xor_sync(~0u, v[0], 16);
}

// Of 2 HALF tokens each, the second half decayed from its beginning, the first to its end or, for queries, which are in
// no pair there, not at all.
template <int HALF, bool KEYS>
__device__ __forceinline__ void decay_halves(u32 (&to)[SUB], const u32 (&from)[SUB], const float2 (&a)[SUB]) {
#pragma unroll
    for (int g = 0; g < SUB; g += 2 * HALF) {
        const int middle = g + HALF - 1;
        float2 x = {1.0f, 1.0f};
        to[middle] = from[middle];
#pragma unroll
        for (int t = middle - 1; t >= g; t--) {
            if (KEYS) x = times(x, a[t + 1]);
            to[t] = KEYS ? mul_halves(from[t], pack_half(x)) : from[t];
        }
        x = {1.0f, 1.0f};
#pragma unroll
        for (int t = middle + 1; t < g + 2 * HALF; t++) {
            x = times(x, a[t]);
            to[t] = mul_halves(from[t], pack_half(x));
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
