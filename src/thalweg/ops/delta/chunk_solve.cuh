// What kda_chunks.cu and gdn_chunks.cu make of A: (I + A) is inverted for sub-blocks, by halves of 1, 2, 4 and 8 tokens.
// KDA solves for U0 and W from one sub-block to the next; Gated DeltaNet goes on to the whole inverse.

// In shared memory, as operands b: -A below its diagonal blocks, of those the inverses less I, in fp16 for W and in bf16
// for U0.
struct Solving {
    u8 *A_half, *A_wide, *T_half, *T_wide;
};
constexpr int SOLVING = 20 * BLOCK;
__device__ __forceinline__ Solving solving_at(u8* p) { return {p, p + 6 * BLOCK, p + 12 * BLOCK, p + 16 * BLOCK}; }

__device__ __forceinline__ uint4 columns(uint4 x) { return make_uint4(x.x, x.z, x.y, x.w); }

// Blocks below the diagonal: `pair` of 6 is block (row_of(pair), column).
__device__ __forceinline__ int row_of(int pair) { return pair < 1 ? 1 : pair < 3 ? 2 : 3; }
__device__ __forceinline__ int column_of(int pair) { return pair - row_of(pair) * (row_of(pair) - 1) / 2; }

__device__ __forceinline__ void store_P(u8* blocks, int i, int j, uint4 x, int lane) {
    *(uint4*)(blocks + (i * (i + 1) / 2 + j) * BLOCK + lane * 16) = x;
}
__device__ __forceinline__ void store_A(const Solving& to, int pair, const float (&left)[4], const float (&right)[4],
                                        int lane) {
    *(uint4*)(to.A_wide + pair * BLOCK + lane * 16) = columns(pack_block(left, right));
    *(uint4*)(to.A_half + pair * BLOCK + lane * 16) = columns(pack_block_half(left, right));
}
// Of lower triangular blocks this lane has {upper left, lower left, lower right} pairs, as in chunk_parts.cuh.
__device__ __forceinline__ void store_P_diagonal(u8* blocks, const float (&x)[6], const Here& at) {
    u32 P[3];
#pragma unroll
    for (int e = 0; e < 3; e++) P[e] = pack(x[2 * e], x[2 * e + 1]);
    store_P(blocks, at.s, at.s, make_uint4(P[0], P[1], 0, P[2]), at.lane);
}
__device__ __forceinline__ void invert(const Solving& to, const float (&A)[6], const Here& at) {
    const int lane = at.lane, row = lane / 4;
    float T[6], part[6], Z[6];
    // T inverts blocks of `half` tokens on the diagonal: T - T A_half T those of twice as many.
#pragma unroll
    for (int e = 0; e < 6; e++) {
        const bool on_diagonal = e / 2 != 1 && row == 2 * (lane % 4) + e % 2;
        T[e] = (on_diagonal ? 1.0f : 0.0f) - (e / 2 != 1 && pairs(lane, e % 2, 1) ? A[e] : 0.0f);
    }
#pragma unroll
    for (int half = 2; half <= 8; half *= 2) {
#pragma unroll
        for (int e = 0; e < 6; e++)
            part[e] = (half == 8 ? e / 2 == 1 : e / 2 != 1 && pairs(lane, e % 2, half)) ? A[e] : 0.0f;
        u32 x[3], y[3];
        pack_blocks(x, T), transpose_blocks(y, part);
        multiply(Z, x, y);
        pack_blocks(x, Z), transpose_blocks(y, T);
        multiply(Z, x, y);
#pragma unroll
        for (int e = 0; e < 6; e++) T[e] -= Z[e];
    }
#pragma unroll
    for (int e = 0; e < 6; e++)
        if (e / 2 != 1 && row == 2 * (lane % 4) + e % 2) T[e] = 0.0f;
    *(uint4*)(to.T_half + at.s * BLOCK + lane * 16) =
        make_uint4(pack_half(T[0], T[1]), 0, pack_half(T[2], T[3]), pack_half(T[4], T[5]));
    *(uint4*)(to.T_wide + at.s * BLOCK + lane * 16) = make_uint4(pack(T[0], T[1]), 0, pack(T[2], T[3]), pack(T[4], T[5]));
}

// U0 and -W by this warp's 16 channels, transposed: a sub-block's are those of beta V (or beta K a[0, i]) less what the
// ones before it account for, times T. Both side by side, as each waits for what came before it.
__device__ __forceinline__ void solve(u8* out, const Solving& of, const u8* v_tile, const u8* start_tile,
                                      const Here& at) {
    const int lane = at.lane;
    auto block = [&](const u8* p, int i) { return *(const uint4*)(p + i * BLOCK + lane * 16); };
    auto to = [&](int part_at, int i) { return (uint4*)(out + part_at + (at.warp * 4 + i) * BLOCK + lane * 16); };
    uint4 u[4], w[4];
    auto solve_U = [&](int i) {
        const uint4 v = channels_of(v_tile, at.warp, i, at);
        float left[4] = {low(v.x), high(v.x), low(v.z), high(v.z)};
        float right[4] = {low(v.y), high(v.y), low(v.w), high(v.w)};
#pragma unroll
        for (int j = 0; j < i; j++) {
            const uint4 A = block(of.A_wide, i * (i - 1) / 2 + j);
            mma(left, u[j].x, u[j].y, u[j].z, u[j].w, A.x, A.y);
            mma(right, u[j].x, u[j].y, u[j].z, u[j].w, A.z, A.w);
        }
        const uint4 T = block(of.T_wide, i), x = pack_block(left, right);
        mma(left, x.x, x.y, x.z, x.w, T.x, T.y);
        mma(right, x.x, x.y, x.z, x.w, T.z, T.w);
        *to(U_AT, i) = u[i] = pack_block(left, right);
    };
    auto solve_W = [&](int i) {
        const uint4 k = channels_of(start_tile, at.warp, i, at);
        float left[4] = {half_low(k.x), half_high(k.x), half_low(k.z), half_high(k.z)};
        float right[4] = {half_low(k.y), half_high(k.y), half_low(k.w), half_high(k.w)};
#pragma unroll
        for (int j = 0; j < i; j++) {
            const uint4 A = block(of.A_half, i * (i - 1) / 2 + j);
            mma_fp16(left, w[j].x, w[j].y, w[j].z, w[j].w, A.x, A.y);
            mma_fp16(right, w[j].x, w[j].y, w[j].z, w[j].w, A.z, A.w);
        }
        const uint4 T = block(of.T_half, i), x = pack_block_half(left, right);
        mma_fp16(left, x.x, x.y, x.z, x.w, T.x, T.y);
        mma_fp16(right, x.x, x.y, x.z, x.w, T.z, T.w);
        w[i] = pack_block_half(left, right);
        const u32 y0 = transpose_matrix(pack(-left[0], -left[1])), y1 = transpose_matrix(pack(-left[2], -left[3]));
        const u32 y2 = transpose_matrix(pack(-right[0], -right[1])), y3 = transpose_matrix(pack(-right[2], -right[3]));
        *to(W_AT, i) = make_uint4(y0, y1, y2, y3);
    };
#pragma unroll
    for (int i = 0; i < 4; i++) solve_U(i), solve_W(i);
}

// Columns of (I + A)^-1 beta of sub-block j, from the inverses on the diagonal, to slabs of gdn.cuh.
__device__ __forceinline__ void invert_below(u8* slab, const Solving& of, const float* betas, int j, const Here& at) {
    const int lane = at.lane, row = lane / 4;
    auto block = [&](const u8* p, int i) { return *(const uint4*)(p + i * BLOCK + lane * 16); };
    const float b0 = betas[SUB * j + row], b1 = betas[SUB * j + row + 8];
    uint4 w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        w[i] = make_uint4(0, 0, 0, 0);
        u8* const to = slab + (SUB * i + row) * 128 + lane % 4 * 4;
        const int place = (2 * j ^ row % 8) * 16, beside = (2 * j + 1 ^ row % 8) * 16;
        auto write = [&](u32 a, u32 b, u32 c, u32 d) {
            *(u32*)(to + place) = a, *(u32*)(to + beside) = b;
            *(u32*)(to + place + 8 * 128) = c, *(u32*)(to + beside + 8 * 128) = d;
        };
        if (i < j) {
            write(0, 0, 0, 0);
            continue;
        }
        float left[4], right[4];  // transposed: rows are tokens of j, columns of i
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const bool one = row + e / 2 * 8 == 2 * (lane % 4) + e % 2, other = row + e / 2 * 8 == 8 + 2 * (lane % 4) + e % 2;
            left[e] = i == j && one ? 1.0f : 0.0f, right[e] = i == j && other ? 1.0f : 0.0f;
        }
#pragma unroll
        for (int m = 0; m < i; m++) {
            if (m < j) continue;
            const uint4 A = block(of.A_half, i * (i - 1) / 2 + m);
            mma_fp16(left, w[m].x, w[m].y, w[m].z, w[m].w, A.x, A.y);
            mma_fp16(right, w[m].x, w[m].y, w[m].z, w[m].w, A.z, A.w);
        }
        const uint4 T = block(of.T_half, i), x = pack_block_half(left, right);
        mma_fp16(left, x.x, x.y, x.z, x.w, T.x, T.y);
        mma_fp16(right, x.x, x.y, x.z, x.w, T.z, T.w);
        w[i] = pack_block_half(left, right);
        const u32 y0 = transpose_matrix(pack(left[0] * b0, left[1] * b0));
        const u32 y1 = transpose_matrix(pack(left[2] * b1, left[3] * b1));
        const u32 y2 = transpose_matrix(pack(right[0] * b0, right[1] * b0));
        const u32 y3 = transpose_matrix(pack(right[2] * b1, right[3] * b1));
        write(y0, y1, y2, y3);
    }
}
