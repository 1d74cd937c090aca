// One token, in few.cu: what registers hold of x is of one token in eight, so that a warp would prepare its part of x with 4
// of its 32 lanes. Here all lanes share it, 8 columns each at a time, for all passes before the first, and hand it on by
// shared memory. Results have the bits of the other way. Behind a norm it is for several passes: in one, it takes longer.

constexpr int STEPS = (MINE + 1) / 2;  // of two chunks of a warp

__device__ __forceinline__ int one_column(int pass, int chunk, int j, int pair) {
    return pass * PASS + BLOCK * chunk + 64 * (j / 2) + 16 * pair + 8 * (j % 2);
}
__device__ __forceinline__ int chunks_of(int pass) { return pass < PASSES - 1 ? CHUNKS : LAST / BLOCK; }

// Waits for the kernel ahead, and puts x in fp16 into `one`, over a scale for each pass and warp. With a norm x's squares,
// two columns to a sum, replace the norm's weight, which its lane alone reads.
__device__ __forceinline__ void prepare_one(const bf16* x, u8* norm, u32 norm_here, u8* one, float (&scales)[PASSES][WARPS],
                                            int warp, int quad, int pair) {
    constexpr int WORDS = NORM ? 4 * NORM : 1;  // of the norm's weight for 8 columns
    uint4 v[PASSES][STEPS];
    alignas(16) u32 words[PASSES][STEPS][WORDS];
    auto chunk_of = [&](int s) { return warp + WARPS * (2 * s + quad / 4); };
    auto norm_at = [&](int pass, int s) { return norm + one_column(pass, chunk_of(s), quad % 4, pair) * 2 * NORM; };
    if (NORM) {
        wait_at_barrier(norm_here, 0);
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++)
#pragma unroll
            for (int s = 0; s < STEPS; s++)
#pragma unroll
                for (int e = 0; e < NORM; e++)
                    if (chunk_of(s) < chunks_of(pass))
                        *(uint4*)&words[pass][s][4 * e] = ((const uint4*)norm_at(pass, s))[e];
    }
    wait_for_kernel_ahead();
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++)
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            v[pass][s] = make_uint4(0, 0, 0, 0);
            if (chunk_of(s) < chunks_of(pass)) v[pass][s] = load16(x + one_column(pass, chunk_of(s), quad % 4, pair));
        }
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        u32 largest = 0;
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            u32* two = (u32*)&v[pass][s];
            if (NORM && chunk_of(s) < chunks_of(pass)) {
                const u32* by = words[pass][s];
                float squares[4];
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float a = low(two[e]), b = high(two[e]);
                    squares[e] = a * a + b * b;
                    if (NORM == 1) two[e] = pack(a * low(by[e]), b * high(by[e]));
                    if (NORM == 2) two[e] = pack(a * __uint_as_float(by[2 * e]), b * __uint_as_float(by[2 * e + 1]));
                }
                *(float4*)norm_at(pass, s) = make_float4(squares[0], squares[1], squares[2], squares[3]);
            }
#pragma unroll
            for (int e = 0; e < 4; e++) largest = max_pairs(largest, two[e] & 0x7fff7fffu);
        }
        largest = __reduce_max_sync(~0u, max(largest & 0xffff, largest >> 16));
        const int exponent = min(max((int)largest >> 7, 15), 253);
        const float by = __int_as_float((268 - exponent) << 23);
        if (quad + pair == 0) scales[pass][warp] = __int_as_float((exponent - 14) << 23);
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            u32* two = (u32*)&v[pass][s];
#pragma unroll
            for (int e = 0; e < 4; e++) two[e] = pack_half(low(two[e]) * by, high(two[e]) * by);
            if (chunk_of(s) < chunks_of(pass))
                *(uint4*)(one + one_column(pass, chunk_of(s), quad % 4, pair) * 2) = v[pass][s];
        }
    }
    __syncwarp();
}

// The sum of a warp's squares, in the order in which four lanes would add them up.
__device__ __forceinline__ void add_squares(const u8* norm, float (&sums)[WARPS][TOKENS], int warp, int quad, int pair) {
    float sum = 0;
    if (quad == 0)
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++)
#pragma unroll
            for (int i = 0; i < MINE; i++)
                if (warp + WARPS * i < chunks_of(pass))
#pragma unroll
                    for (int j = 0; j < LOADS; j++) {
                        const int column = one_column(pass, warp + WARPS * i, j, pair);
                        const float4 four = *(const float4*)(norm + column * 2 * NORM);
                        sum += four.x, sum += four.y, sum += four.z, sum += four.w;
                    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (quad + pair == 0) sums[warp][0] = sum;
}
