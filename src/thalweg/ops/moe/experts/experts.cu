// One of the experts' two matrix products over weights in fp8, for a few tokens, on Hopper: gate and up with SiLU
// (GATED), or down, with the weighted sum that ends the experts (ENDS).
//
// An item is 16 rows of an expert: 8 of gate and the same 8 of up, or 16 of down. Blocks fill the multiprocessors once
// and share out the items. Each warp of a block has the same few columns of all of them. So a warp's part of the tokens
// stays in registers, as the right-hand operand of the matrix unit, and weights stream past it by way of the warp's own
// ring in shared memory, STAGES steps ahead. The order of columns within a sum is the matrix unit's to choose, so a
// lane takes 16 weights in a row. What the warps have of an item is added up by one more warp: none waits for another
// until all buffers of sums are full.
//
// Products are in fp16, for which e4m3 has an instruction (halves.cuh); what a token's row was scaled by and the weights'
// scales are applied to sums over 128 columns. All tokens of a tile of 8 are multiplied by every expert that one of
// them chose, and those that did not choose it are dropped.
//
// Macros: GATED; COLS, the columns; OUT, the rows of gate, up or down; E, experts; K, experts a token; SHARED, how many
// of these are the last experts; TILES of 8 tokens; STEPS of 128 columns that a warp has; STAGES of the ring;
// ENDS; ROUTES, of GATED for one token: norm and router are inside (routing.cuh), x is what they take, and the shared
// experts' items are those that are known before.

#include "hopper.cuh"

#include "arrivals.cuh"
#include "halves.cuh"

#if GATED
typedef u16 Out;  // bf16
#else
typedef float Out;
#endif
constexpr int BLOCK = 128, ROWS = GATED ? 8 : 16, WARPS = COLS / (BLOCK * STEPS), TOKENS = 8 * TILES;
constexpr int BLOCKS = COLS / BLOCK, ITEMS = OUT / ROWS;  // of an expert
constexpr int EXPERT_ROWS = GATED ? 2 * OUT : OUT;
constexpr int UPPER = GATED ? OUT : 8;  // from a row of the item's first eight to its counterpart of the second
constexpr int STEP_BYTES = 16 * BLOCK, EARLY = STEPS < STAGES ? STEPS : STAGES;
constexpr int THREADS = 32 * (WARPS + 1), BUFFERS = 4;
constexpr int FULL = 1, EMPTY = FULL + BUFFERS;  // barriers of the buffers

#ifndef ROUTES
#define ROUTES 0
#endif
#if ROUTES
#include "routing.cuh"
#endif

__device__ __forceinline__ void store(u16* to, float x) { store_bf16(to, x); }
__device__ __forceinline__ void store(float* to, float x) { *to = x; }

// Which experts are chosen, in the order of the last token of each, backwards (so the shared ones begin), and by which
// tokens.
struct Choices {
    u32 tokens[E];         // bit t: token t chose it
    u8 place[E * TOKENS];  // of the expert among the token's
    u16 expert[E];
    int count;
};

// A lane's part of the tokens: of token lane / 4 of each tile, 16 neighbours in every 64 columns of its warp.
struct Rows {
    u32 x[TILES][STEPS * 16];
    float scale[TILES][2];  // of the two tokens whose sums it gets
};

extern "C" __global__ void __launch_bounds__(THREADS, TILES == 1 && WARPS <= 12 ? 2 : 1)
    experts(const u16* x, const long long* ids, const u8* q, const float* scales, Out* out,
#if !GATED
            const float* weights, const bf16* residual, bf16* y, int* arrived, long long residual_stride,
#endif
#if ROUTES
            const bf16* norm_weight, const bf16* router, const float* bias, u32* told, float* weights, float eps,
            float routed_scale,
#endif
            long long x_stride, int T) {
    const int tid = threadIdx.x, lane = tid % 32, quad = lane / 4, pair = lane % 4;
    const int warp = __shfl_sync(~0u, tid / 32, 0);  // so that the compiler knows it for the same in all lanes

    extern __shared__ __align__(128) u8 shared[];
    float4* sums = (float4*)(shared + WARPS * STAGES * STEP_BYTES);  // [BUFFERS, TILES, WARPS, 32]
    __shared__ float scales_s[WARPS * STAGES * 2];
    __shared__ Choices chosen;

#if ROUTES
    __shared__ Routed<WARPS> routed;
    __shared__ u64 listed_s;
    const u32 listed = shared_address(&listed_s);
    const Routing routing = {norm_weight, router, bias, told, weights, (long long*)ids, eps, routed_scale};
    if (tid == 0) init_barrier(listed), share_barriers();
    for (int e = tid; e < E; e += THREADS) chosen.tokens[e] = e >= E - SHARED, chosen.place[e * TOKENS] = K - E + e;
    if (tid < SHARED) chosen.expert[tid] = E - 1 - tid;
#else
    for (int e = tid; e < E; e += THREADS) chosen.tokens[e] = 0;
#endif
    __syncthreads();

    // Eight lanes copy a line of a row, to where the four lanes that multiply it read.
    const u32 ring = shared_address(shared) + warp * STAGES * STEP_BYTES;
    const u32 copy_to = ring + lane % 8 / 4 * 512 + (lane / 8 * 4 + lane % 4) * 16;
    const u32 scale_ring = shared_address(scales_s) + (warp * STAGES * 2 + lane) * 4;
    const u8* lane_q = q + lane / 8 * COLS + warp * STEPS * BLOCK + 16 * (lane % 8);
    auto ask = [&](int stage, int expert, int rows, int step) {  // `rows`: the item's number among the expert's
        const u8* from = lane_q + (long long)(expert * EXPERT_ROWS + rows * ROWS) * COLS + step * BLOCK;
        const u32 to = copy_to + stage * STEP_BYTES;
#pragma unroll
        for (int i = 0; i < 4; i++)  // 4 rows of the lower or upper 8
            copy16(to + i / 2 * 1024 + i % 2 * 256, from + (i / 2 * UPPER + i % 2 * 4) * COLS);
        const int row = expert * (EXPERT_ROWS / BLOCK) + rows * ROWS / BLOCK + lane * (GATED ? UPPER / BLOCK : 0);
        if (lane < 2) copy4(scale_ring + stage * 8, scales + row * BLOCKS + warp * STEPS + step);
    };

#if GATED
    // The shared experts' weights are known before the router is done: as much of the first as the ring has room for.
    const bool early = blockIdx.x < SHARED * ITEMS && warp < WARPS;
    if (early)
#pragma unroll
        for (int step = 0; step < EARLY; step++) ask(step, E - 1 - blockIdx.x / ITEMS, blockIdx.x % ITEMS, step);
#if ROUTES
    Portion<STEPS / 2> portion;
    if (warp < WARPS) portion.ask(routing, blockIdx.x, warp, COLS, E - SHARED);
#endif
    wait_for_kernel_ahead();
    // Only now may "down" start: it reads ids before its own wait, and they are complete here.
#else
    const bool early = false;
#endif
#if ROUTES
    if (warp == WARPS) {
        __shared__ u16 best_s[K];
        route<E - SHARED, K - SHARED, SHARED, WARPS>(routing, routed, blockIdx.x, best_s);
        if (lane < K - SHARED) {
            chosen.expert[SHARED + lane] = best_s[lane];
            chosen.tokens[best_s[lane]] = 1, chosen.place[best_s[lane] * TOKENS] = lane;
        }
        __syncwarp();
        if (lane == 0) chosen.count = K, arrive_at_barrier(listed), start_kernel_behind();  // ids are there for "down"
    }
#else
    start_kernel_behind();

    if (warp == 0) {
        constexpr int ROUNDS = (TOKENS * K + 31) / 32;
        int expert[ROUNDS], count = 0;
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const int p = T * K - 1 - 32 * i - lane;
            expert[i] = p >= 0 ? load_id(ids + p) : -1;
        }
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const int p = T * K - 1 - 32 * i - lane;
            if (expert[i] < 0) continue;
            atomicOr(&chosen.tokens[expert[i]], 1u << p / K);
            chosen.place[expert[i] * TOKENS + p / K] = p % K;
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const int p = T * K - 1 - 32 * i - lane;
            const bool is_last = expert[i] >= 0 && chosen.tokens[max(expert[i], 0)] >> p / K == 1;
            const u32 all = __ballot_sync(~0u, is_last);
            if (is_last) chosen.expert[count + __popc(all & ((1u << lane) - 1))] = expert[i];
            count += __popc(all);
        }
        if (lane == 0) chosen.count = count;
    }
    __syncthreads();
#endif

#if GATED  // by turns, so that the first is known early
    const int total = (ROUTES ? K : chosen.count) * ITEMS, first = blockIdx.x, stride = gridDim.x;
    const int count = (total - first + stride - 1) / stride;
#else  // a run, so that it is of few experts
    const int total = chosen.count * ITEMS, first = blockIdx.x * total / gridDim.x, stride = 1;
    const int count = (blockIdx.x + 1) * total / gridDim.x - first;
#endif
    if (warp == WARPS) {  // adds up what the others have, item by item
#if !GATED
        wait_for_kernel_ahead();
#endif
#pragma unroll 1
        for (int j = 0; j < count; j++) {
            const int item = first + j * stride, expert = chosen.expert[item / ITEMS];
            const u32 tokens = chosen.tokens[expert];
            const float4* item_sums = sums + j % BUFFERS * TILES * WARPS * 32 + lane;
            float v[TILES][4] = {};
            wait_at<THREADS>(FULL + j % BUFFERS);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                if (TILES > 1 && !(tokens >> 8 * tile & 0xff)) continue;
#pragma unroll
                for (int i = 0; i < WARPS; i++) {
                    const float4 part = item_sums[(tile * WARPS + i) * 32];
                    v[tile][0] += part.x, v[tile][1] += part.y, v[tile][2] += part.z, v[tile][3] += part.w;
                }
            }
            if (j + BUFFERS < count) arrive_at<THREADS>(EMPTY + j % BUFFERS);
            const int row = item % ITEMS * ROWS + quad;
#pragma unroll
            for (int i = 0; i < 2 * TILES; i++) {
                const int t = 8 * (i / 2) + 2 * pair + i % 2;
                if (!(tokens >> t & 1)) continue;
                Out* to = out + (long long)(t * K + chosen.place[expert * TOKENS + t]) * OUT + row;
                const float a = v[i / 2][i % 2], b = v[i / 2][2 + i % 2];
#if GATED
                store(to, a / (1.0f + __expf(-a)) * b);
#else
                store(to, a);
                store(to + 8, b);
#endif
            }
        }
    } else {
        auto ask_next = [&](int stage, int j, int step) {
            if (j < count) {
                const int item = first + j * stride;
#if ROUTES
                if (item >= SHARED * ITEMS) wait_at_barrier(listed, 0);
#endif
                ask(stage, chosen.expert[item / ITEMS], item % ITEMS, step);
            }
            commit_copies();
        };
        if (early)
            for (int step = 0; step < EARLY; step++) commit_copies();  // the first holds the copies of all
#pragma unroll
        for (int n = 0; n < STAGES; n++)
            if (!(early && n < EARLY)) ask_next(n, n / STEPS, n % STEPS);

        Rows rows;
        auto load_rows = [&](int expert) {
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                const int t = 8 * tile + quad;
#if GATED
                const bool is = t < T;
#if ROUTES
                const u16* from = (const u16*)sums;
#else
                const u16* from = x + t * x_stride;
#endif
#else
                const bool is = chosen.tokens[expert] >> t & 1;
                const u16* from = x + (t * K + (is ? chosen.place[expert * TOKENS + t] : 0)) * x_stride;
#endif
                from += warp * STEPS * BLOCK + 16 * pair;
#pragma unroll
                for (int step = 0; step < STEPS; step++)
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        const u16* at = from + step * BLOCK + c * 64;
#if ROUTES
                        const uint4 a = is ? *(const uint4*)at : make_uint4(0, 0, 0, 0);
                        const uint4 b = is ? *(const uint4*)(at + 8) : make_uint4(0, 0, 0, 0);
#else
                        const uint4 a = is ? load16(at) : make_uint4(0, 0, 0, 0);
                        const uint4 b = is ? load16(at + 8) : make_uint4(0, 0, 0, 0);
#endif
                        const u32 words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
                        for (int i = 0; i < 8; i++) rows.x[tile][16 * step + 8 * c + i] = words[i];
                    }
                const float scale = scale_to_halves(rows.x[tile]);
                rows.scale[tile][0] = __shfl_sync(~0u, scale, 8 * pair);
                rows.scale[tile][1] = __shfl_sync(~0u, scale, 8 * pair + 4);
            }
        };

#if GATED
#if ROUTES
        portion.template norm_and_multiply<WARPS, COLS>(routing, routed, x, warp);
        // Lanes have other columns than they multiply: all meet in shared memory, before it has sums.
#pragma unroll
        for (int v = 0; v < STEPS / 2; v++) *(uint4*)((u8*)sums + 2 * portion.column(warp, v)) = portion.x[v];
        wait_at<32 * WARPS>(MEET);
        if (count > 0) load_rows(0);
        wait_at<32 * WARPS>(MEET);
#else
        if (count > 0) load_rows(0);
#endif
#else
        wait_for_kernel_ahead();
        int held = -1;
#endif
        int stage = 0;
#pragma unroll 1
        for (int j = 0; j < count; j++) {
            const int item = first + j * stride, expert = chosen.expert[item / ITEMS];
            const u32 tokens = chosen.tokens[expert];
#if !GATED
            if (expert != held) load_rows(held = expert);
#endif
            float sum[TILES][4] = {};
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                wait_for_copies<STAGES - 1>();
                __syncwarp();
                const float scale[2] = {scales_s[(warp * STAGES + stage) * 2], scales_s[(warp * STAGES + stage) * 2 + 1]};
                float c[TILES][2][4] = {};
                widen_step(shared + (warp * STAGES + stage) * STEP_BYTES + 16 * lane, [&](int i, u32 a0, u32 a1, u32 a2, u32 a3) {
#pragma unroll
                    for (int tile = 0; tile < TILES; tile++) {
                        const u32* b = &rows.x[tile][16 * step + 2 * i];
                        if (TILES == 1 || tokens >> 8 * tile & 0xff) mma_fp16(c[tile][i / 4], a0, a1, a2, a3, b[0], b[1]);
                    }
                });
                __syncwarp();  // all have read
                ask_next(stage, j + (step + STAGES) / STEPS, (step + STAGES) % STEPS);
                if (++stage == STAGES) stage = 0;
#pragma unroll
                for (int tile = 0; tile < TILES; tile++)
#pragma unroll
                    for (int i = 0; i < 4; i++) sum[tile][i] += (c[tile][0][i] + c[tile][1][i]) * scale[i / 2];
            }
            float4* item_sums = sums + j % BUFFERS * TILES * WARPS * 32 + lane;
            if (j >= BUFFERS) wait_at<THREADS>(EMPTY + j % BUFFERS);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                if (TILES > 1 && !(tokens >> 8 * tile & 0xff)) continue;
                const float a = rows.scale[tile][0], b = rows.scale[tile][1];
                item_sums[(tile * WARPS + warp) * 32] =
                    make_float4(sum[tile][0] * a, sum[tile][1] * b, sum[tile][2] * a, sum[tile][3] * b);
            }
            arrive_at<THREADS>(FULL + j % BUFFERS);
        }
    }
#if !GATED
    if (ENDS) end_experts<K, 0, OUT, THREADS>({weights, residual, y, arrived, residual_stride, 1.0f}, out, T, (int*)shared, [&](auto come) {
        for (int n = tid; n < count * TOKENS; n += THREADS) {
            const int item = first + n / TOKENS, t = n % TOKENS;
            if (chosen.tokens[chosen.expert[item / ITEMS]] >> t & 1) come(t, item % ITEMS);
        }
    });
#endif
}
