// What segments.cu is for KDA, for Gated DeltaNet: the state at the beginning of every segment of long sequences, for
// gdn_states.cu to walk the segments side by side where heads are few. A segment of chunks makes S M + B of the state S
// before it. Both come by steps as gdn_states.cu makes them: B from a state of 0, M from the identity, with V = 0. Of the
// first segment, B comes from the sequence's own state, and M is not asked for; of the last one, neither.
//
// A block has 64 rows of B (the first two blocks of a segment of a head) or of M, in a warpgroup. A warp more fetches.
//
// Macros: STATE_BF16, see walk.cuh. RATIO, value heads per key head. STAGES of the ring.

#include "hopper.cuh"
#include "matrix_unit.cuh"
#include "delta.cuh"
#include "walk.cuh"
#include "gdn.cuh"
#include "gdn_walk.cuh"

constexpr int STAGE = 3 * SLAB + FACTORS + ROWS_BYTES;  // keys, T, factors, V

extern "C" __global__ void __launch_bounds__(160, 2)
    gdn_segments(const u8* work, const State* state, const long long* slots, const int* offsets, const int* firsts,
                 u8* moves, int H, int count) {
    const int tid = threadIdx.x, lane = tid % 32, warp = __shfl_sync(~0u, tid / 32, 0);
    const int quarter = blockIdx.x % 4, h = blockIdx.x / 4 % H, segment = blockIdx.x / 4 / H % (count - 1);
    const int sequence = blockIdx.x / 4 / H / (count - 1);
    const bool of_M = quarter >= 2;
    extern __shared__ __align__(128) u8 shared[];
    __shared__ u64 full_s[STAGES], empty_s[STAGES];
    const u32 full = shared_address(full_s), empty = shared_address(empty_s);
    const u32 ring = (shared_address(shared) + 1023) / 1024 * 1024;
    const u8* const ring_at = shared + (ring - shared_address(shared));

    start_kernel_behind();
    if (tid == 0) {
        for (int i = 0; i < STAGES; i++) init_barrier(full + 8 * i), init_barrier(empty + 8 * i, 4);
        share_barriers();
    }
    __syncthreads();
    wait_for_kernel_ahead();

    const int all = (offsets[sequence + 1] - offsets[sequence] + CHUNK - 1) / CHUNK;
    const int begin = first_of_segment(segment, count, all), end = first_of_segment(segment + 1, count, all);
    if (begin == end || (of_M && segment == 0)) return;

    if (warp == 4) {
        const long long chunk_bytes = (long long)(H / RATIO) * (SHARED_BY_HEADS + RATIO * OF_HEAD);
        const u8* keys = work + (firsts[sequence] + begin) * chunk_bytes + (h / RATIO) * (SHARED_BY_HEADS + RATIO * OF_HEAD);
        const u8* of_head = keys + SHARED_BY_HEADS + h % RATIO * OF_HEAD;
        const u32 bytes = STAGE - (of_M ? ROWS_BYTES : 0);
        if (lane == 0)
#pragma unroll 1
            for (int n = 0; n < end - begin; n++, keys += chunk_bytes, of_head += chunk_bytes) {
                const int place = n % STAGES;
                const u32 to = ring + place * STAGE, barrier = full + 8 * place;
                if (n >= STAGES) wait_at_barrier(empty + 8 * place, (n / STAGES - 1) & 1);
                expect_bytes(barrier, bytes);
                copy_bytes(to, keys + KEYS_AT, 2 * SLAB, barrier);
                copy_bytes(to + 2 * SLAB, of_head + T_AT, SLAB, barrier);
                copy_bytes(to + 3 * SLAB, of_head + FACTORS_AT, FACTORS, barrier);
                if (!of_M)
                    copy_bytes(to + 3 * SLAB + FACTORS, of_head + VALUES_AT + quarter * ROWS_BYTES, ROWS_BYTES, barrier);
            }
        return;
    }

    const int rows = quarter % 2 * ROWS + warp * 16, row = lane / 4, column = 2 * (lane % 4);
    float S[64];
    float(&by_8)[16][4] = *(float(*)[16][4])S;
    if (segment == 0) {
        read_rows(by_8, state + ((slots[sequence] * H + h) * K + rows + row) * K + column);
    } else {
#pragma unroll
        for (int i = 0; i < 64; i++)
            S[i] = of_M && rows + row + i / 2 % 2 * 8 == i / 4 * 8 + column + i % 2 ? 1.0f : 0.0f;
    }
    const Operand keys = describe(ring, 16), keys_by_columns = describe(ring, SLAB), T = describe(ring + 2 * SLAB, 16);
    const u32 nothing = (u32)H >> 20;
    const int chunks = end - begin;
    auto wait_for = [&](int n) { wait_at_barrier(full + 8 * (n % STAGES), n / STAGES & 1); };
    auto at = [&](int n) -> Chunk {
        const u32 stage = n % STAGES * STAGE;
        const u8* stage_at = ring_at + stage;
        return {further(keys, stage), further(keys_by_columns, stage), further(T, stage),
                stage_at + 3 * SLAB + FACTORS + in_values(warp, lane), (const float*)(stage_at + 3 * SLAB)};
    };
    auto next = [&](int n, const auto&) {
        if (n + 1 < chunks) wait_for(n + 1);
    };
    auto made = [&](int n) {
        __syncwarp();
        if (lane == 0) arrive_once_read(empty + 8 * (n % STAGES), __float_as_uint(S[32]), nothing);
    };
    auto goes_on = [](int, const auto&) { return true; };
    auto ended = [](int) {};
    wait_for(0);
    if (of_M) walk_chunks<false, false>(S, chunks, at, goes_on, next, made, ended);
    else walk_chunks<true, false>(S, chunks, at, goes_on, next, made, ended);

    write_moves(by_8, moves + (((long long)sequence * (count - 1) + segment) * H + h) * MOVE + lane * 16, rows, of_M);
}
