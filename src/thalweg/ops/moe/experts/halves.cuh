// What the products of experts over float8 do in fp16, one warp at a time.

// A warp's part of tokens' rows, N pairs of bf16 of a token in each four lanes, as pairs of fp16: scaled by a power of
// two to just below fp16's largest, which loses nothing but what is below 2^-29 of the row's largest element. What the
// token's sums are then to be multiplied with.
template <int N> __device__ __forceinline__ float scale_to_halves(u32 (&pairs)[N]) {
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < N; i++) largest = max_pairs(largest, pairs[i] & 0x7fff7fffu);
    largest = max(largest & 0xffff, largest >> 16);
    largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
    const int exponent = min(max((int)largest >> 7, 15), 253);
    const float factor = __int_as_float((268 - exponent) << 23);
#pragma unroll
    for (int i = 0; i < N; i++) pairs[i] = pack_half(low(pairs[i]) * factor, high(pairs[i]) * factor);
    return __int_as_float((exponent - 14) << 23);
}

// Sixteen rows and 128 columns of float8 in a warp's ring, where lane 4 r + p has 16 neighbours in each half of the
// columns of row r and of its counterpart: `each` takes them 16 columns at a time, as operand of the matrix unit.
template <class Each> __device__ __forceinline__ void widen_step(const u8* step, Each each) {
    uint4 w[2][2];  // [lower or upper, half]
#pragma unroll
    for (int i = 0; i < 4; i++) w[i / 2][i % 2] = *(const uint4*)(step + 512 * i);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint4 l4 = w[0][i / 4], u4 = w[1][i / 4];
        const u32 l = i % 4 == 0 ? l4.x : i % 4 == 1 ? l4.y : i % 4 == 2 ? l4.z : l4.w;
        const u32 u = i % 4 == 0 ? u4.x : i % 4 == 1 ? u4.y : i % 4 == 2 ? u4.z : u4.w;
        each(i, widen_half((u16)l), widen_half((u16)u), widen_half((u16)(l >> 16)), widen_half((u16)(u >> 16)));
    }
}
