// Carries states across the chunks of prompts, for Hopper: what chunks.cu makes of every chunk, in order. It says what the
// parts are and how they lie in memory.
//
// A block has WARPS * 16 rows of V of a head's state, and walks a sequence. Of each 16 rows one warp keeps the state, in
// fp32, as the matrix unit's result C, and packs it to bf16 for its operand a; another makes outputs, of what the first
// hands over: the state before a chunk, and U. Nobody else waits for anybody. For a chunk
//
//     U^T = U0^T + S (-W)^T,    S <- S a + U^T K,    O^T = S Q^T + U^T P^T
//
// The last warp fetches the parts of the next chunks to a ring in shared memory. That of a head's first block also moves
// the convolution's states on, which nothing reads any more.
//
// Macros: STATE_BF16, 1 for states stored in bf16, 0 for fp32. WARPS: of those that keep the state, 1, 2, 4 or 8. STAGES
// of the ring. RATIO, value heads per key head.

#include "hopper.cuh"
#include "delta.cuh"

constexpr int SLICES = 8 / WARPS, U_BYTES = WARPS * 4 * BLOCK, STAGE = U_AT + U_BYTES;
constexpr int HANDED = 12 * BLOCK;  // the state's 8 blocks of 16 by 16 and U's 4
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

extern "C" __global__ void __launch_bounds__(32 * (2 * WARPS + 1))
    states(const u8* work, const bf16* qkv, bf16* conv_state, State* state, const long long* slots, const int* offsets,
           const int* firsts, const int* saves, bf16* out, long long qkv_stride, int H) {
    const int tid = threadIdx.x, lane = tid % 32;
    const int warp = __shfl_sync(~0u, tid / 32, 0), part = warp % WARPS;
    const int slice = blockIdx.x % SLICES, h = blockIdx.x / SLICES % H, sequence = blockIdx.x / SLICES / H;
    extern __shared__ __align__(128) u8 shared[];
    __shared__ u64 full_s[STAGES], empty_s[STAGES], handed_full_s[2 * WARPS], handed_empty_s[2 * WARPS];
    const u32 full = shared_address(full_s), empty = shared_address(empty_s), ring = shared_address(shared);
    const u32 handed_full = shared_address(handed_full_s + 2 * part);
    const u32 handed_empty = shared_address(handed_empty_s + 2 * part);

    start_kernel_behind();
    if (tid == 0) {
        for (int i = 0; i < STAGES; i++) init_barrier(full + 8 * i), init_barrier(empty + 8 * i, 2 * WARPS);
        for (int i = 0; i < 2 * WARPS; i++)
            init_barrier(shared_address(handed_full_s + i)), init_barrier(shared_address(handed_empty_s + i));
        share_barriers();
    }
    __syncthreads();
    wait_for_kernel_ahead();

    const int first = offsets[sequence], end = offsets[sequence + 1];
    if (first == end) return;
    const int chunks = (end - first + CHUNK - 1) / CHUNK, begin = firsts[sequence];
    const long long slot = slots[sequence];

    if (warp == 2 * WARPS) {
        const u8* from = work + ((long long)begin * H + h) * WORK;
        if (lane == 0)
#pragma unroll 1
            for (int i = 0; i < chunks; i++, from += (long long)H * WORK) {
                const int place = i % STAGES;
                if (i >= STAGES) wait_at_barrier(empty + 8 * place, (i / STAGES - 1) & 1);
                expect_bytes(full + 8 * place, STAGE);
                copy_bytes(ring + place * STAGE, from, U_AT, full + 8 * place);
                copy_bytes(ring + place * STAGE + U_AT, from + U_AT + slice * U_BYTES, U_BYTES, full + 8 * place);
            }
        __syncwarp();
        if (slice == 0) {
            const int key_heads = H / RATIO, C = (2 * key_heads + H) * K, length = end - first;
#pragma unroll 1
            for (int i = h % RATIO ? K + lane : lane; i < 3 * K / 2; i += 32) {
                const int p = i / 64, channel = (p < 2 ? p * key_heads + h / RATIO : 2 * key_heads + h) * K + i % 64 * 2;
                bf16* remembered = conv_state + slot * 3 * C + channel;
                u32 x[3];
#pragma unroll
                for (int j = 0; j < 3; j++) {
                    const int t = length - 3 + j;
                    x[j] = *(const u32*)(t < 0 ? remembered + (t + 3) * C : qkv + (first + t) * qkv_stride + channel);
                }
#pragma unroll
                for (int j = 0; j < 3; j++) *(u32*)(remembered + j * C) = x[j];
            }
        }
        return;
    }

    const int rows = (slice * WARPS + part) * 16, row = lane / 4, column = 2 * (lane % 4);
    u8* const handed_here = shared + STAGES * STAGE + part * 2 * HANDED + lane * 16;
    int place = 0;
    u32 phase = 0;
    auto block = [&](int part_at, int i) {
        return *(const uint4*)(shared + place * STAGE + part_at + i * BLOCK + lane * 16);
    };
    auto release = [&] {
        __syncwarp();
        if (lane == 0) arrive_at_barrier(empty + 8 * place);
        if (++place == STAGES) place = 0, phase ^= 1;
    };

    if (warp >= WARPS) {
#pragma unroll 1
        for (int n = 0; n < chunks; n++) {
            const int turn = n % 2;
            const u8* handed = handed_here + turn * HANDED;
            float o[8][4];
#pragma unroll
            for (int i = 0; i < 8; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) o[i][e] = 0;
            wait_at_barrier(full + 8 * place, phase);
            wait_at_barrier(handed_full + 8 * turn, n / 2 & 1);
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const uint4 s = *(const uint4*)(handed + k * BLOCK);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const uint4 q = block(Q_AT, k * 4 + i);
                    mma(o[2 * i], s.x, s.y, s.z, s.w, q.x, q.z);
                    mma(o[2 * i + 1], s.x, s.y, s.z, s.w, q.y, q.w);
                }
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const uint4 u = *(const uint4*)(handed + (8 + j) * BLOCK);
#pragma unroll
                for (int i = j; i < 4; i++) {
                    const uint4 P = block(P_AT, i * (i + 1) / 2 + j);
                    mma(o[2 * i], u.x, u.y, u.z, u.w, P.x, P.z);
                    mma(o[2 * i + 1], u.x, u.y, u.z, u.w, P.y, P.w);
                }
            }
            release();
            if (lane == 0) arrive_at_barrier(handed_empty + 8 * turn);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int t = first + n * CHUNK + 8 * i + row;
                const u32 x = transpose_matrix(pack(o[i][0], o[i][1])), y = transpose_matrix(pack(o[i][2], o[i][3]));
                bf16* to = out + ((long long)t * H + h) * K + rows + column;
                if (t < end) *(u32*)to = x, *(u32*)(to + 8) = y;
            }
        }
        return;
    }

    auto at = [&](long long of) { return state + ((of * H + h) * K + rows + row) * K + column; };
    auto write = [&](const float (&S)[16][4], State* to) {
#pragma unroll
        for (int i = 0; i < 16; i++) {
            store_state(to + 8 * i, S[i][0], S[i][1]);
            store_state(to + 8 * K + 8 * i, S[i][2], S[i][3]);
        }
    };
    float S[16][4];
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const float2 x = load_state(at(slot) + 8 * i), y = load_state(at(slot) + 8 * K + 8 * i);
        S[i][0] = x.x, S[i][1] = x.y, S[i][2] = y.x, S[i][3] = y.y;
    }
#pragma unroll 1
    for (int n = 0; n < chunks; n++) {
        const int save = saves[begin + n], turn = n % 2;
        u8* handed = handed_here + turn * HANDED;
        wait_at_barrier(full + 8 * place, phase);
        if (n > 1) wait_at_barrier(handed_empty + 8 * turn, (n / 2 - 1) & 1);

        float u[8][4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint4 x = block(U_AT, part * 4 + i);
            float(&a)[4] = u[2 * i], (&b)[4] = u[2 * i + 1];
            a[0] = low(x.x), a[1] = high(x.x), a[2] = low(x.y), a[3] = high(x.y);
            b[0] = low(x.z), b[1] = high(x.z), b[2] = low(x.w), b[3] = high(x.w);
        }
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const float(&x)[4] = S[2 * k], (&y)[4] = S[2 * k + 1];
            const uint4 s = make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(y[0], y[1]), pack(y[2], y[3]));
            *(uint4*)(handed + k * BLOCK) = s;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint4 w = block(W_AT, k * 4 + i);
                mma(u[2 * i], s.x, s.y, s.z, s.w, w.x, w.z);
                mma(u[2 * i + 1], s.x, s.y, s.z, s.w, w.y, w.w);
            }
        }
        uint4 U[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float(&x)[4] = u[2 * i], (&y)[4] = u[2 * i + 1];
            U[i] = make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(y[0], y[1]), pack(y[2], y[3]));
            *(uint4*)(handed + (8 + i) * BLOCK) = U[i];
        }
        __syncwarp();
        if (lane == 0) arrive_at_barrier(handed_full + 8 * turn);
        const float* decays = (const float*)(shared + place * STAGE + A_AT) + column;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const float2 a = *(const float2*)(decays + 8 * i);
            S[i][0] *= a.x, S[i][1] *= a.y, S[i][2] *= a.x, S[i][3] *= a.y;
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const uint4 x = block(K_AT, k * 4 + i);
                mma(S[2 * k], U[i].x, U[i].y, U[i].z, U[i].w, x.x, x.y);
                mma(S[2 * k + 1], U[i].x, U[i].y, U[i].z, U[i].w, x.z, x.w);
            }
        release();
        if (save > 0) write(S, at(save));
    }
    write(S, at(slot));
}
