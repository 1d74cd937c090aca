// Carries states across the chunks of prompts, for Hopper: what kda_chunks.cu makes of every chunk, in order. It says what
// the parts are, and chunk_tiles.cuh how they lie in memory.
//
// A block has 32 rows of V of a head's state, and walks a sequence. Of each 16 rows one warp keeps the state, in fp32, as
// the matrix unit's result C, and packs it to bf16 for its operand a; two others make outputs, in turn, of what the first
// hands over: the state before a chunk, and U. For a chunk
//
//     U^T = U0^T + S (-W)^T,    S <- S a + U^T K,    O = Q S^T + P U
//
// and outputs are normalised over a head's V, and gated. Their squares are summed up by the rows of a warp and by token,
// written where the head's other blocks look for them, and read until theirs are there. A sum is its own flag: it
// replaces NOT_YET. The blocks of a head are neighbours in the grid, so that the first ones that have not ended are all
// there and go on.
//
// Where heads are few, a long sequence is walked in `count` segments side by side (SPLIT), from the states that
// segments.cu makes for them.
//
// Another warp fetches the parts of the next chunks to a ring in shared memory, and one of a head's first block moves the
// convolution's states on, which nothing reads any more.
//
// Macros: STATE_BF16, 1 for states stored in bf16, 0 for fp32. NORM_BF16, for the norm's weight. SPLIT, 1 if `count` may
// be above 1.

#include "hopper.cuh"
#include "delta.cuh"
#include "walk.cuh"

// Warps that keep states, that make outputs for one of them, that of the fetches, and that of the convolution's states. A
// multiprocessor's quarter has every fourth warp: outputs are made on other quarters than states.
constexpr int WARPS = 2, OUTS = 2, FETCHES = 4, MOVES = 5, THREADS = 256, STAGES = 3;
constexpr int SLICES = 8 / WARPS, U_BYTES = WARPS * 4 * BLOCK, STAGE = U_AT + U_BYTES;
constexpr int HANDED = 12 * BLOCK;  // the state's 8 blocks of 16 by 16 and U's 4
#if NORM_BF16
typedef bf16 Weight;
__device__ __forceinline__ float load_weight(const Weight* from) { return from_bf16(*from); }
#else
typedef float Weight;
__device__ __forceinline__ float load_weight(const Weight* from) { return *from; }
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    states(u8* work, const bf16* qkv, const bf16* gate, const Weight* norm_weight, bf16* conv_state, State* state,
           const long long* slots, const int* offsets, const int* firsts, const int* saves, const u8* moves, bf16* out,
           long long qkv_stride, long long gate_stride, float eps, int H, int count) {
    const int tid = threadIdx.x, lane = tid % 32;
    const int warp = __shfl_sync(~0u, tid / 32, 0), part = warp % WARPS;
    const int slice = blockIdx.x % SLICES, h = blockIdx.x / SLICES % H;
    const int segment = blockIdx.x / SLICES / H % count, sequence = blockIdx.x / SLICES / H / count;
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

    // Tokens of the sequence, and chunks of the segment, of which `begin` is the first.
    const int end = offsets[sequence + 1], all = (end - offsets[sequence] + CHUNK - 1) / CHUNK;
    const int skipped = first_of_segment(segment, count, all), first = offsets[sequence] + skipped * CHUNK;
    const int chunks = first_of_segment(segment + 1, count, all) - skipped, begin = firsts[sequence] + skipped;
    if (chunks == 0) return;

    if (warp == FETCHES) {
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
        return;
    }

    const int rows = (slice * WARPS + part) * 16, row = lane / 4, column = 2 * (lane % 4);
    u8* const handed_here = shared + STAGES * STAGE + part * 2 * HANDED + lane * 16;
    int place = 0;
    u32 phase = 0;
    auto block = [&](int part_at, int i) {
        return *(const uint4*)(shared + place * STAGE + part_at + i * BLOCK + lane * 16);
    };
    const u32 nothing = (u32)H >> 20;
    auto release = [&](int by, u32 seen) {  // and goes on by so many chunks
        __syncwarp();
        if (lane == 0) arrive_once_read(empty + 8 * place, seen, nothing);
        place += by;
        if (place >= STAGES) place -= STAGES, phase ^= 1;
    };

    if (slice == 0 && segment == 0 && warp == MOVES) {
        const int C = 3 * H * K, length = end - first;
#pragma unroll 2
        for (int i = lane; i < 3 * K / 2; i += 32) {
            const int channel = (i / 64 * H + h) * K + i % 64 * 2;
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
    if (warp == MOVES) return;

    if (warp >= WARPS) {
        float weight[4];
#pragma unroll
        for (int e = 0; e < 4; e++) weight[e] = load_weight(norm_weight + rows + column + e / 2 * 8 + e % 2);
        // Of the chunk before among this warp's: token 8 i + row of it, two values and those 8 behind, and its gates.
        float kept[8][4];
        u32 gates[8][2];
        uint2 told[8];
        auto sums_of = [&](int n) { return work + ((long long)(begin + n) * H + h) * WORK + SUMS_AT + lane * 8; };
        auto ask = [&](int n) {
#pragma unroll
            for (int p = 0; p < 8; p++) told[p] = ask_blocks((const u32*)(sums_of(n) + p * SUMS));
        };
        auto load_gates = [&](int n) {
            const int t = first + n * CHUNK + row;
            const bf16* from = gate + t * gate_stride + h * K + rows + column;
#pragma unroll
            for (int i = 0; i < 8; i++, from += 8 * gate_stride) {
                const bool there = t + 8 * i < end;
                gates[i][0] = there ? *(const u32*)from : 0, gates[i][1] = there ? *(const u32*)(from + 8) : 0;
            }
        };
        auto finish = [&](int n) {
            auto missing = [&] {
                bool any = false;
#pragma unroll
                for (int p = 0; p < 8; p++) any |= told[p].x == NOT_YET || told[p].y == NOT_YET;
                return any;
            };
            while (missing()) ask(n);
            // Of tokens 16 (lane % 4) + row, and of those 8 behind.
            float factors[2] = {};
#pragma unroll
            for (int p = 0; p < 8; p++)
                factors[0] += __uint_as_float(told[p].x), factors[1] += __uint_as_float(told[p].y);
#pragma unroll
            for (int e = 0; e < 2; e++) factors[e] = rsqrtf(factors[e] * (1.0f / K) + eps);
            __syncwarp();
            const int t = first + n * CHUNK + row;
            bf16* to = out + ((long long)t * H + h) * K + rows + column;
#pragma unroll
            for (int i = 0; i < 8; i++, to += 8 * H * K) {
                const float factor = __shfl_sync(~0u, factors[i % 2], lane / 4 * 4 + i / 2);
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const u32 g = gates[i][e];
                    const u32 y = pack(kept[i][2 * e] * factor * weight[2 * e] * sigmoid(low(g)),
                                       kept[i][2 * e + 1] * factor * weight[2 * e + 1] * sigmoid(high(g)));
                    if (t + 8 * i < end) *(u32*)(to + 8 * e) = y;
                }
            }
        };
        auto make = [&](float (&o)[8][4], int n) {  // 16 tokens, 8 values, twice of each; and tells their squares
            const int turn = n % 2;
            const u8* handed = handed_here + turn * HANDED;
#pragma unroll
            for (int i = 0; i < 8; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) o[i][e] = 0;
            wait_at_barrier(full + 8 * place, phase);
            wait_at_barrier(handed_full + 8 * turn, n / 2 & 1);
            // 8 blocks of S and Q, and then 4 of U and P, each on its way while products of the one before are made.
            uint4 x[2], y[2][4];
            auto load = [&](int k) {
                x[k % 2] = *(const uint4*)(handed + k * BLOCK);
#pragma unroll
                for (int i = max(0, k - 8); i < 4; i++)
                    y[k % 2][i] = k < 8 ? block(Q_AT, k * 4 + i) : block(P_AT, i * (i + 1) / 2 + k - 8);
            };
            load(0);
#pragma unroll
            for (int k = 0; k < 12; k++) {
                if (k < 11) load(k + 1);
                // Of its own, or the pairs of operand b would be put together for each product.
                const u32 x0 = x[k % 2].x ^ nothing, x1 = x[k % 2].y ^ nothing;
                const u32 x2 = x[k % 2].z ^ nothing, x3 = x[k % 2].w ^ nothing;
#pragma unroll
                for (int i = max(0, k - 8); i < 4; i++) {
                    const uint4 z = y[k % 2][i];
                    mma(o[2 * i], z.x, z.y, z.z, z.w, x0, x2);
                    mma(o[2 * i + 1], z.x, z.y, z.z, z.w, x1, x3);
                }
            }
            const u32 seen = seen_of(o);
            release(OUTS, seen);
            if (lane == 0) arrive_once_read(handed_empty + 8 * turn, seen, nothing);
            float squares[8];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float(&x)[4] = o[i / 2 * 2], (&y)[4] = o[i / 2 * 2 + 1];
                const int e = i % 2 * 2;
                squares[i] = x[e] * x[e] + x[e + 1] * x[e + 1] + y[e] * y[e] + y[e + 1] * y[e + 1];
            }
            halve<4>(squares, lane, 2), halve<2>(squares, lane, 1);
            u32* const sums = (u32*)(sums_of(n) + rows / 16 * SUMS);
            tell_blocks(sums, __float_as_uint(squares[0]), __float_as_uint(squares[1]));
        };
        place = warp / 4;
#pragma unroll 1
        for (int n = place; n < chunks + OUTS; n += OUTS) {
            const bool more = n < chunks, behind = n >= OUTS;
            float o[8][4];
            if (behind) ask(n - OUTS), load_gates(n - OUTS);
            if (more) make(o, n);
            if (behind) finish(n - OUTS);
            if (more)
#pragma unroll
                for (int i = 0; i < 8; i++)
#pragma unroll
                    for (int e = 0; e < 4; e++) kept[i][e] = o[i / 2 * 2 + e / 2][i % 2 * 2 + e % 2];
        }
        return;
    }

    State* const own = state + (h * K + rows + row) * K + column;  // of slot 0
    auto at = [&](long long of) { return own + of * H * K * K; };
    float S[16][4];
    if (segment == 0) read_rows(S, at(slots[sequence]));
#if SPLIT
    else move_rows(S, moves + ((long long)sequence * (count - 1) * H + h) * MOVE, (long long)H * MOVE, rows, lane, segment);
#endif
#pragma unroll 1
    for (int n = 0; n < chunks; n++) {
        const int save = saves[begin + n], turn = n % 2;
        u8* handed = handed_here + turn * HANDED;
        const u8* stage = shared + place * STAGE;
        wait_at_barrier(full + 8 * place, phase);
        if (n > 1) wait_at_barrier(handed_empty + 8 * turn, (n / 2 - 1) & 1);
        float u[8][4];
        read_U(u, stage + U_AT + part * 4 * BLOCK + lane * 16);
        const float* decays = (const float*)(stage + A_AT) + column;
        auto hand = [&](int i, uint4 x) { *(uint4*)(handed + i * BLOCK) = x; };
        step(S, u, stage + W_AT + lane * 16, stage + K_AT + lane * 16, decays, hand, [&] {
            __syncwarp();
            if (lane == 0) arrive_at_barrier(handed_full + 8 * turn);
        });
        release(1, seen_of(S));
        if (save > 0) write_rows(S, at(save));
    }
    if (skipped + chunks == all) write_rows(S, at(slots[sequence]));
}
