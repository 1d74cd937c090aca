// Carries states across the chunks of prompts of Gated DeltaNet, for Hopper: what gdn_chunks.cu makes of every chunk, in
// order. It says what the parts are, and gdn.cuh where they lie.
//
// A block has 64 rows of V of a head's state, and walks a sequence. One warpgroup keeps the state in fp32, as the matrix
// unit's result, and hands over, in bf16, the state before each chunk, and U. Two others make outputs of these, in turn,
// and normalise them over a head's V, and gate them: their squares are summed up by token, written where the head's other
// block looks for them, and read until its own are there. A sum is its own flag: it replaces NOT_YET. The blocks of a head
// are neighbours in the grid, so that the first ones that have not ended are all there and go on.
//
// Where heads are few, a long sequence is walked in `count` segments side by side (SPLIT), from the states that
// gdn_segments.cu makes for them.
//
// A warp of the fourth warpgroup fetches the parts of the next chunks to a ring in shared memory, and one of a head's
// first block moves the convolution's states on, which nothing reads any more.
//
// Macros: STATE_BF16, 1 for states stored in bf16, 0 for fp32. NORM_BF16, for the norm's weight. RATIO, value heads per
// key head. SPLIT, 1 if `count` may be above 1.

#include "hopper.cuh"
#include "matrix_unit.cuh"
#include "delta.cuh"
#include "walk.cuh"
#include "gdn.cuh"
#include "gdn_walk.cuh"

constexpr int OUTS = 2, FETCHES = 12, MOVES = 13, THREADS = 512, STAGES = 3, SLICES = K / ROWS;
constexpr int OF_BOTH = FACTORS_AT + FACTORS;  // what both blocks of a head need
constexpr int STAGE = SHARED_BY_HEADS + OF_BOTH + ROWS_BYTES;
constexpr int HANDED = 3 * SLAB;  // the state, and U
#if NORM_BF16
typedef bf16 Weight;
__device__ __forceinline__ float load_weight(const Weight* from) { return from_bf16(*from); }
#else
typedef float Weight;
__device__ __forceinline__ float load_weight(const Weight* from) { return *from; }
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    gdn_states(u8* work, const bf16* qkv, const bf16* gate, const Weight* norm_weight, bf16* conv_state, State* state,
               const long long* slots, const int* offsets, const int* firsts, const int* saves, const u8* moves, bf16* out,
               long long qkv_stride, long long gate_stride, float eps, int H, int count) {
    const int tid = threadIdx.x, lane = tid % 32;
    const int warp = __shfl_sync(~0u, tid / 32, 0), group = warp / 4, part = warp % 4;
    const int slice = blockIdx.x % SLICES, h = blockIdx.x / SLICES % H, key_heads = H / RATIO;
    const int segment = blockIdx.x / SLICES / H % count, sequence = blockIdx.x / SLICES / H / count;
    extern __shared__ __align__(128) u8 shared[];
    __shared__ u64 full_s[STAGES], empty_s[STAGES], handed_full_s[OUTS], handed_empty_s[OUTS];
    __shared__ float weight_s[ROWS];
    const u32 full = shared_address(full_s), empty = shared_address(empty_s);
    const u32 handed_full = shared_address(handed_full_s), handed_empty = shared_address(handed_empty_s);
    const u32 ring = (shared_address(shared) + 1023) / 1024 * 1024;  // slabs begin where swizzles do
    const u8* const ring_at = shared + (ring - shared_address(shared));
    const u32 handed = ring + STAGES * STAGE;

    start_kernel_behind();
    if (tid == 0) {
        for (int i = 0; i < STAGES; i++) init_barrier(full + 8 * i), init_barrier(empty + 8 * i, 8);
        for (int i = 0; i < OUTS; i++) init_barrier(handed_full + 8 * i, 4), init_barrier(handed_empty + 8 * i, 4);
        share_barriers();
    }
    if (tid < ROWS) weight_s[tid] = load_weight(norm_weight + slice * ROWS + tid);
    __syncthreads();
    wait_for_kernel_ahead();

    // Tokens of the sequence, and chunks of the segment, of which `begin` is the first.
    const int end = offsets[sequence + 1], all = (end - offsets[sequence] + CHUNK - 1) / CHUNK;
    const int skipped = first_of_segment(segment, count, all), first = offsets[sequence] + skipped * CHUNK;
    const int chunks = first_of_segment(segment + 1, count, all) - skipped, begin = firsts[sequence] + skipped;
    if (chunks == 0) return;
    const long long chunk_bytes = (long long)key_heads * (SHARED_BY_HEADS + RATIO * OF_HEAD);
    u8* const keys_of = work + begin * chunk_bytes + (h / RATIO) * (SHARED_BY_HEADS + RATIO * OF_HEAD);
    u8* const head_of = keys_of + SHARED_BY_HEADS + h % RATIO * OF_HEAD;

    if (group == 3) {
        give_registers_back<48>();
        if (warp == FETCHES && lane == 0) {
#pragma unroll 1
            for (int i = 0; i < chunks; i++) {
                const int place = i % STAGES;
                const u32 to = ring + place * STAGE, barrier = full + 8 * place;
                if (i >= STAGES) wait_at_barrier(empty + 8 * place, (i / STAGES - 1) & 1);
                expect_bytes(barrier, STAGE);
                copy_bytes(to, keys_of + i * chunk_bytes, SHARED_BY_HEADS, barrier);
                copy_bytes(to + SHARED_BY_HEADS, head_of + i * chunk_bytes, OF_BOTH, barrier);
                copy_bytes(to + SHARED_BY_HEADS + OF_BOTH, head_of + i * chunk_bytes + VALUES_AT + slice * ROWS_BYTES,
                           ROWS_BYTES, barrier);
            }
        }
        if (slice == 0 && segment == 0 && warp == MOVES) {
            const int C = (2 * key_heads + H) * K, length = end - first;
#pragma unroll 1
            for (int i = h % RATIO ? K + lane : lane; i < 3 * K / 2; i += 32) {
                const int p = i / 64, channel = (p < 2 ? p * key_heads + h / RATIO : 2 * key_heads + h) * K + i % 64 * 2;
                bf16* remembered = conv_state + slots[sequence] * 3 * C + channel;
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

    const int row = lane / 4, column = 2 * (lane % 4), rows = slice * ROWS + part * 16;
    const u32 nothing = (u32)H >> 20;
    int place = 0;
    u32 phase = 0;
    auto release = [&](int by, u32 seen) {  // and goes on by so many chunks
        __syncwarp();
        if (lane == 0) arrive_once_read(empty + 8 * place, seen, nothing);
        place += by;
        if (place >= STAGES) place -= STAGES, phase ^= 1;
    };

    if (group > 0) {
        // Of the chunk before among this warpgroup's: tokens of this warp's 16, row and 8 below it, of 8 columns each two
        // values, and their gates.
        float kept[32];
        u32 gates[16];
        uint2 told[2];
        auto squares_of = [&](int n, int half) {
            return (u32*)(head_of + n * chunk_bytes + SQUARES_AT + half * SQUARES + (part * 8 + row) * 8);
        };
        auto ask = [&](int n) {
#pragma unroll
            for (int p = 0; p < 2; p++) told[p] = ask_blocks(squares_of(n, p));
        };
        auto load_gates = [&](int n) {
            const int t = first + n * CHUNK + part * 16 + row;
            const bf16* from = gate + t * gate_stride + h * K + slice * ROWS + column;
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int i = 0; i < 8; i++)
                    gates[2 * i + r] = t + 8 * r < end ? *(const u32*)(from + 8 * r * gate_stride + 8 * i) : 0;
        };
        auto finish = [&](int n) {
            auto missing = [&](uint2 x) { return x.x == NOT_YET || x.y == NOT_YET; };
            while (missing(told[0]) || missing(told[1])) ask(n);
            const float a = __uint_as_float(told[0].x) + __uint_as_float(told[1].x);
            const float b = __uint_as_float(told[0].y) + __uint_as_float(told[1].y);
            const float factors[2] = {rsqrtf(a * (1.0f / K) + eps), rsqrtf(b * (1.0f / K) + eps)};
            const int t = first + n * CHUNK + part * 16 + row;
            bf16* to = out + ((long long)t * H + h) * K + slice * ROWS + column;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float2 w = *(const float2*)(weight_s + 8 * i + column);
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const float g = low(gates[2 * i + r]), other = high(gates[2 * i + r]);
                    const u32 y = pack(kept[4 * i + 2 * r] * factors[r] * w.x * g * sigmoid(g),
                                       kept[4 * i + 2 * r + 1] * factors[r] * w.y * other * sigmoid(other));
                    if (t + 8 * r < end) *(u32*)(to + 8 * r * H * K + 8 * i) = y;
                }
            }
            __syncwarp();
        };
        place = group - 1;
        const u32 turn = group - 1;
        const Operand first_queries = describe(ring + QUERIES_AT, 16), S = describe(handed + turn * HANDED, 16);
        const Operand U = further(S, 2 * SLAB);
        int n = group - 1;
#pragma unroll 1
        for (; n < chunks; n += OUTS) {
            const bool behind = n >= OUTS;
            const Operand queries = further(first_queries, place * STAGE);
            const u8* of_head = ring_at + place * STAGE + SHARED_BY_HEADS;
            if (behind) ask(n - OUTS), load_gates(n - OUTS);
            float o[32];
            wait_at_barrier(full + 8 * place, phase);
            wait_at_barrier(handed_full + 8 * turn, n / OUTS & 1);
            begin_products();
#pragma unroll
            for (int k = 0; k < 8; k++)
                multiply<4, false>(o, further(queries, k / 4 * SLAB + k % 4 * 32), further(S, k / 4 * SLAB + k % 4 * 32), k > 0);
            commit_products();
            if (behind) finish(n - OUTS);
            u32 P[4][4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                uint4 p = make_uint4(0, 0, 0, 0);
                if (j <= part) p = *(const uint4*)(of_head + PAIRS_AT + (part * (part + 1) / 2 + j) * BLOCK + lane * 16);
                P[j][0] = p.x, P[j][1] = p.y, P[j][2] = p.z, P[j][3] = p.w;
            }
            const float* from_start = (const float*)(of_head + FACTORS_AT) + part * 16 + row;
            wait_for_products<0>();
            settle(o);
#pragma unroll
            for (int i = 0; i < 32; i++) o[i] *= from_start[i / 2 % 2 * 8];
            begin_products();
#pragma unroll
            for (int j = 0; j < 4; j++) multiply_left<4>(o, P[j], further(U, j * 32));
            commit_products();
            wait_for_products<0>();
            settle(o);
            keep(P);
            float squares[2] = {};
#pragma unroll
            for (int i = 0; i < 32; i++) kept[i] = o[i], squares[i / 2 % 2] += o[i] * o[i];
            release(OUTS, __float_as_uint(o[0]) | __float_as_uint(o[2]));
            if (lane == 0) arrive_at_barrier(handed_empty + 8 * turn);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                squares[r] += __shfl_xor_sync(~0u, squares[r], 1);
                squares[r] += __shfl_xor_sync(~0u, squares[r], 2);
            }
            if (lane % 4 == 0)
                tell_blocks(squares_of(n, slice), __float_as_uint(squares[0]), __float_as_uint(squares[1]));
        }
        if (n >= OUTS) ask(n - OUTS), load_gates(n - OUTS), finish(n - OUTS);
        return;
    }

    take_registers<208>();
    State* const own = state + (h * K + rows + row) * K + column;  // of slot 0
    auto at = [&](long long of) { return own + of * H * K * K; };
    float S[64];
    float(&by_8)[16][4] = *(float(*)[16][4])S;
    if (segment == 0) read_rows(by_8, at(slots[sequence]));
#if SPLIT
    else move_rows(by_8, moves + ((long long)sequence * (count - 1) * H + h) * MOVE, (long long)H * MOVE, rows, lane, segment);
#endif
    // This lane's row of the matrices that it hands over: of 16 rows and 16 columns.
    const int handed_row = part * 16 + lane % 16;
    auto hand = [&](u32 slab, int piece, const u32(&x)[4]) {
        store_matrices(slab + handed_row * 128 + ((piece + lane / 16) ^ handed_row % 8) * 16, x);
    };
    const Operand keys = describe(ring + KEYS_AT, 16), keys_by_columns = describe(ring + KEYS_AT, SLAB);
    const Operand T = describe(ring + SHARED_BY_HEADS + T_AT, 16);
#pragma unroll 1
    for (int n = 0; n < chunks; n++) {
        const int save = saves[begin + n], turn = n % OUTS;
        const u32 S_at = handed + turn * HANDED, U_at = S_at + 2 * SLAB;
        const u8* of_head = ring_at + place * STAGE + SHARED_BY_HEADS;
        wait_at_barrier(full + 8 * place, phase);
        if (n >= OUTS) wait_at_barrier(handed_empty + 8 * turn, (n / OUTS - 1) & 1);
        const u32 stage = place * STAGE;
        const Chunk chunk = {further(keys, stage), further(keys_by_columns, stage), further(T, stage),
                             of_head + OF_BOTH + in_values(part, lane), (const float*)(of_head + FACTORS_AT)};
        auto hand_S = [&](const u32(&s)[8][4]) {
#pragma unroll
            for (int k = 0; k < 8; k++) hand(S_at + k / 4 * SLAB, k % 4 * 2, s[k]);
        };
        auto hand_U = [&](const u32(&U)[4][4]) {
#pragma unroll
            for (int j = 0; j < 4; j++) hand(U_at, 2 * j, U[j]);
            share_writes();
            __syncwarp();
            if (lane == 0) arrive_at_barrier(handed_full + 8 * turn);
        };
        step<true>(S, chunk, hand_S, hand_U);
        release(1, __float_as_uint(S[0]));
        if (save > 0) write_rows(by_8, at(save));
    }
    if (skipped + chunks == all) write_rows(by_8, at(slots[sequence]));
}
