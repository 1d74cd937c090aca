// What states.cu and segments.cu share: 16 rows of a head's state in the registers of a warp, and their step over a chunk.
//
// S[i] are columns 8 i to 8 i + 7, as the matrix unit's result: rows lane / 4 and 8 below it, two columns.
//
// Macro: STATE_BF16, 1 for states stored in bf16, 0 for fp32.

#if STATE_BF16
typedef bf16 State;
#else
typedef float State;
#endif

__device__ __forceinline__ float2 load_state(const State* from) {
#if STATE_BF16
    const u32 x = *(const u32*)from;
    return {low(x), high(x)};
#else
    return *(const float2*)from;
#endif
}
__device__ __forceinline__ void store_state(State* to, float x, float y) {
#if STATE_BF16
    *(u32*)to = pack(x, y);
#else
    *(float2*)to = float2{x, y};
#endif
}
// From where this lane's first two values are.
__device__ __forceinline__ void read_rows(float (&S)[16][4], const State* from) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const float2 x = load_state(from + 8 * i), y = load_state(from + 8 * K + 8 * i);
        S[i][0] = x.x, S[i][1] = x.y, S[i][2] = y.x, S[i][3] = y.y;
    }
}
__device__ __forceinline__ void write_rows(const float (&S)[16][4], State* to) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
        store_state(to + 8 * i, S[i][0], S[i][1]);
        store_state(to + 8 * K + 8 * i, S[i][2], S[i][3]);
    }
}

__device__ __forceinline__ uint4 pack_rows(const float (&x)[4], const float (&y)[4]) {
    return make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(y[0], y[1]), pack(y[2], y[3]));
}

// U^T = U0^T + S (-W)^T and S <- S a + U^T K, of which `u` is U0^T. The chunk's parts lie where the lane's first 16 bytes
// of each do, but for the decays, which begin at those of its columns. `hand` takes block i of the state and of U, as the
// matrix unit's operand, and `handed` is called when it has had all 12.
//
// Loads are asked for before what they read is made use of and before what is handed over is written, for they do not pass
// what is written to the same memory.
template <class Hand, class Handed>
__device__ __forceinline__ void step(float (&S)[16][4], float (&u)[8][4], const u8* W, const u8* keys,
                                     const float* decays, Hand hand, Handed handed) {
    uint4 w[2][4];
    auto load_W = [&](int k) {
#pragma unroll
        for (int i = 0; i < 4; i++) w[k % 2][i] = *(const uint4*)(W + (k * 4 + i) * BLOCK);
    };
    load_W(0);
#pragma unroll
    for (int k = 0; k < 8; k++) {
        const uint4 s = pack_rows(S[2 * k], S[2 * k + 1]);
        if (k < 7) load_W(k + 1);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint4 x = w[k % 2][i];
            mma(u[2 * i], s.x, s.y, s.z, s.w, x.x, x.y);
            mma(u[2 * i + 1], s.x, s.y, s.z, s.w, x.z, x.w);
        }
        hand(k, s);
    }
    uint4 x[2][4], U[4];
    auto load_keys = [&](int n) {  // 4 of the 8 blocks of a row
#pragma unroll
        for (int k = 0; k < 4; k++) x[n % 2][k] = *(const uint4*)(keys + ((n % 2 * 4 + k) * 4 + n / 2) * BLOCK);
    };
    load_keys(0);
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const float2 a = *(const float2*)(decays + 8 * i);
        S[i][0] *= a.x, S[i][1] *= a.y, S[i][2] *= a.x, S[i][3] *= a.y;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        U[i] = pack_rows(u[2 * i], u[2 * i + 1]);
        hand(8 + i, U[i]);
    }
    handed();
#pragma unroll
    for (int n = 0; n < 8; n++) {
        if (n < 7) load_keys(n + 1);
        const uint4 of = U[n / 2];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const uint4 y = x[n % 2][k];
            const int i = 2 * (n % 2 * 4 + k);
            mma(S[i], of.x, of.y, of.z, of.w, y.x, y.y);
            mma(S[i + 1], of.x, of.y, of.z, of.w, y.z, y.w);
        }
    }
}

// What comes of all that a step or a chunk's outputs read.
template <int COUNT> __device__ __forceinline__ u32 seen_of(const float (&x)[COUNT][4]) {
    u32 seen = 0;
#pragma unroll
    for (int i = 0; i < COUNT; i++) seen |= __float_as_uint(x[i][0]);
    return seen;
}

// U0^T of 16 rows, from where the lane's first 16 bytes are.
__device__ __forceinline__ void read_U(float (&u)[8][4], const u8* from) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint4 x = *(const uint4*)(from + i * BLOCK);
        float(&a)[4] = u[2 * i], (&b)[4] = u[2 * i + 1];
        a[0] = low(x.x), a[1] = high(x.x), a[2] = low(x.y), a[3] = high(x.y);
        b[0] = low(x.z), b[1] = high(x.z), b[2] = low(x.w), b[3] = high(x.w);
    }
}

// The chunks of a segment, of those of a sequence: `segments` parts, as equal as they come.
__device__ __forceinline__ int first_of_segment(int segment, int segments, int chunks) {
    return min(chunks, (chunks + segments - 1) / segments * segment);
}
// Where segments.cu writes of a segment what makes the state behind it of the one before it, S <- S M + B: B in fp32, 16
// rows after another as a warp has them, M as the matrix unit's operand b, in bf16, and in bf16 what that leaves out.
constexpr int M_AT = K * K * 4, REST_AT = M_AT + K * K * 2, MOVE = REST_AT + K * K * 2;

// The state at the beginning of a segment behind the first, of what the segments before it make, `stride` bytes each.
__device__ __forceinline__ void move_rows(float (&S)[16][4], const u8* moves, long long stride, int rows, int lane,
                                          int segment) {
    for (int g = 0; g < segment; g++, moves += stride) {
        uint4 s[8], rest[8];
#pragma unroll
        for (int k = 0; k < 8; k++) {
            if (g == 0) break;
            const float(&x)[4] = S[2 * k], (&y)[4] = S[2 * k + 1];
            s[k] = pack_rows(x, y);
            const float x_rest[4] = {x[0] - low(s[k].x), x[1] - high(s[k].x), x[2] - low(s[k].y), x[3] - high(s[k].y)};
            const float y_rest[4] = {y[0] - low(s[k].z), y[1] - high(s[k].z), y[2] - low(s[k].w), y[3] - high(s[k].w)};
            rest[k] = pack_rows(x_rest, y_rest);
        }
        const u8* from = moves + lane * 16;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const float4 x = *(const float4*)(from + (rows + i) * BLOCK);
            S[i][0] = x.x, S[i][1] = x.y, S[i][2] = x.z, S[i][3] = x.w;
        }
        if (g == 0) continue;
#pragma unroll
        for (int k = 0; k < 8; k++)
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const uint4 m = *(const uint4*)(from + M_AT + (k * 8 + i) * BLOCK);
                const uint4 m_rest = *(const uint4*)(from + REST_AT + (k * 8 + i) * BLOCK);
                mma(S[2 * i], s[k].x, s[k].y, s[k].z, s[k].w, m.x, m.y);
                mma(S[2 * i + 1], s[k].x, s[k].y, s[k].z, s[k].w, m.z, m.w);
                mma(S[2 * i], rest[k].x, rest[k].y, rest[k].z, rest[k].w, m.x, m.y);
                mma(S[2 * i + 1], rest[k].x, rest[k].y, rest[k].z, rest[k].w, m.z, m.w);
                mma(S[2 * i], s[k].x, s[k].y, s[k].z, s[k].w, m_rest.x, m_rest.y);
                mma(S[2 * i + 1], s[k].x, s[k].y, s[k].z, s[k].w, m_rest.z, m_rest.w);
            }
    }
}

// What a segment makes of the state before it, 16 rows of B or of M, to where the lane's first 16 bytes are.
__device__ __forceinline__ void write_moves(const float (&S)[16][4], u8* to, int rows, bool of_M) {
    if (!of_M) {
#pragma unroll
        for (int i = 0; i < 16; i++)
            *(float4*)(to + (rows + i) * BLOCK) = make_float4(S[i][0], S[i][1], S[i][2], S[i][3]);
        return;
    }
    // Pairs are those of a column: of the first 8 rows and of the last, of two blocks of 8 columns.
#pragma unroll
    for (int i = 0; i < 8; i++) {
        u32 m[4], rest[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float x = S[2 * i + e / 2][e % 2 * 2], y = S[2 * i + e / 2][e % 2 * 2 + 1];
            const u32 both = pack(x, y);
            m[e] = transpose_matrix(both);
            rest[e] = transpose_matrix(pack(x - low(both), y - high(both)));
        }
        *(uint4*)(to + M_AT + (rows / 2 + i) * BLOCK) = make_uint4(m[0], m[1], m[2], m[3]);
        *(uint4*)(to + REST_AT + (rows / 2 + i) * BLOCK) = make_uint4(rest[0], rest[1], rest[2], rest[3]);
    }
}
