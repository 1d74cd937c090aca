// One of the experts' two matrix products over weights in int4, for a few tokens, on Hopper: gate and up with
// SiLU (GATED), or down, with the weighted sum that ends the experts (ENDS).
//
// An item is 16 rows of an expert: 8 of gate and the same 8 of up, or 16 of down. Blocks fill the multiprocessors once
// and share out the items by the time that they take: their bytes', a little more of several tokens. One warp asks for them, a stage each: words come by tensor map, scales by bulk
// copies, into a ring of STAGES, ahead of the wait for the kernel before, as far as they are known. WARPS warps multiply:
// each has the same 256 columns of all items, so its part of the tokens stays in registers, as the right-hand operand of
// the matrix unit. What they have of an item is added up by one more warp: none waits for another until all buffers of
// sums are full.
//
// A pass is an expert with up to 8 of the tokens that chose it; most have one or two.
//
// With OWN there is one more expert, as wide as the others and with weights in bf16, of own_T tokens from own_first on:
// all, or those of one of the ranks that divide the others. Its items come first, by turns, since they are known before
// the router is done; an item has 4 stages. Its rows of h and y are those behind all pairs. Beyond 8 tokens a pass of it
// has 32, in 4 tiles, that do not stay in registers.
//
// Macros: GATED; COLS, the columns; OUT, the rows of gate, up or down; E, experts; K, experts a token; OWN, tokens of the
// own expert at most, 0 without it; TOKENS, at most: 1, 8 or more; STAGES of the ring; BUFFERS of sums; BLOCKS of a
// multiprocessor; ENDS, where the own expert has all tokens;
// ROUTES, of GATED for one token: norm and router are inside (routing.cuh), x is what they take, and the own expert's
// items are multiplied meanwhile.

#include "hopper.cuh"

#include "arrivals.cuh"
#include "groups_int4.cuh"
#ifndef ROUTES
#define ROUTES 0
#endif
#if ROUTES
#include "routing.cuh"
#endif
#include "passes.cuh"

#if GATED
typedef bf16 Out;
#else
typedef float Out;
#endif
constexpr int STEP = 32 * GROUPS, ROWS = GATED ? 8 : 16;  // columns of a warp; rows of gate, up or down in an item
constexpr int WARPS = COLS / STEP, ITEMS = OUT / ROWS, EXPERT_ROWS = GATED ? 2 * OUT : OUT;
constexpr int UPPER = GATED ? OUT : 8;  // from a row of the item's first eight to its counterpart of the second
// Bytes of a row of words, and how far apart the own expert's rows are in shared memory, for which lanes do not meet in
// a bank.
constexpr int PIECE = COLS / 2, OWN_PITCH = PIECE + 64;
constexpr int CHUNK = 8 * STEP / 2;  // bytes of words that a warp has of eight rows, together, swizzled within rows
// Scales come row by row; where an item's rows are neighbours, all in one copy, whose rows lanes may meet in a bank for.
constexpr int SCALE_PIECE = COLS / 16, SCALE_ROWS = GATED ? 1 : 16;
constexpr int SCALE_PITCH = SCALE_PIECE + (SCALE_ROWS == 1 && SCALE_PIECE / 16 % 2 == 0 ? 16 : 0);
constexpr int WORD_BYTES = 16 * PIECE;
constexpr int SLOT = WORD_BYTES + 16 * SCALE_PITCH, OWN_SLOT = OWN ? 16 * OWN_PITCH : 0;
constexpr int STAGE_BYTES = ((SLOT > OWN_SLOT ? SLOT : OWN_SLOT) + 1023) / 1024 * 1024;
constexpr int OWN_STEPS = 4, OWN_COLUMNS = STEP / 4;  // of every warp
constexpr int SUMMING = 32 * (WARPS + 1), THREADS = SUMMING + 32;
constexpr int FULL = 1;                  // barriers by number: of the buffers
constexpr int OWN_COST = 100;            // of an item, relative to cost_of
constexpr int TILES = OWN > 8 ? 4 : 1, OWN_TOKENS = 8 * TILES;

// Of an item by so many tokens.
__device__ __forceinline__ int cost_of(int tokens) { return tokens <= 2 ? 27 + tokens : tokens <= 4 ? 30 : 32; }

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    experts(const __grid_constant__ TensorMap words, const bf16* x, const long long* ids, const u8* scales,
            const bf16* own, Out* out,
#if !GATED
            const float* weights, const bf16* residual, bf16* y, int* arrived, long long residual_stride, float scale,
#endif
#if ROUTES
            const bf16* norm_weight, const bf16* router, const float* bias, u32* told, float* weights, float eps,
            float scale,
#endif
            long long x_stride, int T, int own_first, int own_T) {
    const int tid = threadIdx.x, lane = tid % 32, quad = lane / 4, pair = lane % 4;
    const int warp = __shfl_sync(~0u, tid / 32, 0);  // so that the compiler knows it for the same in all lanes
    const int block = blockIdx.x, grid = gridDim.x;
    const u32 nothing = (u32)T >> 20;

    extern __shared__ __align__(1024) u8 shared[];
    float4* sums = (float4*)(shared + STAGES * STAGE_BYTES);  // [BUFFERS, WARPS, 32]
    __shared__ Passes<E, K, TOKENS> passes;
    // Barriers of the ring and of the buffers, and the one of the passes.
    __shared__ u64 come_s[STAGES], read_s[STAGES], taken_s[BUFFERS], listed_s;
    const u32 come = shared_address(come_s), read = shared_address(read_s), taken = shared_address(taken_s);
    const u32 listed = shared_address(&listed_s);

    if (tid == 0) {
#pragma unroll
        for (int i = 0; i < STAGES; i++) init_barrier(come + 8 * i), init_barrier(read + 8 * i, WARPS);
#pragma unroll
        for (int i = 0; i < BUFFERS; i++) init_barrier(taken + 8 * i);
        init_barrier(listed);
        share_barriers();
    }
    passes.clear(tid, THREADS);
    __syncthreads();

    // What this block has: its turns of the own expert's items, then a run of the others'.
    const int own_passes = OWN ? (own_T + OWN_TOKENS - 1) / OWN_TOKENS : 0, own_items = own_passes * ITEMS;
    const int own_count = block < own_items ? (own_items - block + grid - 1) / grid : 0;

    // Of the block's item j: blocks beside one another have the passes of the same rows, which are then in L2.
    auto own_pass = [&](int j) { return TILES > 1 ? (block + j * grid) % own_passes : 0; };
    auto own_rows = [&](int j) { return (TILES > 1 ? (block + j * grid) / own_passes : block + j * grid) * ROWS; };

    // The ring, which the last warp fills: `asked` stages so far.
    int asked = 0;
    auto begin_stage = [&](u32 bytes) {
        const int place = asked % STAGES;
        if (asked >= STAGES) wait_at_barrier(read + 8 * place, (asked / STAGES - 1) & 1);
        if (lane == 0) expect_bytes(come + 8 * place, bytes);
        __syncwarp();
        asked++;
        return place;
    };
    const int row = lane % 8 + lane % 16 / 8 * UPPER;  // of the item, whose words or scales this lane copies
    auto own_row = [&](int rows, int step) { return own + (long long)(rows + row) * COLS + step * (PIECE / 2); };
    auto ask_own = [&](int rows, int step) {
        const int place = begin_stage(16 * PIECE);
        if (lane < 16)
            copy_bytes(shared_address(shared + place * STAGE_BYTES + lane * OWN_PITCH), own_row(rows, step), PIECE, come + 8 * place);
    };
    auto ask = [&](int expert, int rows) {
        const int place = begin_stage(WORD_BYTES + 16 * SCALE_PIECE), at = expert * EXPERT_ROWS + rows;
        const u32 to = shared_address(shared + place * STAGE_BYTES), barrier = come + 8 * place;
        if (lane < 2) copy_tile(to + lane * WARPS * CHUNK, &words, 0, at + lane * UPPER, 0, barrier);
        const int scale_row = lane - 16;
        if (scale_row >= 0 && scale_row % SCALE_ROWS == 0)
            copy_bytes(to + WORD_BYTES + scale_row * SCALE_PITCH, scales + (long long)(at + row) * SCALE_PIECE,
                       SCALE_ROWS * SCALE_PIECE, barrier);
    };
    auto ask_known = [&](int end) {  // stages that do not depend on the choice of experts
#pragma unroll 1
        for (int n = asked; n < min(end, own_count * OWN_STEPS); n++)
            ask_own(own_rows(n / OWN_STEPS), n % OWN_STEPS);
    };
    if (warp == WARPS + 1) {
        ask_known(STAGES);
        // While the router runs memory would idle: what comes next is brought to L2.
#pragma unroll 1
        for (int n = STAGES; GATED && TILES == 1 && lane < 16 && n < min(own_count * OWN_STEPS, STAGES + 3); n++)
            bring_near(own_row(own_rows(n / OWN_STEPS), n % OWN_STEPS), PIECE);
    }
#if ROUTES
    __shared__ Routed<WARPS> routed;
    const Routing routing = {norm_weight, router, bias, told, weights, (long long*)ids, eps, scale};
    Portion<1> portion;  // of the token and of this block's rows of the router
    if (warp < WARPS) portion.ask(routing, block, warp, COLS, E);
    wait_for_kernel_ahead();
#else
#if GATED
    wait_for_kernel_ahead();
#endif
    // Only now may "down" start: it reads ids before its own wait, and they are complete here.
    start_kernel_behind();
#endif

    __shared__ int run_s[2];
    int first = 0, end = 0;  // of the others' items
    // Time is shared out evenly; where the blocks' own turns are more than that already, others take the run. By the warp
    // that lists passes: where the runs of this block and the next one start.
    auto share_out = [&]() {
        auto cost = [&](int pass) { return pass < passes.count ? cost_of(passes.size(pass)) : 0; };
        int all = 0;
#pragma unroll 1
        for (int pass = lane; pass < passes.count; pass += 32) all += cost(pass);
#pragma unroll
        for (int m = 16; m > 0; m /= 2) all += __shfl_xor_sync(~0u, all, m);
        const int time = all * ITEMS + own_items * OWN_COST;
        auto time_before = [&](int b) {
            const int turns = own_items / grid * b + min(b, own_items % grid);
            return max(time / grid * b + time % grid * b / grid - turns * OWN_COST, 0);
        };
        const int starts[2] = {time_before(block), time_before(block + 1)};
        if (lane < 2) run_s[lane] = passes.count * ITEMS;
        __syncwarp();
        int ahead = 0;  // of passes
#pragma unroll 1
        for (int from = 0; from < passes.count; from += 32) {
            const int own = cost(from + lane);
            int end = own;
#pragma unroll
            for (int m = 1; m < 32; m *= 2) {
                const int before = __shfl_up_sync(~0u, end, m);
                if (lane >= m) end += before;
            }
            const int begin = (ahead + end - own) * ITEMS;
            for (int i = 0; i < 2; i++)
                if (starts[i] >= begin && starts[i] < begin + own * ITEMS)
                    run_s[i] = (from + lane) * ITEMS + (starts[i] - begin) / own;
            ahead += __shfl_sync(~0u, end, 31);
        }
        __syncwarp();
    };
    auto await_passes = [&]() {
        wait_at_barrier(listed, 0);
        first = run_s[0], end = run_s[1];
    };

    auto own_tiles = [&](int pass) { return min(TILES, (own_T - pass * OWN_TOKENS + 7) / 8); };
    auto with_width = [&](int pass, auto f) {  // f of the tokens that a pass has places for
        const int n = TOKENS == 1 ? 1 : passes.size(pass);
        if (n == 1) f(Width<1>());
        else if (n == 2) f(Width<2>());
        else if (n <= 4) f(Width<4>());
        else f(Width<8>());
    };

    if (warp == WARPS + 1) {  // asks for stages
        ask_known(own_count * OWN_STEPS);
        await_passes();
#pragma unroll 1
        for (int item = first; item < end; item++) ask(passes.expert[item / ITEMS], item % ITEMS * ROWS);
#if !GATED
        wait_for_kernel_ahead();
#endif
    } else if (warp == WARPS) {  // lists passes, then adds up what the others have, tile by tile
#if ROUTES
        route<E, K, 0, WARPS>(routing, routed, block, passes.expert);
        if (lane < K) passes.pairs[lane] = lane;
        if (lane == 0) passes.count = K, start_kernel_behind();  // ids are there for "down"
        __syncwarp();
#else
        passes.list(ids, T);
#endif
        share_out();
        if (lane == 0) arrive_at_barrier(listed);
#if !GATED
        wait_for_kernel_ahead();
#endif
        int n = 0;
        float v[4];
        auto take = [&]() {  // the sums of all warps
            const float4* item_sums = sums + n % BUFFERS * WARPS * 32 + lane;
            v[0] = v[1] = v[2] = v[3] = 0;
            wait_at<SUMMING>(FULL + n % BUFFERS);
#pragma unroll
            for (int i = 0; i < WARPS; i++) {
                const float4 some = item_sums[i * 32];
                v[0] += some.x, v[1] += some.y, v[2] += some.z, v[3] += some.w;
            }
        };
        auto release = [&]() {  // the buffer, once what was in it has gone out
            __syncwarp();
            if (lane == 0) arrive_once_read(taken + 8 * (n % BUFFERS), __float_as_uint(v[0] + v[3]), nothing);
            n++;
        };
        auto put = [&](int p, int i, int row) {  // what this lane has of its token i
            Out* to = out + (long long)p * OUT + row + quad;
#if GATED
            store_bf16(to, v[i] / (1.0f + __expf(-v[i])) * v[2 + i]);
#else
            to[0] = v[i];
            to[8] = v[2 + i];
#endif
        };
#pragma unroll 1
        for (int j = 0; j < own_count; j++) {
            const int pass = own_pass(j), tiles = own_tiles(pass);
#pragma unroll 1
            for (int tile = 0; tile < tiles; tile++) {
                take();
                for (int i = 0; i < 2; i++) {
                    const int t = pass * OWN_TOKENS + 8 * tile + 2 * pair + i;
                    if (t < own_T) put(T * K + t, i, own_rows(j));
                }
                release();
            }
        }
        await_passes();
#pragma unroll 1
        for (int item = first; item < end;) {
            const int pass = item / ITEMS, stop = min(end, (pass + 1) * ITEMS);
            with_width(pass, [&](auto width) {
                constexpr int W = decltype(width)::tokens;
                int p[2];
                for (int i = 0; i < 2; i++) p[i] = 2 * pair + i < W ? passes.pair(pass, 2 * pair + i) : NONE;
#pragma unroll 1
                for (; item < stop; item++) {
                    take();
                    if (W == 1) v[0] += v[1], v[2] += v[3];
#pragma unroll
                    for (int m = W == 4 ? 2 : 1; W < 8 && m < 4; m *= 2)
#pragma unroll
                        for (int i = 0; i < 4; i++) v[i] += __shfl_xor_sync(~0u, v[i], m);
                    for (int i = 0; i < 2; i++)
                        if (p[i] != NONE) put(p[i], i, (item - pass * ITEMS) * ROWS);
                    release();
                }
            });
        }
    } else {
        Columns columns;
        auto load_rows = [&](auto width, int pass) {
            constexpr int W = decltype(width)::tokens;
            const int p = passes.pair(pass, quad % W);
            columns.load<W>(x + (GATED ? p / K : p) * x_stride + warp * STEP, p != NONE);
        };
#if !GATED
        wait_for_kernel_ahead();
#endif
        int place = 0, n = 0;
        u32 phase = 0;
        auto give = [&](float4 some) {  // to who adds up
            if (n >= BUFFERS) wait_at_barrier(taken + 8 * (n % BUFFERS), (n / BUFFERS - 1) & 1);
            sums[(n % BUFFERS * WARPS + warp) * 32 + lane] = some;
            arrive_at<SUMMING>(FULL + n % BUFFERS);
            n++;
        };
        auto stage = [&]() {
            wait_at_barrier(come + 8 * place, phase);
            return shared + place * STAGE_BYTES;
        };
        auto next = [&](u32 seen) {
            __syncwarp();
            if (lane == 0) arrive_once_read(read + 8 * place, seen, nothing);
            if (++place == STAGES) place = 0, phase ^= 1;
        };
        const int own_at = quad * OWN_PITCH + warp * (2 * OWN_COLUMNS) + pair * 16;
        const int own_from = GATED ? own_first : T * K;  // row of x of the own expert's first token
#if ROUTES
        portion.norm_and_multiply<WARPS, COLS>(routing, routed, x, warp);
        // The own expert's columns of a warp are others: all meet in shared memory, before it has sums.
        *(uint4*)((u8*)sums + 2 * portion.column(warp, 0)) = portion.x[0];
        wait_at<32 * WARPS>(MEET);
        if (own_count > 0) {
            const bf16* from = (const bf16*)sums + warp * OWN_COLUMNS + 8 * pair;
#pragma unroll
            for (int g = 0; g < GROUPS; g++)
                spread(quad == 0 ? *(const uint4*)(from + g / 2 * WARPS * OWN_COLUMNS + g % 2 * 32) : make_uint4(0, 0, 0, 0), columns.rows[g]);
        }
        wait_at<32 * WARPS>(MEET);
#else
        if (TILES == 1 && own_count > 0) {
            const bf16* from = x + (own_from + quad) * x_stride + warp * OWN_COLUMNS + 8 * pair;
#pragma unroll
            for (int g = 0; g < GROUPS; g++)
                spread(quad < own_T ? load16(from + g / 2 * WARPS * OWN_COLUMNS + g % 2 * 32) : make_uint4(0, 0, 0, 0), columns.rows[g]);
        }
#endif
#pragma unroll 1
        for (int j = 0; j < own_count; j++) {
            float c[TILES == 1 ? 2 : TILES][4] = {};
            const int t = own_pass(j) * OWN_TOKENS + quad;
            if (TILES > 1) {
                const bf16* from = x + (own_from + t) * x_stride + warp * OWN_COLUMNS + 8 * pair;
#pragma unroll 1
                for (int step = 0; step < OWN_STEPS; step++, from += WARPS * OWN_COLUMNS) {
                    const u8* at = stage() + own_at;
                    u32 seen = 0;
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const uint4 l = *(const uint4*)(at + 64 * half), u = *(const uint4*)(at + 8 * OWN_PITCH + 64 * half);
                        seen ^= l.w ^ u.w;
                        // Neighbours as they are: here both operands have their own order.
#pragma unroll
                        for (int i = 0; i < TILES; i++) {
                            const uint4 b = t + 8 * i < own_T ? load16(from + 8 * i * x_stride + 32 * half) : make_uint4(0, 0, 0, 0);
                            mma(c[i], l.x, u.x, l.y, u.y, b.x, b.y);
                            mma(c[i], l.z, u.z, l.w, u.w, b.z, b.w);
                        }
                    }
                    next(seen);
                }
#pragma unroll
                for (int i = 0; i < TILES; i++)
                    if (t - quad + 8 * i < own_T) give(make_float4(c[i][0], c[i][1], c[i][2], c[i][3]));
            } else {
#pragma unroll
                for (int step = 0; step < OWN_STEPS; step++) {
                    const u8* at = stage() + own_at;
                    u32 seen = 0;
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const uint4 l = *(const uint4*)(at + 64 * half), u = *(const uint4*)(at + 8 * OWN_PITCH + 64 * half);
                        const u32(&b)[4] = columns.rows[2 * step + half];
                        seen ^= l.w ^ u.w;
                        mma(c[0], __byte_perm(l.x, l.z, 0x5410), __byte_perm(u.x, u.z, 0x5410),
                            __byte_perm(l.x, l.z, 0x7632), __byte_perm(u.x, u.z, 0x7632), b[0], b[1]);
                        mma(c[1], __byte_perm(l.y, l.w, 0x5410), __byte_perm(u.y, u.w, 0x5410),
                            __byte_perm(l.y, l.w, 0x7632), __byte_perm(u.y, u.w, 0x7632), b[2], b[3]);
                    }
                    next(seen);
                }
                give(make_float4(c[0][0] + c[1][0], c[0][1] + c[1][1], c[0][2] + c[1][2], c[0][3] + c[1][3]));
            }
        }
        await_passes();
        // Whose words this lane points at.
        const u32 words_at = (lane % 16 / 8 * WARPS + warp) * CHUNK + lane % 8 * 128 + (lane / 16 ^ lane % 8) * 16;
        const int scales_at = WORD_BYTES + quad * SCALE_PITCH + warp * (STEP / 16);
        auto multiply = [&](auto width) {  // an item by the tokens of a pass
            constexpr int W = decltype(width)::tokens;
            const u8* at = stage();
            give(columns.multiply<W, SCALE_PITCH>(shared_address(at) + words_at, at + scales_at, next));
        };
        constexpr bool ALWAYS = GATED && TOKENS == 1;  // this token is that of every pass
#if ROUTES
        if (first < end) {
            columns.take<1>(portion.x);  // a lane has those columns of the items, too
        }
#else
        if (ALWAYS && first < end) load_rows(Width<1>(), first / ITEMS);
#endif
#pragma unroll 1
        for (int item = first; item < end;) {
            const int pass = item / ITEMS, stop = min(end, (pass + 1) * ITEMS);
            with_width(pass, [&](auto width) {
                if (!ALWAYS) load_rows(width, pass);
#pragma unroll 1
                for (; item < stop; item++) multiply(width);
            });
        }
    }
#if !GATED
    if (ENDS) end_experts<K, OWN != 0, OUT, THREADS>({weights, residual, y, arrived, residual_stride, scale}, out, T, (int*)shared, [&](auto come) {
        for (int n = tid; n < own_count * OWN_TOKENS; n += THREADS) {
            const int j = n / OWN_TOKENS, t = own_pass(j) * OWN_TOKENS + n % OWN_TOKENS;
            if (t < T) come(t, own_rows(j) / ROWS);
        }
        for (int n = tid; n < (end - first) * 8; n += THREADS) {
            const int item = first + n / 8, p = passes.pair(item / ITEMS, n % 8);
            if (p != NONE) come(p / K, item % ITEMS);
        }
    });
#endif
}
