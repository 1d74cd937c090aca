// y = x w^T for some tokens, up to 128, bound by streaming w once. With ADD a residual is added.
//
// A tile is up to 192 rows of w by all tokens. Rows of w are the left operand of the matrix unit, 64 to a
// warpgroup, and tokens its columns, so that few of them are few products. If a tile has fewer rows, warpgroups share out
// the steps of its columns. One thread asks for w and another for x, by tensor map, 128 bytes of a row at a time, into a
// ring in shared memory; for w before the wait for the kernel ahead. Blocks begin at columns of their own: all read the
// same x.
//
// Every block reads all of x, which becomes as much as its part of w. Two ways out: SPLIT blocks, a cluster, share out
// the columns of one tile of as many times the rows, and add up their sums by distributed shared memory, each for its
// share of the tokens. Or a PAIR of blocks has tiles of its own, and each asks for half of the tokens for both. Sums are
// added in one order.
//
// GATED: w has rows of gate, and as many of up below them; a tile has as many of either; y = silu(gate) * up.
//
// With RANKS of a tile each, sums go over these before the residual is added: a thread writes eight of a token, rounded,
// to every other rank's memory (ranks.cuh) and adds what came from all, in their order.
//
// Macros: UNITS of 16 tokens; SPLIT, 1, 2 or 4; PAIR, 0 or 1, of SPLIT 1; ADD; GATED, without PAIR and ADD, of tiles that
// are all in one round; perhaps RANKS, RANK.

#include "hopper.cuh"
#include "matrix_unit.cuh"
#ifdef RANKS
#include "ranks.cuh"
constexpr int PLACE = 16384;  // bytes that a block writes for a rank at most: ops/all_reduce
#endif

constexpr int TOKENS = 16 * UNITS, STEP_BYTES = 128, CLUSTER = PAIR ? 2 : SPLIT, MAX_STAGES = 24;
constexpr int GROUPS = 3, MULTIPLIERS = 128 * GROUPS, THREADS = MULTIPLIERS + 64;
constexpr int PITCH = 68;  // floats between tokens of a warpgroup's sums: no bank conflicts

// Eight sums of a token, of neighbouring rows.
__device__ __forceinline__ void store_sums(bf16* to, const bf16* residual, float4 a, float4 b) {
    if (ADD) {
        const uint4 r = load16(residual);
        a.x += low(r.x), a.y += high(r.x), a.z += low(r.y), a.w += high(r.y);
        b.x += low(r.z), b.y += high(r.z), b.z += low(r.w), b.w += high(r.w);
    }
    *(uint4*)to = make_uint4(pack(a.x, a.y), pack(a.z, a.w), pack(b.x, b.y), pack(b.z, b.w));
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    some_tokens(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const bf16* residual, bf16* y,
                long long residual_stride, long long y_stride, int T, int O,
                int rows,      // of a tile, a multiple of 8, with GATED of 16
                int steps,     // of 128 bytes of a row
                int stages  // of the ring, a multiple of the warpgroups that share out steps: each has its own
#ifdef RANKS
                ,
                const u64* table, long long bytes
#endif
    ) {
    extern __shared__ __align__(1024) u8 shared[];
    const int tid = threadIdx.x, lane = tid % 32, warp = __shfl_sync(~0u, tid / 32, 0);
    const int groups = (rows + 63) / 64, stage_bytes = (rows + TOKENS) * STEP_BYTES, stage_bytes_of_w = rows * STEP_BYTES;
    const int rank = blockIdx.x % CLUSTER, pitch = (rows + 15) / 16 * 16 + 4;  // floats between a token's sums
    // The ring, barriers, and a warpgroup's sums of 16 tokens. Products may read behind a stage, not behind all.
    const u32 ring = shared_address(shared), full = ring + stages * stage_bytes, empty = full + 8 * MAX_STAGES;
    float* sums_s = (float*)(shared + stages * stage_bytes + 16 * MAX_STAGES);
    if (tid == 0) {
        for (int i = 0; i < stages; i++) init_barrier(full + 8 * i, 2), init_barrier(empty + 8 * i, (1 + PAIR) * 4 * groups);
        share_barriers();
    }
    if (PAIR)
        wait_for_cluster();
    else
        __syncthreads();

    const int from = steps * (SPLIT > 1 ? rank : 0) / SPLIT, span = steps * (SPLIT > 1 ? rank + 1 : 1) / SPLIT - from;
    const int first = blockIdx.x / SPLIT, stride = gridDim.x / SPLIT, tiles = (O + rows - 1) / rows;
    const int rounds = (tiles + stride - 1) / stride;  // a block with fewer tiles has one of zeros, for its partner
    const int ahead = span * (blockIdx.x / CLUSTER) / (gridDim.x / CLUSTER);
    const int phases = rounds > 1 ? 1 : max(1, min(GROUPS / groups, stages / 2));  // of steps, by warpgroups
    auto step_of = [&](int k) { return from + (k + ahead < span ? k + ahead : k + ahead - span); };
    if (tid != MULTIPLIERS) wait_for_kernel_ahead();
#ifdef RANKS
    static_assert(!PAIR && ADD && !GATED);
    Ranks ranks = ranks_of(table, blockIdx.x, bytes);
    if (tid != MULTIPLIERS) begin_exchange(ranks);
#endif
    if (tid == MULTIPLIERS) {  // asks for w
        int stage = 0, phase = 1, n = 0;
#pragma unroll 1
        for (int round = 0; round < rounds; round++)
#pragma unroll 1
            for (int k = 0; k < span; k++, n++) {
                if (n >= stages) wait_at_barrier(empty + 8 * stage, phase);
                expect_bytes(full + 8 * stage, rows * STEP_BYTES);
                const u32 to = ring + stage * stage_bytes;
                const int row = (first + round * stride) * (GATED ? rows / 2 : rows);
                copy_tile(to, &w, step_of(k) * (STEP_BYTES / 2), 0, row, full + 8 * stage);
                if (GATED) copy_tile(to + stage_bytes_of_w / 2, &w, step_of(k) * (STEP_BYTES / 2), 0, O / 2 + row, full + 8 * stage);
                if (++stage == stages) stage = 0, phase ^= 1;
            }
        start_kernel_behind();
        wait_for_kernel_ahead();
#ifdef RANKS
        begin_exchange(ranks);
#endif
    } else if (tid == MULTIPLIERS + 32) {  // asks for x
        int stage = 0, phase = 1, n = 0;
#pragma unroll 1
        for (int round = 0; round < rounds; round++)
#pragma unroll 1
            for (int k = 0; k < span; k++, n++) {
                if (n >= stages) wait_at_barrier(empty + 8 * stage, phase);
                const u32 to = ring + stage * stage_bytes + rows * STEP_BYTES, barrier = full + 8 * stage;
                const int step = step_of(k), half = rank * (TOKENS / 2);
                expect_bytes(barrier, TOKENS * STEP_BYTES);
                if (PAIR)
                    copy_tile_to(3, to + half * STEP_BYTES, &x, step * (STEP_BYTES / 2), half, barrier);
                else
                    copy_tile(to, &x, step * (STEP_BYTES / 2), 0, 0, barrier);
                if (++stage == stages) stage = 0, phase ^= 1;
            }
    } else if (tid < MULTIPLIERS) {
        const int group = warp / 4 % groups, mine = warp / 4 / groups;  // of rows, and of steps
        int stage = mine, phase = 0;
        auto release = [&](int stage) {
            if (lane == 0) arrive_at_barrier(empty + 8 * stage);
            if (PAIR && lane == 0) arrive_at_barrier_of(1 - rank, empty + 8 * stage);
        };
        const int row = 16 * (warp % 4) + lane / 4, token = lane % 4 * 2;
#pragma unroll 1
        for (int round = 0; round < (mine < phases ? rounds : 0); round++) {
            float c[8 * UNITS];
#pragma unroll
            for (int i = 0; i < 8 * UNITS; i++) c[i] = 0;
            settle(c);
            int before = -1;
#pragma unroll 1
            for (int k = mine; k < span; k += phases) {
                wait_at_barrier(full + 8 * stage, phase);
                const u32 left = ring + stage * stage_bytes + group * 64 * STEP_BYTES;
                const u32 right = ring + stage * stage_bytes + rows * STEP_BYTES;
                begin_products();
#pragma unroll
                for (int i = 0; i < STEP_BYTES; i += 32)
                    multiply<UNITS, false>(c, describe(left + i, 16), describe(right + i, 16), 1);
                commit_products();
                wait_for_products<1>();
                if (before >= 0) release(before);
                before = stage;
                stage += phases;
                if (stage >= stages) stage -= stages, phase ^= 1;
            }
            wait_for_products<0>();
            settle(c);
            if (before >= 0) release(before);
            // Sum 4 j + 2 h + e of a thread: of row `row` + 8 h of its warpgroup's, and token 8 j + `token` + e.
            if (rounds == 1) {
                wait_at<MULTIPLIERS>(1);  // all have read the ring, where sums go now
                float* to = (float*)shared + mine * TOKENS * pitch + 64 * group + row;
#pragma unroll
                for (int i = 0; i < 8 * UNITS; i++)
                    if (64 * group + row + i / 2 % 2 * 8 < rows)
                        to[(8 * (i / 4) + token + i % 2) * pitch + i / 2 % 2 * 8] = c[i];
                continue;
            }
            float* of_group = sums_s + group * 16 * PITCH;
            const int within = 64 * group + tid % 8 * 8, place = (first + round * stride) * rows + within;
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
#pragma unroll
                for (int i = 0; i < 8; i++)
                    of_group[(8 * (i / 4) + token + i % 2) * PITCH + row + i / 2 % 2 * 8] = c[8 * u + i];
                wait_at<128>(2 + group);
                const int t = 16 * u + tid % 128 / 8;
                const float4* sums = (const float4*)(of_group + tid % 128 / 8 * PITCH + tid % 8 * 8);
                if (t < T && within < rows && place < O)
                    store_sums(y + t * y_stride + place, residual + t * residual_stride + place, sums[0], sums[1]);
                wait_at<128>(2 + group);
            }
        }
        if (rounds == 1 && mine >= phases) wait_at<MULTIPLIERS>(1);
    }
    __syncwarp();
    if (rounds == 1) {
        if (SPLIT > 1)
            wait_for_cluster();
        else
            __syncthreads();
        const int share = SPLIT > 1 ? rank : 0, wide = GATED ? rows / 2 : rows, eights = wide / 8;
        for (int i = share * THREADS + tid; i < T * eights; i += SPLIT * THREADS) {
            const int t = i / eights, within = i % eights * 8, place = first * wide + within;
            if (place >= (GATED ? O / 2 : O)) continue;
            float4 of[2][2] = {};  // of gate and up, eight rows
#pragma unroll
            for (int block = 0; block < SPLIT; block++)
                for (int part = 0; part < phases; part++)
#pragma unroll
                    for (int n = 0; n < 2 + 2 * GATED; n++) {
                        const int at = ((part * TOKENS + t) * pitch + within + n / 2 * wide + n % 2 * 4) * 4;
                        const float4 p = SPLIT > 1 ? load_of_block(block, ring + at) : *(const float4*)(shared + at);
                        float4& sum = of[n / 2][n % 2];
                        sum.x += p.x, sum.y += p.y, sum.z += p.z, sum.w += p.w;
                    }
            if (GATED)
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const float4 a = of[0][n], b = of[1][n];
                    auto gated = [](float gate, float up) { return gate / (1 + __expf(-gate)) * up; };
                    of[0][n] = make_float4(gated(a.x, b.x), gated(a.y, b.y), gated(a.z, b.z), gated(a.w, b.w));
                }
#ifdef RANKS
            const uint4 added = load16(residual + t * residual_stride + place);
            float4 a = of[0][0], b = of[0][1];
            const uint4 mine = make_uint4(pack(a.x, a.y), pack(a.z, a.w), pack(b.x, b.y), pack(b.z, b.w));
            const long long at = (long long)blockIdx.x * PLACE + 16 * tid;
#pragma unroll
            for (int r = 0; r < RANKS; r++)
                if (r != RANK) {
                    u8* to = place_of(ranks, r, RANK) + at;
                    tell_rank(to, mine.x, mine.y, ranks.number);
                    tell_rank(to + 16 * THREADS, mine.z, mine.w, ranks.number);
                }
            a = make_float4(0, 0, 0, 0), b = a;
            auto add = [&](uint4 v) {
                a.x += low(v.x), a.y += high(v.x), a.z += low(v.y), a.w += high(v.y);
                b.x += low(v.z), b.y += high(v.z), b.z += low(v.w), b.w += high(v.w);
            };
#pragma unroll
            for (int r = 0; r < RANKS; r++) {
                uint4 theirs = mine;
                if (r != RANK) {
                    const u8* from = place_of(ranks, RANK, r) + at;
                    poll(ranks, [&] {
                        const bool all = told(from, theirs.x, theirs.y, ranks.number);
                        return told(from + 16 * THREADS, theirs.z, theirs.w, ranks.number) && all;
                    });
                }
                add(theirs);
            }
            add(added);
            *(uint4*)(y + t * y_stride + place) = make_uint4(pack(a.x, a.y), pack(a.z, a.w), pack(b.x, b.y), pack(b.z, b.w));
#else
            store_sums(y + t * y_stride + place, residual + t * residual_stride + place, of[0][0], of[0][1]);
#endif
        }
    }
#ifdef RANKS
    __syncthreads();
    if (tid == 0) end_exchange(ranks);
#endif
    if (CLUSTER > 1) wait_for_cluster();  // before it ends, others may still read, copy to and arrive at this block
}
