// How tiles lie in shared memory and in `work`: as the matrix unit's operands. For a block of 16 by 16, lane l has 16
// bytes, the pairs of neighbours in a row that are its a operand, {row, row + 8} of columns {first, last 8}. By tokens:
// rows are tokens, pairs are of channels. By channels: rows are channels, pairs are of tokens, {first, last 8 tokens} of
// {row, row + 8}. As a b operand, the pairs are those of a column, {first, last 8 rows} of {column, column + 8}.
//
// In shared memory positions are swapped so that the channels of a warp fall into different banks.

// Of a thread's channels and first token.
__device__ __forceinline__ int at_channel(const Here& at) {
    return (at.c / 8 * 4 + at.s) * BLOCK + at.c % 4 * 128 + at.c / 4 % 2 * 8;
}
__device__ __forceinline__ int at_token(const Here& at) {
    return (at.c / 8 * 4 + at.s) * BLOCK + at.c % 4 * 16 + at.c / 4 % 2 * 8;
}

// By channels: of this thread's two, pairs of tokens.
__device__ __forceinline__ void store_channels(u8* tile, const u32 (&one)[8], const u32 (&other)[8], int swap,
                                               const Here& at) {
    u8* const to = tile + at_channel(at);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        *(uint2*)(to + (i ^ swap) * 16) = make_uint2(one[i], one[i + 4]);
        *(uint2*)(to + (4 + i ^ swap) * 16) = make_uint2(other[i], other[i + 4]);
    }
}
__device__ __forceinline__ int swap_of(const Here& at) {
    int swap = at.c % 4 ^ at.c / 8 % 2 * 4;
    forget(swap);
    return swap;
}
__device__ __forceinline__ uint4 channels_of(const u8* tile, int column, int row, const Here& at) {
    return *(const uint4*)(tile + (column * 4 + row) * BLOCK + (at.lane ^ at.lane / 8 % 4 ^ column % 2 * 4) * 16);
}

// By tokens: of tokens t and t + 8, this thread's pairs of channels. Blocks of odd columns have neighbouring rows swapped.
__device__ __forceinline__ void store_pair(u8* tile, int t, u32 x, u32 y, const Here& at) {
    const int odd = at.c / 8 % 2, to = at_token(at) + (t % 2 ? -64 : 64) * odd;
    *(uint2*)(tile + to + 64 * t) = make_uint2(x, y);
}
__device__ __forceinline__ void store_tokens(u8* tile, const u32 (&x)[SUB], const Here& at) {
#pragma unroll
    for (int t = 0; t < 8; t++) store_pair(tile, t, x[t], x[t + 8], at);
}
__device__ __forceinline__ uint4 tokens_of(const u8* tile, int column, int row, const Here& at) {
    return *(const uint4*)(tile + (column * 4 + row) * BLOCK + (at.lane ^ column % 2 * 4) * 16);
}
// A block's rows times another's, whose columns are {first, last 8} of the other's rows.
__device__ __forceinline__ void multiply_tokens(float (&left)[4], float (&right)[4], uint4 x, uint4 y) {
    mma_fp16(left, x.x, x.y, x.z, x.w, y.x, y.z);
    mma_fp16(right, x.x, x.y, x.z, x.w, y.y, y.w);
}
