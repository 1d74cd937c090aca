// One of the experts' two matrix products over weights in int4, for a few tokens, on Hopper: gate and up with
// SiLU (GATED), or down with the weighted sum that ends the experts.
//
// An item is 16 rows of an expert: 8 of gate and the same 8 of up, or 16 of down. Blocks fill the multiprocessors once
// and share out the items by their bytes. One warp asks for them, in stages of a WARPS-th of all columns each, STEPS to
// an item: rows of weights and of scales come by bulk copies of whole lines into a ring of STAGES, ahead of the wait for
// the kernel before, as far as they are known. WARPS warps multiply: each has the same few columns of all items, so its
// part of the tokens stays in registers, as the right-hand operand of the matrix unit. What they have of an item is added
// up by one more warp: none waits for another until all buffers of sums are full.
//
// A nibble n goes to fp16 by its bits alone: 0x6400 | n is 1024 + n,
// and 0x6400 | n << 4, where it stands, is 1024 + 16 n, for which x has a sixteenth. A group's scale is applied to the sum
// of its products. What is too much in them, 1032 times the columns of x or 1152 times their sixteenths, is taken away by
// a product of scales and those, which go to the matrix unit as three bf16 each. So a weight is never rounded. A lane has a word of each group, whose nibbles 0 and 4, 1 and 5 and so on are the pairs
// that the matrix unit takes: the order of columns within a sum is free. A warp's part of a token's row is in fp16,
// scaled by a power of two to just below the largest, which loses nothing but what is below 2^-25 of its largest element.
//
// A pass is an expert with up to 8 of the tokens that chose it. Up to 8 tokens, every pass has all of them in their
// places and drops those that did not choose it; beyond (GATHER), those that did move up, and an expert with more than 8
// has several passes.
//
// With OWN there is one more expert, every token's, as wide as the others and with weights in bf16. Its items come
// first, by turns, since they are known before the router is done. Its rows of h and y are those behind all pairs. With
// GATHER a pass of it has 32 tokens, in 4 tiles, that do not stay in registers.
//
// Macros: GATED; COLS, the columns; OUT, the rows of gate, up or down; E, experts; K, experts a token; OWN; TOKENS,
// at most; STEPS of an item, 1 or 2, each of 256 columns of every warp; STAGES of the ring; BLOCKS of a multiprocessor.

#include "hopper.cuh"

#if GATED
typedef bf16 Out;
#else
typedef float Out;
#endif
constexpr int GATHER = TOKENS > 8, STEP = 256, GROUPS = STEP / 32, ROWS = GATED ? 8 : 16;
constexpr int WARPS = COLS / (STEP * STEPS), ITEMS = OUT / ROWS, EXPERT_ROWS = GATED ? 2 * OUT : OUT;
constexpr int UPPER = GATED ? OUT : 8;  // from a row of the item's first eight to its counterpart of the second
constexpr int SCALE_BYTES = COLS / 16;  // of a row of scales
// A stage: bytes of a row's weights and scales, and how far apart rows are in shared memory, for which lanes do not meet
// in a bank.
constexpr int PIECE = STEP / 2 * WARPS, ROW_BYTES = PIECE * STEPS, PITCH = PIECE + 16, OWN_PITCH = PIECE + 64;
constexpr int SCALE_PIECE = STEP / 16 * WARPS, SCALE_PITCH = SCALE_PIECE + (SCALE_PIECE / 16 % 2 ? 0 : 16);
constexpr int WORD_BYTES = 16 * PITCH;
constexpr int SLOT = WORD_BYTES + 16 * SCALE_PITCH, OWN_SLOT = OWN ? 16 * OWN_PITCH : 0;
constexpr int STAGE_BYTES = SLOT > OWN_SLOT ? SLOT : OWN_SLOT;
constexpr int OWN_STEPS = 4 * STEPS, OWN_COLUMNS = STEP / 4;  // of every warp
constexpr int BUFFERS = 4, SUMMING = 32 * (WARPS + 1), THREADS = SUMMING + 32;
constexpr int FULL = 1;                                      // barriers by number: of the buffers
constexpr int COST = 9, OWN_COST = 32;                       // bytes of an item relative to one another
constexpr int AT_ONCE = THREADS * BLOCKS > 640 ? 2 : 4;      // groups, as registers allow
constexpr int PASSES = TOKENS * K, TILES = GATHER ? 4 : 1, OWN_TOKENS = 8 * TILES;
constexpr int NONE = 0xffff;
static_assert(STEPS <= 2, "a product for what is too much has as many groups");

struct Passes {
    u64 tokens[E];          // bit t: token t chose it
    u16 first[E];           // pass of the expert
    u16 expert[PASSES];
    __align__(16) u16 pair[PASSES][8];  // t * K + place of the token among the 8, or NONE
    int count;
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    experts(const bf16* x, const long long* ids, const u8* words, const u8* scales, const bf16* own, Out* out,
#if !GATED
            const float* weights, const bf16* residual, bf16* y, int* arrived, long long residual_stride, float scale,
#endif
            long long x_stride, int T) {
    const int tid = threadIdx.x, lane = tid % 32, quad = lane / 4, pair = lane % 4;
    const int warp = __shfl_sync(~0u, tid / 32, 0);  // so that the compiler knows it for the same in all lanes
    const int block = blockIdx.x, grid = gridDim.x;

    extern __shared__ __align__(128) u8 shared[];
    float4* sums = (float4*)(shared + STAGES * STAGE_BYTES);  // [BUFFERS, WARPS, 32]
    __shared__ Passes passes;
    __shared__ u64 come_s[STAGES], read_s[STAGES], taken_s[BUFFERS];  // barriers of the ring and of the buffers
    const u32 come = shared_address(come_s), read = shared_address(read_s), taken = shared_address(taken_s);

    if (tid == 0) {
#pragma unroll
        for (int i = 0; i < STAGES; i++) init_barrier(come + 8 * i), init_barrier(read + 8 * i, WARPS);
#pragma unroll
        for (int i = 0; i < BUFFERS; i++) init_barrier(taken + 8 * i);
        share_barriers();
    }
    for (int e = tid; e < E; e += THREADS) passes.tokens[e] = 0;
    for (int p = tid; p < PASSES * 4; p += THREADS) ((u32*)passes.pair)[p] = 0xffffffffu;
    __syncthreads();

    // What this block has: its turns of the own expert's items, then a run of the others'.
    const int own_passes = OWN ? (T + OWN_TOKENS - 1) / OWN_TOKENS : 0, own_items = own_passes * ITEMS;
    const int own_count = block < own_items ? (own_items - block + grid - 1) / grid : 0;
    int count = own_count, first = 0;

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
    auto ask_own = [&](int rows, int step) {
        const int place = begin_stage(16 * PIECE);
        if (lane < 16)
            copy_bytes(shared_address(shared + place * STAGE_BYTES + lane * OWN_PITCH),
                       own + (long long)(rows + row) * COLS + step * (PIECE / 2), PIECE, come + 8 * place);
    };
    auto ask = [&](int expert, int rows, int step) {
        const int place = begin_stage(16 * PIECE + 16 * SCALE_PIECE);
        const u32 to = shared_address(shared + place * STAGE_BYTES);
        const long long at = (long long)expert * EXPERT_ROWS + rows + row;
        if (lane < 16) {
            copy_bytes(to + lane * PITCH, words + at * ROW_BYTES + step * PIECE, PIECE, come + 8 * place);
        } else {
            copy_bytes(to + WORD_BYTES + (lane - 16) * SCALE_PITCH, scales + at * SCALE_BYTES + step * SCALE_PIECE,
                       SCALE_PIECE, come + 8 * place);
        }
    };
    __syncthreads();
    auto ask_known = [&](int end) {  // stages that do not depend on the choice of experts
#pragma unroll 1
        for (int n = asked; n < min(end, own_count * OWN_STEPS); n++)
            ask_own((block + n / OWN_STEPS * grid) % ITEMS * ROWS, n % OWN_STEPS);
    };
    if (warp == WARPS + 1) ask_known(STAGES);
#if GATED
    wait_for_kernel_ahead();
#endif
    // Only now may "down" start: it reads ids before its own wait, and they are complete here.
    start_kernel_behind();

    if (warp == 0) {
        constexpr int ROUNDS = (TOKENS * K + 31) / 32;
        int expert[ROUNDS], total = 0;
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) expert[i] = 32 * i + lane < T * K ? load_id(ids + 32 * i + lane) : -1;
#pragma unroll
        for (int i = 0; i < ROUNDS; i++)
            if (expert[i] >= 0) atomicOr(&passes.tokens[expert[i]], 1ull << (32 * i + lane) / K);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {  // passes are in the order of the experts' first tokens
            const int t = (32 * i + lane) / K;
            if (32 * i >= T * K) break;
            const u64 all = passes.tokens[max(expert[i], 0)];
            int needed = 0;
            if (expert[i] >= 0 && !(all & ((1ull << t) - 1))) needed = GATHER ? (__popcll(all) + 7) / 8 : 1;
            int end = needed;
#pragma unroll
            for (int m = 1; m < 32; m *= 2) {
                const int before = __shfl_up_sync(~0u, end, m);
                if (lane >= m) end += before;
            }
            for (int n = 0; n < needed; n++) passes.expert[total + end - needed + n] = expert[i];
            if (needed) passes.first[expert[i]] = total + end - needed;
            total += __shfl_sync(~0u, end, 31);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            if (expert[i] < 0) continue;
            const int p = 32 * i + lane, t = p / K;
            const int place = GATHER ? __popcll(passes.tokens[expert[i]] & ((1ull << t) - 1)) : t;
            passes.pair[passes.first[expert[i]] + place / 8][place % 8] = p;
        }
        if (lane == 0) passes.count = total;
    }
    __syncthreads();
    {
        // Bytes are shared out evenly; where the blocks' own turns are more than that already, others take the run.
        const long long items = passes.count * ITEMS, all = items * COST + (long long)own_items * OWN_COST;
        const int turns = own_items / grid, rest = own_items % grid;
        auto start = [&](int b) {
            const long long before = all * b / grid - (long long)(turns * b + min(b, rest)) * OWN_COST;
            return before < 0 ? 0 : (int)min(before / COST, items);
        };
        first = start(block);
        count = own_count + (block + 1 < grid ? start(block + 1) : (int)items) - first;
    }

    auto pass_of = [&](int j) {  // of the block's item j: of the own expert's passes if below 0
        return j < own_count ? (block + j * grid) / ITEMS - own_passes : (first + j - own_count) / ITEMS;
    };
    auto rows_of = [&](int j) {
        return (j < own_count ? (block + j * grid) % ITEMS : (first + j - own_count) % ITEMS) * ROWS;
    };
    auto pair_of = [&](int pass, int place) {
        if (pass >= 0) return (int)passes.pair[pass][place];
        const int t = (pass + own_passes) * OWN_TOKENS + place;
        return t < T ? T * K + t : NONE;
    };
    auto tiles_of = [&](int pass) {
        return pass >= 0 || !GATHER ? 1 : min(TILES, (T - (pass + own_passes) * OWN_TOKENS + 7) / 8);
    };

    const int end = first + count - own_count;
    if (warp == WARPS + 1) {  // asks for stages
        ask_known(own_count * OWN_STEPS);
#pragma unroll 1
        for (int item = first; item < end; item++)
#pragma unroll
            for (int step = 0; step < STEPS; step++) ask(passes.expert[item / ITEMS], item % ITEMS * ROWS, step);
#if !GATED
        wait_for_kernel_ahead();
#endif
    } else if (warp == WARPS) {  // adds up what the others have, tile by tile
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
            if (lane == 0) arrive_at_barrier(taken + 8 * (n % BUFFERS));
            n++;
        };
        auto put = [&](int p, int i, int row) {  // what this lane has of its token i
            if (p == NONE) return;
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
            const int pass = pass_of(j), tiles = tiles_of(pass);
#pragma unroll 1
            for (int tile = 0; tile < tiles; tile++) {
                take();
                for (int i = 0; i < 2; i++) put(pair_of(pass, 8 * tile + 2 * pair + i), i, rows_of(j));
                release();
            }
        }
#pragma unroll 1
        for (int item = first; item < end;) {
            const int pass = item / ITEMS, stop = min(end, (pass + 1) * ITEMS);
            const int p[2] = {pair_of(pass, 2 * pair), pair_of(pass, 2 * pair + 1)};
#pragma unroll 1
            for (; item < stop; item++) {
                take();
                for (int i = 0; i < 2; i++) put(p[i], i, (item - pass * ITEMS) * ROWS);
                release();
            }
        }
    } else {
        u32 rows[STEPS * GROUPS][4];  // a lane's part of the tokens: 8 columns of each group
        float token_scale[2];         // of the two tokens whose sums it gets
        u32 too_much[3][2];           // of two groups of a step, less what is in the parts before
        auto load_rows = [&](int pass, bool of_own) {  // columns 0 and 4, 1 and 5 and so on
            int p = GATED && !GATHER ? (quad < T ? quad : NONE) : pair_of(pass, quad);
            if (GATED && GATHER && p != NONE) p = p < T * K ? p / K : p - T * K;
            const bf16* from = x + p * x_stride + warp * (of_own ? OWN_COLUMNS : STEP) + 8 * pair;
#pragma unroll
            for (int g = 0; g < STEPS * GROUPS; g++) {
                const int at = of_own ? g / 2 * WARPS * OWN_COLUMNS + g % 2 * 32 : g / GROUPS * WARPS * STEP + g % GROUPS * 32;
                const uint4 w = p != NONE ? load16(from + at) : make_uint4(0, 0, 0, 0);
                rows[g][0] = __byte_perm(w.x, w.z, 0x5410), rows[g][1] = __byte_perm(w.x, w.z, 0x7632);
                rows[g][2] = __byte_perm(w.y, w.w, 0x5410), rows[g][3] = __byte_perm(w.y, w.w, 0x7632);
            }
            token_scale[0] = token_scale[1] = 1.0f;
        };
        auto to_fp16 = [&]() {
            u32 largest = 0;
#pragma unroll
            for (int i = 0; i < STEPS * GROUPS * 4; i++) largest = max_pairs(largest, rows[i / 4][i % 4] & 0x7fff7fffu);
            largest = max(largest & 0xffff, largest >> 16);
            largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
            largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
            // Powers of two put together from their bits. The largest lands in [2^14, 2^15), and NaN stays NaN.
            const int exponent = min(max((int)largest >> 7, 15), 253);
            const float factor = __int_as_float((268 - exponent) << 23);
            const float inverse = __int_as_float((exponent - 14) << 23);
            token_scale[0] = __shfl_sync(~0u, inverse, 8 * pair);
            token_scale[1] = __shfl_sync(~0u, inverse, 8 * pair + 4);
            float left[2][2] = {};
#pragma unroll
            for (int g = 0; g < STEPS * GROUPS; g++) {
                float sum = 0;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float times = i % 2 ? factor * 0.0625f : factor;
                    const float a = low(rows[g][i]) * times, b = high(rows[g][i]) * times;
                    sum += (a + b) * (i % 2 ? -1152.0f : -1032.0f);
                    rows[g][i] = pack_half(a, b);
                }
                sum += __shfl_xor_sync(~0u, sum, 1);
                sum += __shfl_xor_sync(~0u, sum, 2);
                if (g % GROUPS / 2 == pair) left[g / GROUPS][g % 2] = sum;
            }
#pragma unroll
            for (int i = 0; i < 6; i++) {
                float(&two)[2] = left[i % 2];
                const u32 part = too_much[i / 2][i % 2] = pack(two[0], two[1]);
                two[0] -= low(part), two[1] -= high(part);
            }
        };
#if !GATED
        wait_for_kernel_ahead();
#endif
        int place = 0, n = 0;
        u32 phase = 0;
        auto give = [&](const float(&sum)[4]) {  // to who adds up
            if (n >= BUFFERS) wait_at_barrier(taken + 8 * (n % BUFFERS), (n / BUFFERS - 1) & 1);
            sums[(n % BUFFERS * WARPS + warp) * 32 + lane] = make_float4(
                sum[0] * token_scale[0], sum[1] * token_scale[1], sum[2] * token_scale[0], sum[3] * token_scale[1]);
            arrive_at<SUMMING>(FULL + n % BUFFERS);
            n++;
        };
        auto stage = [&]() {
            wait_at_barrier(come + 8 * place, phase);
            return shared + place * STAGE_BYTES;
        };
        auto next = [&]() {
            __syncwarp();  // all have read
            if (lane == 0) arrive_at_barrier(read + 8 * place);
            if (++place == STAGES) place = 0, phase ^= 1;
        };
        if (!GATHER && own_count > 0) load_rows(-own_passes, true);
#pragma unroll 1
        for (int j = 0; j < own_count; j++) {
            if (GATHER) {
                float c[TILES][4] = {};
                const int t = (pass_of(j) + own_passes) * OWN_TOKENS + quad;
                const bf16* from = x + (GATED ? t : T * K + t) * x_stride + warp * OWN_COLUMNS + 8 * pair;
#pragma unroll 1
                for (int step = 0; step < OWN_STEPS; step++, from += WARPS * OWN_COLUMNS) {
                    const u8* at = stage() + quad * OWN_PITCH + warp * (2 * OWN_COLUMNS) + pair * 16;
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        uint4 b[TILES];
#pragma unroll
                        for (int i = 0; i < TILES; i++)
                            b[i] = t + 8 * i < T ? load16(from + 8 * i * x_stride + 32 * half) : make_uint4(0, 0, 0, 0);
                        const uint4 l = *(const uint4*)(at + 64 * half), u = *(const uint4*)(at + 8 * OWN_PITCH + 64 * half);
                        // Neighbours as they are: here both operands have their own order.
#pragma unroll
                        for (int i = 0; i < TILES; i++) {
                            mma(c[i], l.x, u.x, l.y, u.y, b[i].x, b[i].y);
                            mma(c[i], l.z, u.z, l.w, u.w, b[i].z, b[i].w);
                        }
                    }
                    next();
                }
                token_scale[0] = token_scale[1] = 1.0f;
#pragma unroll
                for (int i = 0; i < TILES; i++)
                    if (t - quad + 8 * i < T) give(c[i]);
            } else {
                float c[2][4] = {};
#pragma unroll
                for (int step = 0; step < OWN_STEPS; step++) {
                    const u8* at = stage() + quad * OWN_PITCH + warp * (2 * OWN_COLUMNS) + pair * 16;
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const uint4 l = *(const uint4*)(at + 64 * half), u = *(const uint4*)(at + 8 * OWN_PITCH + 64 * half);
                        const u32(&b)[4] = rows[2 * step + half];
                        mma(c[0], __byte_perm(l.x, l.z, 0x5410), __byte_perm(u.x, u.z, 0x5410),
                            __byte_perm(l.x, l.z, 0x7632), __byte_perm(u.x, u.z, 0x7632), b[0], b[1]);
                        mma(c[1], __byte_perm(l.y, l.w, 0x5410), __byte_perm(u.y, u.w, 0x5410),
                            __byte_perm(l.y, l.w, 0x7632), __byte_perm(u.y, u.w, 0x7632), b[2], b[3]);
                    }
                    next();
                }
#pragma unroll
                for (int i = 0; i < 4; i++) c[0][i] += c[1][i];
                give(c[0]);
            }
        }
        constexpr bool ALWAYS = GATED && !GATHER;  // these tokens are those of every pass
        if (ALWAYS && first < end) {
            load_rows(0, false);
            to_fp16();
        }
#pragma unroll 1
        for (int item = first; item < end;) {
            const int pass = item / ITEMS, stop = min(end, (pass + 1) * ITEMS);
            if (!ALWAYS) load_rows(pass, false), to_fp16();
#pragma unroll 1
            for (; item < stop; item++) {
                float sum[4] = {};
                u32 of_pair[2][2] = {};  // scales of the groups that this lane has for what is too much
#pragma unroll
                for (int step = 0; step < STEPS; step++) {
                    const u8* at = stage();
                    const u8* of_rows = at + WORD_BYTES + quad * SCALE_PITCH + warp * (STEP / 16);
                    at += quad * PITCH + warp * (STEP / 2) + pair * 4;
                    const uint4 l8 = *(const uint4*)of_rows, u8s = *(const uint4*)(of_rows + 8 * SCALE_PITCH);
                    const u32 l_scales[4] = {l8.x, l8.y, l8.z, l8.w}, u_scales[4] = {u8s.x, u8s.y, u8s.z, u8s.w};
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        if (pair == i) of_pair[step][0] = l_scales[i], of_pair[step][1] = u_scales[i];
#pragma unroll
                    for (int first = 0; first < GROUPS; first += AT_ONCE) {
                        u32 l[AT_ONCE], u[AT_ONCE];
#pragma unroll
                        for (int i = 0; i < AT_ONCE; i++) {
                            const u8* word = at + (first + i) * 16;
                            l[i] = *(const u32*)word, u[i] = *(const u32*)(word + 8 * PITCH);
                        }
                        if (first + AT_ONCE == GROUPS) next();
                        constexpr u32 FIRST = 0x000f000f, SECOND = 0x00f000f0;
                        float c[AT_ONCE][4] = {};
#pragma unroll
                        for (int i = 0; i < AT_ONCE; i++) {
                            const u32(&b)[4] = rows[step * GROUPS + first + i];
                            mma_fp16(c[i], fp16_of(l[i], FIRST), fp16_of(u[i], FIRST), fp16_of(l[i], SECOND),
                                     fp16_of(u[i], SECOND), b[0], b[1]);
                        }
#pragma unroll
                        for (int i = 0; i < AT_ONCE; i++) {
                            const u32(&b)[4] = rows[step * GROUPS + first + i];
                            const u32 l_8 = l[i] >> 8, u_8 = u[i] >> 8;
                            mma_fp16(c[i], fp16_of(l_8, FIRST), fp16_of(u_8, FIRST), fp16_of(l_8, SECOND),
                                     fp16_of(u_8, SECOND), b[2], b[3]);
                        }
#pragma unroll
                        for (int i = 0; i < AT_ONCE; i++) {
                            const u32 l2 = l_scales[(first + i) / 2], u2 = u_scales[(first + i) / 2];
                            const float s = i % 2 ? high(l2) : low(l2), r = i % 2 ? high(u2) : low(u2);
                            sum[0] += c[i][0] * s, sum[1] += c[i][1] * s, sum[2] += c[i][2] * r, sum[3] += c[i][3] * r;
                        }
                    }
                }
#pragma unroll
                for (int i = 0; i < 3; i++) 
                    mma(sum, of_pair[0][0], of_pair[0][1], of_pair[1][0], of_pair[1][1], too_much[i][0], too_much[i][1]);
                give(sum);
            }
        }
    }
#if !GATED
    // The weighted sum. Whoever comes last to a token's 16 columns adds up what all have there, in one order. The count
    // of those who came is zero again when the kernel ends.
    constexpr int ARRIVALS = K + OWN;
    __shared__ int found;
    int* list = (int*)shared;  // the ring is free
    if (tid == 0) found = 0;
    __threadfence();
    __syncthreads();
    const int own_places = own_count * OWN_TOKENS;
    for (int n = tid; n < own_places + (count - own_count) * 8; n += THREADS) {
        const int i = n - own_places, j = i < 0 ? n / OWN_TOKENS : own_count + i / 8;
        const int p = pair_of(pass_of(j), i < 0 ? n % OWN_TOKENS : i % 8);
        if (p == NONE) continue;
        const int t = p < T * K ? p / K : p - T * K, strip = t * ITEMS + rows_of(j) / ROWS;
        if (atomicAdd(arrived + strip, 1) == ARRIVALS - 1) list[atomicAdd(&found, 1)] = strip;
    }
    __syncthreads();
    __threadfence();
    for (int n = tid / 16; n < found; n += THREADS / 16) {
        const int strip = list[n], t = strip / ITEMS, at = strip % ITEMS * ROWS + tid % 16;
        float parts[ARRIVALS], weight[K], total = 0;
#pragma unroll
        for (int k = 0; k < K; k++) {
            parts[k] = load_fp32(out + (long long)(t * K + k) * OUT + at);
            weight[k] = load_fp32(weights + t * K + k);
        }
        if (OWN) parts[K] = load_fp32(out + (long long)(T * K + t) * OUT + at);
        const float before = residual ? from_bf16(load_bf16(residual + t * residual_stride + at)) : 0.0f;
#pragma unroll
        for (int k = 0; k < K; k++) total += weight[k] * parts[k];
        // Rounded where the unfused additions round.
        if (OWN) total = as_bf16(fmaf(as_bf16(total), scale, as_bf16(parts[K])));
        store_bf16(y + (long long)t * OUT + at, residual ? total + before : total);
        if (tid % 16 == 0) arrived[strip] = 0;
    }
#endif
}
