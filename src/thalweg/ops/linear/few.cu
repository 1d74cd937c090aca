// y = x w^T for a few tokens, bound by streaming w once. With NORM x is RMS-normalised first, with ADD a residual is
// added.
//
// One block a multiprocessor takes its share of the rows of w, and streams them through a ring of tiles in shared
// memory by bulk copies, which begin before the wait for the kernel ahead: weights are older than it. Its warps share
// out the columns and keep theirs of x in registers, as the matrix unit takes them; where these are too many, columns go
// in passes, each over all rows of the block, whose sums stay in shared memory between them. A sum has no order, so a
// thread's 8 consecutive columns may stand where the instruction expects others, for x and w alike. Partial sums of the
// warps meet in shared memory, and are added in their order.
//
// A token's 1 / rms is applied to its sums; x times the norm's weight is rounded before that.
//
// GATED: w has rows of gate, and as many of up below them; y = silu(gate) * up. They are taken by turns, so that the two
// sums of an element of y are neighbours.
//
// Macros: D columns, and PASS of them at most, multiples of 32; WARPS; TOKENS at most, 8, 16 or 32; ROWS of a tile at
// most, a multiple of 8; NORM, 2 for a weight in fp32; ADD; GATED, without ADD; RANKS and RANK, without GATED, if y is
// summed over ranks before the residual is added: a block writes its sums to every rank, in fp32, and adds up those of
// the same rows, in the order of the ranks.

#include "hopper.cuh"
#ifdef RANKS
#include "ranks.cuh"
#endif

constexpr int THREADS = 32 * WARPS, MAX_STAGES = 16;
constexpr int PASSES = (D + PASS - 1) / PASS, LAST = D - (PASSES - 1) * PASS;  // the latter: columns of the last pass
constexpr int PITCH = PASS * 2 + (PASS % 64 ? 0 : 64);  // bytes between rows in shared memory: no bank conflicts
constexpr int CHUNKS = PASS / 32, MINE = (CHUNKS + WARPS - 1) / WARPS;  // of 32 columns: all, and a warp's at most
constexpr int HALVES = TOKENS / 8, GROUPS = (HALVES + 1) / 2;           // of the 16 tokens that the matrix unit takes
constexpr int TILE = TOKENS * ROWS, EACH = (TILE + THREADS - 1) / THREADS;  // sums of a tile: all, and a thread's
constexpr int NORM_BYTES = D * 2 * NORM;
#ifdef RANKS
constexpr int PLACE = 16384;  // bytes that a block writes for a rank at most: ops/all_reduce
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    few_tokens(const bf16* x, const u8* norm_weight, const bf16* w, const bf16* residual, bf16* y, long long x_stride,
               long long residual_stride, long long y_stride, int T, int O, int tile_rows, int stages, float eps
#ifdef RANKS
               , const u64* table, long long bytes
#endif
    ) {
    const int tid = threadIdx.x, lane = tid % 32, quad = lane / 4, pair = lane % 4;
    const int warp = __shfl_sync(~0u, tid / 32, 0);  // so that the compiler knows it for the same in all lanes
    constexpr int TOGETHER = 1 + GATED;
    const int first = TOGETHER * (int)((long long)(O / TOGETHER) * blockIdx.x / gridDim.x);
    const int count = TOGETHER * (int)((long long)(O / TOGETHER) * (blockIdx.x + 1) / gridDim.x) - first;
    auto row_of_w = [&](int row) { return GATED ? row % 2 * (O / 2) + row / 2 : row; };
    const int tiles = (count + tile_rows - 1) / tile_rows;

    // The norm's weight, the ring, partial sums of two tiles, sums of all tiles.
    extern __shared__ __align__(128) u8 shared[];
    const int stage_bytes = tile_rows * PITCH;
    u8* ring_s = shared + (NORM_BYTES + 127) / 128 * 128;
    float* partial_s = (float*)(ring_s + stages * stage_bytes);
    float* sum_s = partial_s + 2 * WARPS * TILE;
    __shared__ u64 full_s[MAX_STAGES + 1];
    __shared__ float squares_s[WARPS][TOKENS];

    const u32 full = shared_address(full_s);
    if (tid <= stages) {
        init_barrier(full + 8 * (tid < stages ? tid : MAX_STAGES));
        share_barriers();
    }
    __syncwarp();
    if (NORM && tid == 0) {
        expect_bytes(full + 8 * MAX_STAGES, NORM_BYTES);
        copy_bytes(shared_address(shared), norm_weight, NORM_BYTES, full + 8 * MAX_STAGES);
    }
    // The tiles before `end`, as far as they have not been asked for. When all have, the next kernel may start.
    int asked = 0, asked_tile = 0, asked_pass = 0;
    auto ask = [&](int end) {
#pragma unroll 1
        for (; asked < min(end, PASSES * tiles); asked++) {
            if (warp == 0) {
                const int place = asked % stages, rows = min(tile_rows, count - asked_tile * tile_rows);
                const int bytes = 2 * (PASSES == 1 || asked_pass < PASSES - 1 ? PASS : LAST);
                const int row = first + asked_tile * tile_rows, column = asked_pass * PASS;
                const u32 to = shared_address(ring_s) + place * stage_bytes, barrier = full + 8 * place;
                if (lane == 0) expect_bytes(barrier, rows * bytes);
                __syncwarp();
                if (lane < rows) copy_bytes(to + lane * PITCH, w + (long long)row_of_w(row + lane) * D + column, bytes, barrier);
            }
            if (++asked_tile == tiles) asked_tile = 0, asked_pass++;
        }
        if (asked == PASSES * tiles) start_kernel_behind();
    };
    ask(max(1, stages - 1));
    __syncthreads();
#ifdef RANKS
    Ranks ranks = ranks_of(table, blockIdx.x, bytes);
    wait_for_kernel_ahead();
    begin_exchange(ranks);
    auto place_at = [&](int reader, int writer, int tile, int e) {
        return place_of(ranks, reader, writer) + blockIdx.x * PLACE + (tile * TILE + e) * 8;
    };
#else
    wait_for_kernel_ahead();
#endif

    int place = 0;
    u32 phase = 0;
    float square[HALVES] = {}, r[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j++) r[j] = 1;
#pragma unroll 1
    for (int pass = 0; pass < PASSES; pass++) {
        const bool last = PASSES == 1 || pass == PASSES - 1;
        const int chunks = LAST == PASS || !last ? CHUNKS : LAST / 32;
        auto mine = [&](int i) {
            return (LAST == PASS && WARPS * (i + 1) <= CHUNKS) || warp + WARPS * i < chunks;
        };
        auto columns = [&](int i) { return 32 * (warp + WARPS * i) + 8 * pair; };  // in the pass: of this thread's chunk i
        uint4 v[HALVES][MINE];
#pragma unroll
        for (int h = 0; h < HALVES; h++)
#pragma unroll
            for (int i = 0; i < MINE; i++) {
                v[h][i] = make_uint4(0, 0, 0, 0);
                if (8 * h + quad < T && mine(i))
                    v[h][i] = load16(x + (8 * h + quad) * x_stride + pass * PASS + columns(i));
            }
        if (pass == 0) ask(stages);  // what is asked for comes in that order: x goes before the last of the ring
        if (NORM && pass == 0) wait_at_barrier(full + 8 * MAX_STAGES, 0);
        if (NORM) {
#pragma unroll
            for (int i = 0; i < MINE; i++)
                if (mine(i)) {
                    float by[8];
                    const u8* at = shared + (pass * PASS + columns(i)) * 2 * NORM;
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (NORM == 1) {
                            const u32 two = ((const u32*)at)[e];
                            by[2 * e] = low(two), by[2 * e + 1] = high(two);
                        } else {
                            const float2 two = ((const float2*)at)[e];
                            by[2 * e] = two.x, by[2 * e + 1] = two.y;
                        }
#pragma unroll
                    for (int h = 0; h < HALVES; h++) {
                        if (8 * h >= T) break;
                        u32* two = (u32*)&v[h][i];
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            const float a = low(two[e]), b = high(two[e]);
                            square[h] += a * a + b * b;
                            two[e] = pack(a * by[2 * e], b * by[2 * e + 1]);
                        }
                    }
                }
            if (last)
#pragma unroll
                for (int h = 0; h < HALVES; h++) {
                    square[h] += __shfl_xor_sync(~0u, square[h], 1);
                    square[h] += __shfl_xor_sync(~0u, square[h], 2);
                    if (pair == 0) squares_s[warp][8 * h + quad] = square[h];
                }
        }

#pragma unroll 1
        for (int tile = 0; tile < tiles; tile++) {
            // Sum j of this thread: of token e / ROWS and row e % ROWS of the tile.
            const int rows = min(tile_rows, count - tile * tile_rows);
            auto there = [&](int e) { return e < T * ROWS && e % ROWS < rows; };
#ifndef RANKS
            const int from = first + tile * tile_rows;
            float added[EACH] = {};
            if (ADD && last)
#pragma unroll
                for (int j = 0; j < EACH; j++) {
                    const int e = tid + j * THREADS;
                    if (there(e)) added[j] = low(load_bf16(residual + e / ROWS * residual_stride + from + e % ROWS));
                }
#endif
            wait_at_barrier(full + 8 * place, phase);
            const u8* w_s = ring_s + place * stage_bytes;
            float c[ROWS / 8][GROUPS][2][4] = {};  // in two parts, or products would wait for one another
#pragma unroll
            for (int i = 0; i < MINE; i++)
                if (mine(i))
#pragma unroll
                    for (int o = 0; o < ROWS / 8; o++) {
                        const uint4 b = *(const uint4*)(w_s + min(8 * o + quad, tile_rows - 1) * PITCH + 2 * columns(i));
#pragma unroll
                        for (int m = 0; m < GROUPS; m++) {
                            const uint4 a = v[2 * m][i];
                            const uint4 z = HALVES > 1 ? v[(2 * m + 1) % HALVES][i] : make_uint4(0, 0, 0, 0);
                            mma(c[o][m][0], a.x, z.x, a.y, z.y, b.x, b.y);
                            mma(c[o][m][1], a.z, z.z, a.w, z.w, b.z, b.w);
                        }
                    }
            float* partial = partial_s + (pass * tiles + tile) % 2 * WARPS * TILE;
#pragma unroll
            for (int o = 0; o < ROWS / 8; o++)
#pragma unroll
                for (int h = 0; h < HALVES; h++)
                    *(float2*)(partial + warp * TILE + (8 * h + quad) * ROWS + 8 * o + 2 * pair) =
                        make_float2(c[o][h / 2][0][h % 2 * 2] + c[o][h / 2][1][h % 2 * 2],
                                    c[o][h / 2][0][h % 2 * 2 + 1] + c[o][h / 2][1][h % 2 * 2 + 1]);
            __syncthreads();
            ask(pass * tiles + tile + 1 + stages);
            if (NORM && last && tile == 0)
#pragma unroll
                for (int j = 0; j < EACH; j++) {
                    const int t = min((tid + j * THREADS) / ROWS, TOKENS - 1);
                    float all = 0;
#pragma unroll
                    for (int p = 0; p < WARPS; p++) all += squares_s[p][t];
                    r[j] = rsqrtf(all * (1.0f / D) + eps);
                }
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                const int e = tid + j * THREADS;
                float sum = 0;
                if (there(e)) {
#pragma unroll
                    for (int p = 0; p < WARPS; p++) sum += partial[p * TILE + e];
                    if (PASSES > 1) {
                        float* kept = sum_s + tile * TILE + e;  // this thread's alone
                        if (pass > 0) sum += *kept;
                        if (!last) *kept = sum;
                    }
                    sum *= r[j];
#ifdef RANKS
                    if (last)
#pragma unroll
                        for (int rank = 0; rank < RANKS; rank++)
                            tell_rank(place_at(rank, RANK, tile, e), sum, ranks.number);
#else
                    if (last && !GATED) y[(e / ROWS) * y_stride + from + e % ROWS] = (bf16)pack(sum + added[j], 0);
#endif
                }
#ifndef RANKS
                if (GATED && last) {
                    const float up = __shfl_xor_sync(~0u, sum, 1);
                    if (there(e) && tid % 2 == 0)
                        y[(e / ROWS) * y_stride + (from + e % ROWS) / 2] = (bf16)pack(sum / (1 + __expf(-sum)) * up, 0);
                }
#endif
            }
            if (++place == stages) place = 0, phase ^= 1;
        }
    }
#ifdef RANKS
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile++) {
        const int rows = min(tile_rows, count - tile * tile_rows), from = first + tile * tile_rows;
        float added[EACH] = {};
        auto there = [&](int e) { return e < T * ROWS && e % ROWS < rows; };
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const int e = tid + j * THREADS;
            if (ADD && there(e)) added[j] = low(load_bf16(residual + e / ROWS * residual_stride + from + e % ROWS));
        }
        float part[EACH][RANKS] = {};
        poll(ranks, [&] {  // for all at once, or each would take a trip of its own
            bool all = true;
#pragma unroll
            for (int j = 0; j < EACH; j++)
#pragma unroll
                for (int rank = 0; rank < RANKS; rank++) {
                    const int e = tid + j * THREADS;
                    if (there(e)) all = told(place_at(RANK, rank, tile, e), part[j][rank], ranks.number) && all;
                }
            return all;
        });
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const int e = tid + j * THREADS;
            float sum = 0;
#pragma unroll
            for (int rank = 0; rank < RANKS; rank++) sum += part[j][rank];
            if (there(e)) y[(e / ROWS) * y_stride + from + e % ROWS] = (bf16)pack(sum + added[j], 0);
        }
    }
    __syncthreads();
    if (tid == 0) end_exchange(ranks);
#endif
}
