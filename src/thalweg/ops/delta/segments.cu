// The state at the beginning of every segment of long sequences, for states.cu to walk the segments side by side where
// heads are few. A segment of chunks makes S M + B of the state S before it. Both come by steps as states.cu makes them:
// B from a state of 0, M from the identity, with U0 = 0. Of the first segment, B comes from the sequence's own state, and
// M is not asked for; of the last one, neither.
//
// A block has 64 rows, 16 to a warp, of B (the first two blocks of a segment of a head) or of M. The last warp fetches.
//
// Macros: STATE_BF16, see walk.cuh. STAGES of the ring.

#include "hopper.cuh"
#include "delta.cuh"
#include "walk.cuh"

constexpr int WARPS = 4, U_BYTES = WARPS * 4 * BLOCK;
constexpr int DECAYS = 4 * K, STAGE = 2 * TILE + DECAYS + U_BYTES;  // W, K, decays, U

extern "C" __global__ void __launch_bounds__(32 * (WARPS + 1))
    segments(const u8* work, const State* state, const long long* slots, const int* offsets, const int* firsts,
             u8* moves, int H, int count) {
    const int tid = threadIdx.x, lane = tid % 32, warp = __shfl_sync(~0u, tid / 32, 0);
    const int quarter = blockIdx.x % 4, h = blockIdx.x / 4 % H, segment = blockIdx.x / 4 / H % (count - 1);
    const int sequence = blockIdx.x / 4 / H / (count - 1);
    const bool of_M = quarter >= 2;
    extern __shared__ __align__(128) u8 shared[];
    __shared__ u64 full_s[STAGES], empty_s[STAGES];
    const u32 full = shared_address(full_s), empty = shared_address(empty_s), ring = shared_address(shared);

    start_kernel_behind();
    if (tid == 0) {
        for (int i = 0; i < STAGES; i++) init_barrier(full + 8 * i), init_barrier(empty + 8 * i, WARPS);
        share_barriers();
    }
    __syncthreads();
    wait_for_kernel_ahead();

    const int all = (offsets[sequence + 1] - offsets[sequence] + CHUNK - 1) / CHUNK;
    const int begin = first_of_segment(segment, count, all), end = first_of_segment(segment + 1, count, all);
    if (begin == end || (of_M && segment == 0)) return;

    if (warp == WARPS) {
        const u8* from = work + ((long long)(firsts[sequence] + begin) * H + h) * WORK;
        const u32 bytes = STAGE - (of_M ? U_BYTES : 0);
        if (lane == 0)
#pragma unroll 1
            for (int n = 0; n < end - begin; n++, from += (long long)H * WORK) {
                const int place = n % STAGES;
                const u32 to = ring + place * STAGE, barrier = full + 8 * place;
                if (n >= STAGES) wait_at_barrier(empty + 8 * place, (n / STAGES - 1) & 1);
                expect_bytes(barrier, bytes);
                copy_bytes(to, from + W_AT, TILE, barrier);
                copy_bytes(to + TILE, from + K_AT, TILE, barrier);
                copy_bytes(to + 2 * TILE, from + A_AT, DECAYS, barrier);
                if (!of_M) copy_bytes(to + 2 * TILE + DECAYS, from + U_AT + quarter * U_BYTES, U_BYTES, barrier);
            }
        return;
    }

    const int rows = (quarter % 2 * WARPS + warp) * 16, row = lane / 4, column = 2 * (lane % 4);
    float S[16][4];
    if (segment == 0) {
        read_rows(S, state + ((slots[sequence] * H + h) * K + rows + row) * K + column);
    } else {
#pragma unroll
        for (int i = 0; i < 16; i++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                S[i][e] = of_M && rows + row + e / 2 * 8 == 8 * i + column + e % 2 ? 1.0f : 0.0f;
    }
    const u32 nothing = (u32)H >> 20;
    int place = 0;
    u32 phase = 0;
#pragma unroll 1
    for (int n = begin; n < end; n++) {
        const u8* stage = shared + place * STAGE + lane * 16;
        wait_at_barrier(full + 8 * place, phase);
        float u[8][4];
        if (of_M) {
#pragma unroll
            for (int i = 0; i < 8; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) u[i][e] = 0;
        } else {
            read_U(u, stage + 2 * TILE + DECAYS + warp * 4 * BLOCK);
        }
        const float* decays = (const float*)(shared + place * STAGE + 2 * TILE) + column;
        step(S, u, stage, stage + TILE, decays, [](int, uint4) {}, [] {});
        __syncwarp();
        if (lane == 0) arrive_once_read(empty + 8 * place, seen_of(S), nothing);
        if (++place == STAGES) place = 0, phase ^= 1;
    }

    write_moves(S, moves + (((long long)sequence * (count - 1) + segment) * H + h) * MOVE + lane * 16, rows, of_M);
}
