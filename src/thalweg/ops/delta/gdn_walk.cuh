// What gdn_states.cu and gdn_segments.cu share: 64 rows of a head's state in the registers of a warpgroup, and their step
// over a chunk. S[8 n + 4 m ..] are columns 16 n + 8 m to 16 n + 8 m + 7, as the matrix unit's result: of a warp's 16 rows,
// lane / 4 and 8 below it, two columns.

constexpr int ROWS = 64, ROWS_BYTES = TILE / K * ROWS;  // of V's, in a chunk

// As an operand of 16 columns.
__device__ __forceinline__ void pack_columns(u32 (&to)[4], const float* x) {
#pragma unroll
    for (int e = 0; e < 4; e++) to[e] = pack(x[2 * e], x[2 * e + 1]);
}

// Where a chunk's parts are in shared memory: slabs, keys both by rows and by columns, the lane's first 16 bytes of the
// warp's rows of V (`in_values`), and the chunk's factors.
struct Chunk {
    Operand keys, keys_by_columns, T;
    const u8* values;
    const float* factors;
};

__device__ __forceinline__ int in_values(int part, int lane) {
    return part * 4 * BLOCK + (lane ^ lane / 8 % 4 ^ part % 2 * 4) * 16;
}

// X^T = V^T - f (S K^T), U^T = X^T T^T, S <- f_C S + (g U^T) K. `hand_S` takes the state before, `hand_U` U^T, as packed
// operands, both while products are made.
template <bool VALUES, class HandS, class HandU>
__device__ __forceinline__ void step(float (&S)[64], const Chunk& at, HandS hand_S, HandU hand_U) {
    const int column = threadIdx.x % 4 * 2;
    u32 s[8][4], x[4][4], g_U[4][4];
    float y[32], U[32];
#pragma unroll
    for (int k = 0; k < 8; k++) pack_columns(s[k], S + 8 * k);
    begin_products();
#pragma unroll
    for (int k = 0; k < 8; k++) multiply_left<4>(y, s[k], further(at.keys, k / 4 * SLAB + k % 4 * 32), k > 0);
    commit_products();
    hand_S(s);
    float v[32];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint4 z = VALUES ? *(const uint4*)(at.values + i * BLOCK) : make_uint4(0, 0, 0, 0);
        v[8 * i] = low(z.x), v[8 * i + 1] = high(z.x), v[8 * i + 2] = low(z.z), v[8 * i + 3] = high(z.z);
        v[8 * i + 4] = low(z.y), v[8 * i + 5] = high(z.y), v[8 * i + 6] = low(z.w), v[8 * i + 7] = high(z.w);
    }
    wait_for_products<0>();
    settle(y);
    keep(s);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float2 f = *(const float2*)(at.factors + column + 8 * i);
#pragma unroll
        for (int e = 0; e < 4; e++) y[4 * i + e] = v[4 * i + e] - (e % 2 ? f.y : f.x) * y[4 * i + e];
    }
#pragma unroll
    for (int j = 0; j < 4; j++) pack_columns(x[j], y + 8 * j);
    begin_products();
#pragma unroll
    for (int j = 0; j < 4; j++) multiply_left<4>(U, x[j], further(at.T, j * 32), j > 0);
    commit_products();
    const float all = at.factors[2 * CHUNK];
#pragma unroll
    for (int i = 0; i < 64; i++) S[i] *= all;
    wait_for_products<0>();
    settle(U);
    keep(x);
#pragma unroll
    for (int j = 0; j < 4; j++) pack_columns(x[j], U + 8 * j);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float2 g = *(const float2*)(at.factors + CHUNK + column + 8 * i);
#pragma unroll
        for (int e = 0; e < 4; e++) U[4 * i + e] *= e % 2 ? g.y : g.x;
    }
#pragma unroll
    for (int j = 0; j < 4; j++) pack_columns(g_U[j], U + 8 * j);
    begin_products();
#pragma unroll
    for (int j = 0; j < 4; j++)
        multiply_columns<128>(S, g_U[j][0], g_U[j][1], g_U[j][2], g_U[j][3], further(at.keys_by_columns, j * 2048));
    commit_products();
    hand_U(x);
    wait_for_products<0>();
    settle(S);
    keep(g_U);
}
