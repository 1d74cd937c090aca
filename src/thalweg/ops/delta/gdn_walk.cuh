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

// Over chunks: X^T = V^T - f (S K^T), U^T = X^T T^T, S <- f_C S + (g U^T) K. Each product waits for the one ahead of it. So
// half of S's columns are packed, and multiplied by the next keys, while the other half is made; and with AHEAD, which
// takes 32 registers, V T^T is made by itself ahead of the rest of U^T.
//
// `at` gives chunk n, which has come. `hand_S` takes the state before it, and says whether the next chunk goes on from the
// one behind it; `hand_U` takes U^T, and waits for the next chunk; both have packed operands, and are called while products
// are made. `made(n)` is called once nothing reads chunk n any more, and ahead of it `ended(n)` if the next chunk does not
// just go on, or there is none: it may read S, and write it for the next one.
template <bool VALUES, bool AHEAD, class At, class HandS, class HandU, class Made, class Ended>
__device__ __forceinline__ void walk_chunks(float (&S)[64], int chunks, At at, HandS hand_S, HandU hand_U, Made made,
                                            Ended ended) {
    float(&first)[32] = *(float(*)[32])S, (&second)[32] = *(float(*)[32])(S + 32);
    const int column = threadIdx.x % 4 * 2;
    u32 s[8][4], x[4][4], g_U[4][4];
    float2 g[8];
    auto pack_half_of_S = [&](int half) {
#pragma unroll
        for (int k = 4 * half; k < 4 * half + 4; k++) pack_columns(s[k], S + 8 * k);
    };
    float y[32], U[32];
    bool goes_on = false;
    auto multiply_keys = [&](const Chunk& chunk, int half) {
        begin_products();
#pragma unroll
        for (int k = 4 * half; k < 4 * half + 4; k++)
            multiply_left<8>(y, s[k], further(chunk.keys, k / 4 * SLAB + k % 4 * 32), k > 0);
        commit_products();
    };
    // U of chunk n, of which S K^T of the first half is under way, and `second` perhaps.
    auto make_U = [&](const Chunk& chunk, int n) {
        u32 v[4][4] = {};
        float2 f[8];
        auto load_values = [&] {
#pragma unroll
            for (int i = 0; VALUES && i < 4; i++) {
                const uint4 z = *(const uint4*)(chunk.values + i * BLOCK);
                v[i][0] = z.x, v[i][1] = z.z, v[i][2] = z.y, v[i][3] = z.w;
            }
        };
        auto load_factors = [&] {
#pragma unroll
            for (int i = 0; i < 8; i++) f[i] = *(const float2*)(chunk.factors + column + 8 * i);
        };
        if (AHEAD) load_values();
        pack_half_of_S(1);
        multiply_keys(chunk, 1);
        if (AHEAD) {
#pragma unroll
            for (int j = 0; j < 4; j++) multiply_left<8>(U, v[j], further(chunk.T, j * 32), j > 0);
            commit_products();
        }
        goes_on = hand_S(n, s);
        const float all = chunk.factors[2 * CHUNK];
#pragma unroll
        for (int i = 0; i < 64; i++) S[i] *= all;
        if (AHEAD) load_factors();
        wait_for_products<AHEAD>();
        settle(y);
        keep(s);
        if (!AHEAD) load_values(), load_factors();
#pragma unroll
        for (int i = 0; i < 32; i++) {
            const u32 pair = v[i / 8][i % 8 / 2];
            const float value = AHEAD ? 0.0f : i % 2 ? high(pair) : low(pair);
            y[i] = value - (i % 2 ? f[i / 4].y : f[i / 4].x) * y[i];
        }
#pragma unroll
        for (int j = 0; j < 4; j++) pack_columns(x[j], y + 8 * j);
        begin_products();
#pragma unroll
        for (int j = 0; j < 4; j++) multiply_left<8>(U, x[j], further(chunk.T, j * 32), AHEAD || j > 0);
        commit_products();
#pragma unroll
        for (int i = 0; i < 8; i++) g[i] = *(const float2*)(chunk.factors + CHUNK + column + 8 * i);
        wait_for_products<0>();
        settle(U);
        if (AHEAD) keep(v);
        keep(x);
    };
    auto make_S = [&](const Chunk& chunk, int n) {
#pragma unroll
        for (int j = 0; j < 4; j++) pack_columns(x[j], U + 8 * j);
#pragma unroll
        for (int i = 0; i < 32; i++) U[i] *= i % 2 ? g[i / 4].y : g[i / 4].x;
#pragma unroll
        for (int j = 0; j < 4; j++) pack_columns(g_U[j], U + 8 * j);
        begin_products();
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int j = 0; j < 4; j++)
                multiply_columns<64>(half ? second : first, g_U[j][0], g_U[j][1], g_U[j][2], g_U[j][3],
                                     further(chunk.keys_by_columns, half * SLAB + j * 2048));
            commit_products();
        }
        hand_U(n, x);
    };
    int n = 0;
#pragma unroll 1
    for (;;) {
        Chunk chunk = at(n);
        settle(first), settle(second);
        wait_for_products<0>();
        pack_half_of_S(0);
        multiply_keys(chunk, 0);
        make_U(chunk, n);
#pragma unroll 1
        while (goes_on & n < chunks - 1) {
            make_S(chunk, n);
            wait_for_products<1>();
            settle(first);
            pack_half_of_S(0);
            chunk = at(n + 1);
            multiply_keys(chunk, 0);
            wait_for_products<1>();
            settle(second);
            keep(g_U);
            made(n++);
            make_U(chunk, n);
        }
        make_S(chunk, n);
        wait_for_products<0>();
        settle(first), settle(second);
        keep(g_U);
        ended(n);
        if (n + 1 == chunks) return;
        made(n++);
    }
}
