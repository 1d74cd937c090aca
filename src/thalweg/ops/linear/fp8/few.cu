// y = x w^T for a few tokens, w in float8 with a scale for each row and 128 columns, bound by streaming w once. With NORM
// x is RMS-normalised first, with ADD a residual is added.
//
// One block a multiprocessor takes its share of the rows of w, and streams them through a ring of tiles in shared memory
// by bulk copies, which begin before the wait for the kernel ahead: weights are older than it. Warps share out the
// columns and keep theirs of x in registers, as the right-hand operand of the matrix unit; where these are too many,
// columns go in passes, each over all rows of the block. A sum has no order, so a thread's 16 consecutive columns may
// stand where the instruction expects others, for x and w alike. One more warp asks for tiles and adds up what the others
// have of each, in their order: none waits for another until all buffers of sums are full.
//
// A token's 1 / rms is applied to its sums; x times the norm's weight is rounded before that. Products are in fp16, for
// which e4m3 has an instruction: a warp's part of a token's row is scaled by a power of two to just below fp16's largest,
// which loses nothing but what is below 2^-29 of its largest element. Scales are applied to sums over 128 columns.
//
// Macros: D columns, and PASS of them at most, multiples of 128 and, in several passes, of 512: scales are copied 16
// bytes at a time, for which O is a multiple of 8; WARPS that multiply; TOKENS at most, 8 or 16; NORM, 2 for a weight in
// fp32; ADD; REST rows, and REST_EACH; ONE for a single token (one.cuh).

#include "hopper.cuh"

constexpr int THREADS = 32 * (WARPS + 1), MAX_STAGES = 16, BUFFERS = 4, BLOCK = 128;
constexpr int PASSES = (D + PASS - 1) / PASS, LAST = D - (PASSES - 1) * PASS;  // the latter: columns of the last pass
constexpr int PITCH = PASS + 64;                                // bytes between rows: no bank conflicts
constexpr int CHUNKS = PASS / BLOCK, MINE = (CHUNKS + WARPS - 1) / WARPS;  // of 128 columns: all, and a warp's at most
constexpr int HALVES = TOKENS / 8, LOADS = 4;                   // of 8 tokens; of x for a chunk
constexpr int NORM_BYTES = D * 2 * NORM;
// Of a row; whether copied row by row, which costs the copy unit 20 ns each, however small they are, but gives no bank
// conflicts: more tokens have more products between copies.
constexpr int SCALES = D / BLOCK, BY_ROW = SCALES % 4 == 0 && (PASSES > 1 || TOKENS > 8);
constexpr int SCALE_PITCH = CHUNKS + (BY_ROW && CHUNKS % 8 == 0 ? 4 : 0);  // no bank conflicts
constexpr int SUMS = HALVES * WARPS * 32;                       // float4 in a buffer

#include "rest.cuh"
#include "one.cuh"

// Four float8 as two pairs of fp16.
__device__ __forceinline__ void widen(u32 q, u32& a, u32& b) {
    a = widen_half((u16)q);
    b = widen_half((u16)(q >> 16));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    few_tokens(const bf16* x, const u8* norm_weight, const u8* w, const float* scales, const bf16* rest,
               const bf16* residual, bf16* y, long long x_stride, long long residual_stride, long long y_stride, int T, int O, int tile_rows,
               int stages, float eps) {
    const int tid = threadIdx.x, lane = tid % 32, quad = lane / 4, pair = lane % 4;
    const int warp = __shfl_sync(~0u, tid / 32, 0);  // so that the compiler knows it for the same in all lanes
    const int first = 8 * (int)((long long)(O / 8) * blockIdx.x / gridDim.x);
    const int count = 8 * (int)((long long)(O / 8) * (blockIdx.x + 1) / gridDim.x) - first;
    const int tiles = (count + tile_rows - 1) / tile_rows;
    const int rest_first = REST * blockIdx.x / gridDim.x, rest_count = REST * (blockIdx.x + 1) / gridDim.x - rest_first;

    // The norm's weight, rows of the rest, the one token, the ring (each tile with its scales), buffers of sums, sums of
    // all tiles.
    extern __shared__ __align__(128) u8 shared[];
    const int stage_bytes = tile_rows * (PITCH + SCALE_PITCH * 4);
    u8 *rest_s = shared + (NORM_BYTES + 127) / 128 * 128, *one_s = rest_s + REST_EACH * D * 2;
    u8* ring_s = one_s + (ONE ? D * 2 : 0);
    float4* sums_s = (float4*)(ring_s + stages * stage_bytes);
    float4* kept_s = sums_s + BUFFERS * SUMS;
    __shared__ u64 full_s[MAX_STAGES], delivered_s[BUFFERS], taken_s[BUFFERS], normed_s, rest_here_s;
    __shared__ float squares_s[WARPS][TOKENS], rest_sums_s[REST_SUMS][WARPS][TOKENS], scales_s[PASSES][WARPS];

    const u32 full = shared_address(full_s), delivered = shared_address(delivered_s), taken = shared_address(taken_s);
    if (tid == 32 * WARPS) {
        for (int i = 0; i < stages; i++) init_barrier(full + 8 * i);
        for (int i = 0; i < BUFFERS; i++) init_barrier(delivered + 8 * i, WARPS), init_barrier(taken + 8 * i);
        init_barrier(shared_address(&normed_s)), init_barrier(shared_address(&rest_here_s));
        share_barriers();
    }
    __syncthreads();

    if (warp == WARPS) {
        if (NORM && lane == 0) {
            expect_bytes(shared_address(&normed_s), NORM_BYTES);
            copy_bytes(shared_address(shared), norm_weight, NORM_BYTES, shared_address(&normed_s));
        }
        if (lane == 0) ask_for_rest(rest_here_s, rest_s, rest + (long long)rest_first * D, rest_count);
        // The tiles before `end`, as far as they have not been asked for. When all have, the next kernel may start.
        int asked = 0, asked_tile = 0, asked_pass = 0, asked_place = 0;
        auto ask = [&](int end) {
#pragma unroll 1
            for (; asked < min(end, PASSES * tiles); asked++) {
                const int row = asked_tile * tile_rows, rows = min(tile_rows, count - row), column = asked_pass * PASS;
                const int bytes = PASSES == 1 || asked_pass < PASSES - 1 ? PASS : LAST;
                const u32 to = shared_address(ring_s) + asked_place * stage_bytes, barrier = full + 8 * asked_place;
                const u32 scales_to = to + tile_rows * PITCH;
                if (lane == 0) expect_bytes(barrier, rows * (bytes + bytes / 32));
                __syncwarp();
                if (lane < rows)
                    copy_bytes(to + lane * PITCH, w + (long long)(first + row + lane) * D + column, bytes, barrier);
                const float* from = scales + (long long)(first + row) * SCALES + column / BLOCK;
                if (BY_ROW && lane < rows)
                    copy_bytes(scales_to + lane * SCALE_PITCH * 4, from + (long long)lane * SCALES, bytes / 32, barrier);
                if (!BY_ROW && lane == 0) copy_bytes(scales_to, from, rows * SCALES * 4, barrier);
                if (++asked_tile == tiles) asked_tile = 0, asked_pass++;
                if (++asked_place == stages) asked_place = 0;
            }
            if (asked == PASSES * tiles) start_kernel_behind();
        };
        ask(max(1, stages - 1));
        wait_for_kernel_ahead();
        ask(stages);  // what is asked for comes in that order: x, which the others ask for, before the last of the ring

        float r[HALVES][2];
#pragma unroll
        for (int h = 0; h < HALVES; h++) r[h][0] = r[h][1] = 1;
        int n = 0;
#pragma unroll 1
        for (int pass = 0; pass < PASSES; pass++)
#pragma unroll 1
            for (int tile = 0; tile < tiles; tile++, n++) {
                const bool last = pass == PASSES - 1;
                const int rows = min(tile_rows, count - tile * tile_rows), from = first + tile * tile_rows;
                const int buffer = n % BUFFERS;
                // Sum e of this lane: of row quad or quad + 8 of the tile and of token 2 pair or 2 pair + 1 of a half.
                auto row_of = [&](int e) { return quad + 8 * (e / 2); };
                auto token_of = [&](int h, int e) { return 8 * h + 2 * pair + e % 2; };
                auto there = [&](int h, int e) { return row_of(e) < rows && token_of(h, e) < T; };
                float added[HALVES][4] = {};
                if (ADD && last)
#pragma unroll
                    for (int h = 0; h < HALVES; h++)
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            if (there(h, e))
                                added[h][e] = low(load_bf16(residual + token_of(h, e) * residual_stride + from + row_of(e)));
                wait_at_barrier(delivered + 8 * buffer, n / BUFFERS & 1);
                ask(n + 1 + stages);  // all have read the tile
                float sum[HALVES][4] = {};
#pragma unroll
                for (int h = 0; h < HALVES; h++)
#pragma unroll
                    for (int p = 0; p < WARPS; p++) {
                        const float4 part = sums_s[buffer * SUMS + (h * WARPS + p) * 32 + lane];
                        sum[h][0] += part.x, sum[h][1] += part.y, sum[h][2] += part.z, sum[h][3] += part.w;
                    }
                __syncwarp();
                if (lane == 0) arrive_once_read(taken + 8 * buffer, __float_as_uint(sum[HALVES - 1][3]), (u32)T >> 30);
                if (NORM && last && tile == 0)
#pragma unroll
                    for (int h = 0; h < HALVES; h++)
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            float all = 0;
#pragma unroll
                            for (int p = 0; p < WARPS; p++) all += squares_s[p][token_of(h, e)];
                            r[h][e] = rsqrtf(all * (1.0f / D) + eps);
                        }
#pragma unroll
                for (int h = 0; h < HALVES; h++) {
                    if (PASSES > 1) {
                        float4* kept = kept_s + (tile * HALVES + h) * 32 + lane;  // this lane's alone
                        if (pass > 0) {
                            const float4 before = *kept;
                            sum[h][0] += before.x, sum[h][1] += before.y, sum[h][2] += before.z, sum[h][3] += before.w;
                        }
                        if (!last) *kept = make_float4(sum[h][0], sum[h][1], sum[h][2], sum[h][3]);
                    }
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (last && there(h, e))
                            y[token_of(h, e) * y_stride + from + row_of(e)] =
                                (bf16)pack(sum[h][e] * r[h][e % 2] + added[h][e], 0);
                }
            }
        if (REST) store_rest(y + O + rest_first, y_stride, rest_count, T, lane, rest_sums_s, squares_s, eps);
        return;
    }

    if (ONE)
        prepare_one(x, shared, shared_address(&normed_s), one_s, scales_s, warp, quad, pair);
    else
        wait_for_kernel_ahead();
    int place = 0, n = 0;
    u32 phase = 0;
    float square[HALVES] = {};
#pragma unroll 1
    for (int pass = 0; pass < PASSES; pass++) {
        const bool last = pass == PASSES - 1;
        const int chunks = LAST == PASS || !last ? CHUNKS : LAST / BLOCK;
        auto mine = [&](int i) {
            return (LAST == PASS && WARPS * (i + 1) <= CHUNKS) || warp + WARPS * i < chunks;
        };
        // In the pass, of this thread's load j of chunk i: 8 columns.
        auto columns = [&](int i, int j) {
            return BLOCK * (warp + WARPS * i) + 64 * (j / 2) + 16 * pair + 8 * (j % 2);
        };
        uint4 v[HALVES][MINE][LOADS];
#pragma unroll
        for (int h = 0; h < HALVES; h++)
#pragma unroll
            for (int i = 0; i < MINE; i++)
#pragma unroll
                for (int j = 0; j < LOADS; j++) {
                    v[h][i][j] = make_uint4(0, 0, 0, 0);
                    if (ONE) {
                        if (quad == 0 && mine(i))
                            v[h][i][j] = *(const uint4*)(one_s + (pass * PASS + columns(i, j)) * 2);
                    } else if (8 * h + quad < T && mine(i))
                        v[h][i][j] = load16(x + (8 * h + quad) * x_stride + pass * PASS + columns(i, j));
                }
        if (NORM && !ONE) {
            if (pass == 0) wait_at_barrier(shared_address(&normed_s), 0);
#pragma unroll
            for (int i = 0; i < MINE; i++)
                if (mine(i))
#pragma unroll
                    for (int j = 0; j < LOADS; j++) {
                        float by[8];
                        const u8* at = shared + (pass * PASS + columns(i, j)) * 2 * NORM;
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
                            u32* two = (u32*)&v[h][i][j];
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
        float back[HALVES][2];  // of the tokens whose sums this thread has
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            float scale;
            if (ONE) {
                scale = back[h][0] = back[h][1] = scales_s[pass][warp];
            } else {
                u32 largest = 0;
#pragma unroll
                for (int i = 0; i < MINE * LOADS * 4; i++) largest = max_pairs(largest, ((u32*)v[h])[i] & 0x7fff7fffu);
                largest = max(largest & 0xffff, largest >> 16);
                largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
                largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
                const int exponent = min(max((int)largest >> 7, 15), 253);
                const float by = __int_as_float((268 - exponent) << 23);
                scale = __int_as_float((exponent - 14) << 23);
                back[h][0] = __shfl_sync(~0u, scale, 8 * pair);
                back[h][1] = __shfl_sync(~0u, scale, 8 * pair + 4);
#pragma unroll
                for (int i = 0; i < MINE * LOADS * 4; i++) {
                    u32& two = ((u32*)v[h])[i];
                    two = pack_half(low(two) * by, high(two) * by);
                }
            }
            if (!REST || rest_count == 0) continue;
            if (h == 0 && pass == 0) wait_at_barrier(shared_address(&rest_here_s), 0);
            multiply_rest(rest_sums_s, v[h], rest_s, pass, rest_count, 8 * h + quad, scale, mine, columns);
        }

#pragma unroll 1
        for (int tile = 0; tile < tiles; tile++, n++) {
            wait_at_barrier(full + 8 * place, phase);
            const u8* tile_s = ring_s + place * stage_bytes;
            const int lower = min(quad, tile_rows - 1), upper = min(quad + 8, tile_rows - 1);
            const u8 *lower_s = tile_s + lower * PITCH, *upper_s = tile_s + upper * PITCH;
            const float* scale_s = (const float*)(tile_s + tile_rows * PITCH);
            float c[HALVES][4] = {};
#pragma unroll
            for (int i = 0; i < MINE; i++)
                if (mine(i)) {
                    float part[HALVES][4] = {};
#pragma unroll
                    for (int g = 0; g < 2; g++) {
                        const int at = BLOCK * (warp + WARPS * i) + 64 * g + 16 * pair;
                        const uint4 l4 = *(const uint4*)(lower_s + at), u4 = *(const uint4*)(upper_s + at);
#pragma unroll
                        for (int k = 0; k < 4; k++) {
                            u32 a0, a1, a2, a3;
                            widen(k == 0 ? l4.x : k == 1 ? l4.y : k == 2 ? l4.z : l4.w, a0, a2);
                            widen(k == 0 ? u4.x : k == 1 ? u4.y : k == 2 ? u4.z : u4.w, a1, a3);
#pragma unroll
                            for (int h = 0; h < HALVES; h++) {
                                const uint4 b = v[h][i][2 * g + k / 2];
                                mma_fp16(part[h], a0, a1, a2, a3, k % 2 ? b.z : b.x, k % 2 ? b.w : b.y);
                            }
                        }
                    }
                    const float by[2] = {scale_s[lower * SCALE_PITCH + warp + WARPS * i],
                                         scale_s[upper * SCALE_PITCH + warp + WARPS * i]};
#pragma unroll
                    for (int h = 0; h < HALVES; h++)
#pragma unroll
                        for (int e = 0; e < 4; e++) c[h][e] += part[h][e] * by[e / 2];
                }
            const int buffer = n % BUFFERS;
            if (n >= BUFFERS) wait_at_barrier(taken + 8 * buffer, (n / BUFFERS - 1) & 1);
#pragma unroll
            for (int h = 0; h < HALVES; h++)
                sums_s[buffer * SUMS + (h * WARPS + warp) * 32 + lane] =
                    make_float4(c[h][0] * back[h][0], c[h][1] * back[h][1], c[h][2] * back[h][0], c[h][3] * back[h][1]);
            __syncwarp();
            if (lane == 0) arrive_at_barrier(delivered + 8 * buffer);
            // The sums of the last pass wait for them, and this tile's place in the ring does not.
            if (ONE && NORM && n == 0) add_squares(shared, squares_s, warp, quad, pair);
            if (++place == stages) place = 0, phase ^= 1;
        }
    }
}
