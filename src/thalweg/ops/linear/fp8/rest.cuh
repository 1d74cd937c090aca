// Rows of bf16 below those in float8, in few.cu: a block has its REST_EACH of them, at most, whole in shared memory, and
// warps multiply them with what their registers hold of x.

constexpr int REST_SUMS = REST ? REST_EACH : 1;

// By one thread, before the wait for the kernel ahead.
__device__ __forceinline__ void ask_for_rest(u64& here, const u8* to, const bf16* from, int count) {
    if (!REST || count == 0) return;
    expect_bytes(shared_address(&here), count * D * 2);
    copy_bytes(shared_address(to), from, count * D * 2, shared_address(&here));
}

// A thread has x, in fp16 over `scale`, of one token and the pass's `columns(i, j)` where `is(i)`; four lanes share the
// token. Sums are those of this warp.
template <int MINE, int LOADS, class Is, class Columns>
__device__ __forceinline__ void multiply_rest(float (&sums)[REST_SUMS][WARPS][TOKENS], const uint4 (&x)[MINE][LOADS],
                                              const u8* rest, int pass, int count, int token, float scale, Is is,
                                              Columns columns) {
#pragma unroll 1
    for (int row = 0; row < count; row++) {
        const bf16* w = (const bf16*)rest + row * D + pass * PASS;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < MINE; i++)
            if (is(i))
#pragma unroll
                for (int j = 0; j < LOADS; j++) {
                    const uint4 w8 = *(const uint4*)(w + columns(i, j)), x8 = x[i][j];
                    sum += half_low(x8.x) * low(w8.x) + half_high(x8.x) * high(w8.x);
                    sum += half_low(x8.y) * low(w8.y) + half_high(x8.y) * high(w8.y);
                    sum += half_low(x8.z) * low(w8.z) + half_high(x8.z) * high(w8.z);
                    sum += half_low(x8.w) * low(w8.w) + half_high(x8.w) * high(w8.w);
                }
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        float& to = sums[row][threadIdx.x / 32][token];
        if (threadIdx.x % 4 == 0) to = (pass > 0 ? to : 0) + sum * scale;
    }
}

// By one warp, once all have their sums: those of `count` rows go to y, a row to a column.
__device__ __forceinline__ void store_rest(bf16* y, long long y_stride, int count, int T, int lane,
                                           const float (&sums)[REST_SUMS][WARPS][TOKENS],
                                           const float (&squares)[WARPS][TOKENS], float eps) {
    for (int i = lane; i < count * TOKENS; i += 32) {
        const int t = i % TOKENS;
        float sum = 0, square = 0;
#pragma unroll
        for (int p = 0; p < WARPS; p++) {
            sum += sums[i / TOKENS][p][t];
            if (NORM) square += squares[p][t];
        }
        if (NORM) sum *= rsqrtf(square * (1.0f / D) + eps);
        if (t < T) store_bf16(y + t * y_stride + i / TOKENS, sum);
    }
}
