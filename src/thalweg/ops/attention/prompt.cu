// Attention of prompts for Hopper: a running softmax over tiles of keys (FlashAttention-3, arXiv:2407.08608), for
// latent attention with expanded keys and values and for gated attention of grouped heads over keys and values in
// blocks.
//
// A block stays on its multiprocessor and takes pieces of M queries of a head in turn. One of its warps copies queries
// and keys to shared memory, another one values; each of two warpgroups owns half of the queries. While the matrix unit
// multiplies one tile's weights with its values and the next tile's keys with the queries, the softmax of that next
// tile has to wait only for the latter; the warpgroups take turns in asking, so that one's softmax runs under the
// other's products. Weights go from registers to the matrix unit. Keys run from the last that a piece sees back to the
// first.
//
// Macros: LATENT, 1 for latent attention (192 dims of keys, of which the last 64 are one for all heads, and 128 of
// values) and 0 for grouped heads (256 and 256). TILE, keys of a tile. RATIO, query heads per key head. BOX, rows of a
// copy: rows that are neighbours for sure. BLOCK, tokens of a block. PART, 1 if sums begin and end in
// memory, 2 if they only end there, of parts of the keys, which `join` joins.

#include "hopper.cuh"

#if LATENT
constexpr int DQK = 192, DV = 128, SHARED = 1;  // slabs of 64 key dims that all heads share
#else
constexpr int DQK = 256, DV = 256, SHARED = 0;
#endif
constexpr int M = 128, STAGES = 2, GROUPS = 2, THREADS = 128 * (GROUPS + 1);
constexpr int QK_SLABS = DQK / 64, V_SLABS = DV / 64, CHUNKS = TILE / BOX;  // a slab has 64 dims of each row
constexpr int Q_BYTES = M * DQK * 2, K_BYTES = TILE * DQK * 2, V_BYTES = TILE * DV * 2, SLAB = TILE * 128;
constexpr int RECORD = 8;  // ints of a piece: first token, past the sequence's last, position of the first, position of
                           // the first key, past the last key, tiles, row of the first key or sequence, part

// Lane `pair` of four has the pair of values `pair` of each of 4 blocks, and gets all of block `pair`; and back.
__device__ __forceinline__ void transpose(u32 (&x)[4], int pair) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const u32 got = __shfl_xor_sync(~0u, pair & 1 ? x[i] : x[i + 1], 1);
        if (pair & 1) x[i] = got;
        else x[i + 1] = got;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 got = __shfl_xor_sync(~0u, pair & 2 ? x[i] : x[i + 2], 2);
        if (pair & 2) x[i] = got;
        else x[i + 2] = got;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attend(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
           const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap shared_map, const int* pieces,
           const int* tables, const bf16* proj, bf16* out, float* sums, float* most_of, float* total_of,
           long long table_stride, long long proj_stride, int num_pieces, int T, int H, int shared_column,
           float scale) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 q_s = shared_address(shared), k_s = q_s + Q_BYTES, v_s = k_s + STAGES * K_BYTES;
    const u32 barriers = v_s + STAGES * V_BYTES;
    const u32 q_full = barriers, q_empty = barriers + 8, k_full = barriers + 16, k_empty = k_full + 8 * STAGES;
    const u32 v_full = k_empty + 8 * STAGES, v_empty = v_full + 8 * STAGES;
    const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0), group = warp / 4;
    const int total = num_pieces * H;
    // Pieces come with the longest first; each second round runs backwards, so that all blocks get as much.
    auto piece_of = [&](int round) {
        return round * (int)gridDim.x + (round % 2 ? (int)(gridDim.x - 1 - blockIdx.x) : (int)blockIdx.x);
    };

    if (threadIdx.x == 0) {
        init_barrier(q_full), init_barrier(q_empty, 4 * GROUPS);
        for (int i = 0; i < STAGES; i++) {
            init_barrier(k_full + 8 * i), init_barrier(k_empty + 8 * i, 4 * GROUPS);
            init_barrier(v_full + 8 * i), init_barrier(v_empty + 8 * i, 4 * GROUPS);
        }
        share_barriers();
    }
    __syncthreads();
    wait_for_kernel_ahead();

    if (group == GROUPS) {
        give_registers_back<40>();
        const bool keys = warp == 4 * GROUPS;
        if (warp > 4 * GROUPS + 1) return;
        const TensorMap* map = keys ? &k_map : &v_map;
        const u32 ring = keys ? k_s : v_s, full = keys ? k_full : v_full, empty = keys ? k_empty : v_empty;
        const int bytes = keys ? K_BYTES : V_BYTES, slabs = keys ? QK_SLABS : V_SLABS;
        int used = 0, q_used = 0;
        for (int round = 0, i; (i = piece_of(round)) < total; round++) {
            const int* piece = pieces + RECORD * (i / H);
            const int head = i % H, tiles = piece[5], where = piece[6];
            for (int tile = tiles - 1; tile >= 0; tile--, used++) {
                const int stage = used % STAGES;
                // A lane copies one slab of neighbouring rows.
                int row[(4 * CHUNKS + 31) / 32];
#pragma unroll
                for (int j = 0; j < (4 * CHUNKS + 31) / 32; j++) {
#if LATENT
                    row[j] = where + tile * TILE;
#else
                    const int chunk = (lane + 32 * j) / 4, last = (piece[4] - 1) / BOX * BOX;
                    const int at = min(piece[3] + tile * TILE + chunk * BOX, last);
                    row[j] = tables[where * table_stride + at / BLOCK] * BLOCK + at % BLOCK;
#endif
                }
                wait_at_barrier(empty + 8 * stage, (used / STAGES + 1) % 2);
                if (lane == 0) expect_bytes(full + 8 * stage, bytes);
                __syncwarp();
#pragma unroll
                for (int j = 0; j < (4 * CHUNKS + 31) / 32; j++) {
                    const int slab = (lane + 32 * j) % 4, chunk = (lane + 32 * j) / 4;
                    const u32 to = ring + stage * bytes + slab * SLAB + chunk * BOX * 128;
                    if (slab >= slabs || chunk >= CHUNKS) continue;
                    if (SHARED && keys && slab == slabs - 1)
                        copy_tile(to, &shared_map, shared_column, 0, row[j], full + 8 * stage);
                    else
                        copy_tile(to, map, slab * 64 + (LATENT && !keys ? 128 : 0), head / RATIO, row[j],
                                  full + 8 * stage);
                }
                if (keys && tile == tiles - 1) {
                    wait_at_barrier(q_empty, (q_used++ + 1) % 2);
                    if (lane == 0) expect_bytes(q_full, Q_BYTES);
                    __syncwarp();
                    if (lane < QK_SLABS) copy_tile(q_s + lane * M * 128, &q_map, lane * 64, head, piece[0], q_full);
                }
            }
        }
        start_kernel_behind();
        return;
    }

    take_registers<232>();
    const int quad = lane / 4, pair = lane % 4, mine = 64 * group + 16 * (warp % 4) + quad;  // and the row 8 below
    const u32 my_turn = 1 + group, their_turn = 2 - group;
    if (group == 1) arrive_at<256>(1);
    int q_used = 0, k_used = 0, v_used = 0;
    float s[TILE / 2], o[DV / 2];
    u32 p[TILE / 4];
    auto ask_for_scores = [&]() {
        const u32 q = q_s + group * 64 * 128, k = k_s + k_used % STAGES * K_BYTES;
        begin_products();
#pragma unroll
        for (int i = 0; i < DQK / 16; i++) {
            const int within = i % 4 * 32;  // the slab
            const auto rows_of_q = describe(q + i / 4 * M * 128 + within, 16);
            multiply_rows<TILE>(s, rows_of_q, describe(k + i / 4 * SLAB + within, 16), i);
        }
        commit_products();
    };
    auto ask_for_sums = [&]() {
        const u32 v = v_s + v_used % STAGES * V_BYTES;
        begin_products();
#pragma unroll
        for (int i = 0; i < TILE / 16; i++)
            multiply_columns<DV>(o, p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3], describe(v + i * 2048, SLAB));
        commit_products();
    };
    auto await_keys = [&]() { wait_at_barrier(k_full + 8 * (k_used % STAGES), k_used / STAGES % 2); };
    auto await_values = [&]() { wait_at_barrier(v_full + 8 * (v_used % STAGES), v_used / STAGES % 2); };
    auto release = [&](u32 barrier) {
        __syncwarp();
        if (lane == 0) arrive_at_barrier(barrier);
    };

    for (int round = 0, i; (i = piece_of(round)) < total; round++) {
        const int* piece = pieces + RECORD * (i / H);
        const int head = i % H, token = piece[0] + mine, end = piece[1], first_key = piece[3], end_key = piece[4];
        const int tiles = piece[5], position = piece[2] + mine;
        if (tiles == 0) continue;
        const int last[2] = {min(position, end_key - 1), min(position + 8, end_key - 1)};  // keys that rows see
        const int whole = min(piece[2] + 64 * group, end_key - 1);                          // that all of the group see
        float most[2] = {LOWEST, LOWEST}, sum[2] = {0, 0};
#pragma unroll
        for (int j = 0; j < DV / 2; j++) o[j] = 0;
#if PART == 1
#pragma unroll
        for (int r = 0; r < 2; r++)
            if (token + 8 * r < end) {
                const long long row = (long long)(token + 8 * r) * H + head;
                most[r] = most_of[row];
                sum[r] = pair == 0 ? total_of[row] : 0;
#pragma unroll
                for (int b = 0; b < DV / 8; b++) {
                    const float2 two = *(const float2*)(sums + row * DV + 8 * b + 2 * pair);
                    o[4 * b + 2 * r] = two.x, o[4 * b + 2 * r + 1] = two.y;
                }
            }
#endif
        float keep[2];
        // From scores to weights.
        auto weigh = [&](int tile) {
            const int first = first_key + tile * TILE;
            if (first + TILE - 1 > whole) {
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int seen = last[r] - first - 2 * pair;
#pragma unroll
                    for (int b = 0; b < TILE / 8; b++)
#pragma unroll
                        for (int e = 0; e < 2; e++)
                            if (8 * b + e > seen) s[4 * b + 2 * r + e] = LOWEST;
                }
            }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float largest = most[r];
#pragma unroll
                for (int b = 0; b < TILE / 8; b++) largest = fmaxf(largest, fmaxf(s[4 * b + 2 * r], s[4 * b + 2 * r + 1]));
                largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
                largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
                const float by = largest == LOWEST ? 0 : largest * scale;
                keep[r] = exp2f(most[r] * scale - by);
                most[r] = largest;
                float added = 0;
#pragma unroll
                for (int b = 0; b < TILE / 8; b++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const float x = exp2f(s[4 * b + 2 * r + e] * scale - by);
                        s[4 * b + 2 * r + e] = x;
                        added += x;
                    }
                sum[r] = sum[r] * keep[r] + added;
            }
        };
        auto keep_weights = [&]() {
#pragma unroll
            for (int j = 0; j < TILE / 4; j++) p[j] = pack(s[2 * j], s[2 * j + 1]);
        };
        auto scale_sums = [&]() {
            if (!__ballot_sync(~0u, keep[0] != 1 || keep[1] != 1)) return;
#pragma unroll
            for (int j = 0; j < DV / 2; j++) o[j] *= keep[j / 2 % 2];
        };

        wait_at_barrier(q_full, q_used++ % 2);
        await_keys();
        ask_for_scores();
        wait_for_products<0>();
        settle(s);
        release(k_empty + 8 * (k_used++ % STAGES));
        if (tiles == 1) release(q_empty);
        weigh(tiles - 1);
        keep_weights();
        scale_sums();
        if (first_key + tiles * TILE > end_key) {
            // Rows past the sequence's end may hold anything, and 0 * NaN is NaN.
            await_values();
            const int from = end_key - first_key - (tiles - 1) * TILE, pieces16 = (TILE - from) * V_SLABS * 8;
            u8* v = shared + (v_s - q_s) + v_used % STAGES * V_BYTES;
            for (int j = threadIdx.x % 128; j < pieces16; j += 128) {
                const int slab = j / 8 % V_SLABS, row = from + j / (8 * V_SLABS);
                *(uint4*)(v + slab * SLAB + row * 128 + j % 8 * 16) = make_uint4(0, 0, 0, 0);
            }
            share_writes();
            wait_at<128>(3 + group);
        }
#pragma unroll 1
        for (int tile = tiles - 2; tile >= 0; tile--) {
            await_keys();
            wait_at<256>(my_turn);
            ask_for_scores();
            await_values();
            ask_for_sums();
            arrive_at<256>(their_turn);
            wait_for_products<1>();
            settle(s);
            release(k_empty + 8 * (k_used++ % STAGES));
            if (tile == 0) release(q_empty);
            weigh(tile);
            wait_for_products<0>();
            settle(o);
            release(v_empty + 8 * (v_used++ % STAGES));
            keep_weights();
            scale_sums();
        }
        await_values();
        ask_for_sums();
        wait_for_products<0>();
        settle(o);
        release(v_empty + 8 * (v_used++ % STAGES));

#pragma unroll
        for (int r = 0; r < 2; r++) {
            sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
            sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
            const bool there = token + 8 * r < end;
            const long long row = ((long long)(PART == 2 ? piece[7] * T : 0) + token + 8 * r) * H + head;
#if PART
            if (there) {
                if (pair == 0) most_of[row] = most[r], total_of[row] = sum[r];
#pragma unroll
                for (int b = 0; b < DV / 8; b++)
                    *(float2*)(sums + row * DV + 8 * b + 2 * pair) = make_float2(o[4 * b + 2 * r], o[4 * b + 2 * r + 1]);
            }
#else
            const float inverse = 1.0f / sum[r];
#pragma unroll
            for (int b = 0; b < DV / 8; b += 4) {
#if !LATENT
                uint4 raw = make_uint4(0, 0, 0, 0);
                if (there)
                    raw = *(const uint4*)(proj + (token + 8 * r) * proj_stride + (2 * head + 1) * DV + 8 * (b + pair));
                u32 gate[4] = {raw.x, raw.y, raw.z, raw.w};
                transpose(gate, pair);
#endif
                u32 y[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float x0 = o[4 * (b + j) + 2 * r] * inverse, x1 = o[4 * (b + j) + 2 * r + 1] * inverse;
#if !LATENT
                    x0 = x0 / (1.0f + __expf(-low(gate[j]))), x1 = x1 / (1.0f + __expf(-high(gate[j])));
#endif
                    y[j] = pack(x0, x1);
                }
                transpose(y, pair);
                if (there) *(uint4*)(out + row * DV + 8 * (b + pair)) = make_uint4(y[0], y[1], y[2], y[3]);
            }
#endif
        }
    }
    if (group == 0) wait_at<256>(1);  // for the turn that was not taken
}

#if PART == 2
// A warp to a query of a head: its sums [PARTS, T, H, DV], as far as they were written, which the largest scores tell.
extern "C" __global__ void __launch_bounds__(THREADS)
    join(const float* sums, const float* most_of, const float* total_of, const bf16* proj, bf16* out,
         long long proj_stride, int T, int H, int parts, float scale) {
    wait_for_kernel_ahead();
    start_kernel_behind();
    const int lane = threadIdx.x % 32, row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (row >= T * H) return;
    float largest = LOWEST, total = 0, x[DV / 128][4] = {};
    for (int part = 0; part < parts; part++) largest = fmaxf(largest, most_of[part * T * H + row]);
    for (int part = 0; part < parts; part++) {
        const long long of_part = (long long)part * T * H + row;
        if (most_of[of_part] == LOWEST) continue;
        const float by = exp2f((most_of[of_part] - largest) * scale);
        total += by * total_of[of_part];
#pragma unroll
        for (int j = 0; j < DV / 128; j++) {
            const float4 y = *(const float4*)(sums + of_part * DV + 128 * j + 4 * lane);
            x[j][0] += by * y.x, x[j][1] += by * y.y, x[j][2] += by * y.z, x[j][3] += by * y.w;
        }
    }
    const bf16* gates = proj + row / H * proj_stride + (2 * (row % H) + 1) * DV + 4 * lane;
#pragma unroll
    for (int j = 0; j < DV / 128; j++)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
            const u32 gate = *(const u32*)(gates + 128 * j + e);
            const float a = x[j][e] / total / (1.0f + __expf(-low(gate)));
            const float b = x[j][e + 1] / total / (1.0f + __expf(-high(gate)));
            *(u32*)(out + (long long)row * DV + 128 * j + 4 * lane + e) = pack(a, b);
        }
}
#endif
