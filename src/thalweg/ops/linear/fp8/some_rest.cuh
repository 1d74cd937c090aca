// Rows of bf16 below those in float8, in some.cu: 16 to a block of their own, of x as it is, or times the norm's weight,
// rounded; 1 / rms of a token is applied to its sums. Warps share out the columns.

constexpr int REST_PITCH = 20;  // floats between a warp's sums of neighbouring tokens: no bank conflicts

__device__ __forceinline__ void multiply_rest(const bf16* x, long long x_stride, const u8* norm_weight, const bf16* w,
                                              bf16* y, long long y_stride, int T, int D, int count, float eps,
                                              u8* shared) {
    constexpr int HALVES = 2 * UNITS, AT_ONCE = 4;  // of 8 tokens; of which loads are under way
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, quad = lane / 4, pair = lane % 4;
    float* sums_s = (float*)shared;                            // [WARPS, TOKENS, 16]
    float* squares_s = sums_s + WARPS * TOKENS * REST_PITCH;  // [WARPS, TOKENS]
    if (tid < count) bring_near(w + (long long)tid * D, 2 * D);
    wait_for_kernel_ahead();
    start_kernel_behind();
    if (warp < WARPS) {
        float c[HALVES][4] = {}, square[HALVES] = {};
        const uint4 none = make_uint4(0, 0, 0, 0);
#pragma unroll 1
        for (int chunk = warp; chunk < D / 32; chunk += WARPS) {
            const int column = 32 * chunk + 8 * pair;
            const uint4 lower = quad < count ? load16(w + (long long)quad * D + column) : none;
            const uint4 upper = quad + 8 < count ? load16(w + (long long)(quad + 8) * D + column) : none;
            float by[8];
#pragma unroll
            for (int i = 0; i < NORM; i++) {
                const uint4 n = load16(norm_weight + 2 * NORM * column + 16 * i);
                const u32 words[4] = {n.x, n.y, n.z, n.w};
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (NORM == 1)
                        by[2 * e] = low(words[e]), by[2 * e + 1] = high(words[e]);
                    else
                        by[4 * i + e] = __uint_as_float(words[e]);
            }
            uint4 v[AT_ONCE];
#pragma unroll
            for (int h = 0; h < HALVES; h++) {
                if (8 * h >= T) break;  // or registers would hold what all ask for
                if (h % AT_ONCE == 0)
#pragma unroll
                    for (int i = 0; i < AT_ONCE && h + i < HALVES; i++) {
                        const int t = 8 * (h + i) + quad;
                        v[i] = t < T ? load16(x + t * x_stride + column) : none;
                    }
                const uint4& x8 = v[h % AT_ONCE];
                if (NORM) {
                    u32* two = (u32*)&v[h % AT_ONCE];
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const float a = low(two[e]), b = high(two[e]);
                        square[h] += a * a + b * b;
                        two[e] = pack(a * by[2 * e], b * by[2 * e + 1]);
                    }
                }
                mma(c[h], lower.x, upper.x, lower.y, upper.y, x8.x, x8.y);
                mma(c[h], lower.z, upper.z, lower.w, upper.w, x8.z, x8.w);
            }
        }
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
#pragma unroll
            for (int e = 0; e < 4; e++)
                sums_s[(warp * TOKENS + 8 * h + 2 * pair + e % 2) * REST_PITCH + quad + e / 2 * 8] = c[h][e];
            if (!NORM) continue;
            square[h] += __shfl_xor_sync(~0u, square[h], 1);
            square[h] += __shfl_xor_sync(~0u, square[h], 2);
            if (pair == 0) squares_s[warp * TOKENS + 8 * h + quad] = square[h];
        }
    }
    __syncthreads();
    for (int i = tid; i < T * 16; i += THREADS) {
        const int t = i / 16, row = i % 16;
        float sum = 0, square = 0;
#pragma unroll
        for (int p = 0; p < WARPS; p++) {
            sum += sums_s[(p * TOKENS + t) * REST_PITCH + row];
            if (NORM) square += squares_s[p * TOKENS + t];
        }
        if (NORM) sum *= rsqrtf(square / (float)D + eps);
        if (row < count) store_bf16(y + t * y_stride + row, sum);
    }
}
