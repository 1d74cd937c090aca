// One of the experts' two matrix products over weights in int4 or float8, for a few tokens, on Hopper: gate and up with
// SiLU (GATED), or down with the weighted sum that ends the experts.
//
// An item is 16 rows of an expert: 8 of gate and the same 8 of up, or 16 of down. Blocks fill the multiprocessors once
// and share out the items by their bytes. Each warp of a block has the same few columns of all of them, so a warp's part
// of the tokens stays in registers, as the right-hand operand of the matrix unit, and weights stream past it by way of
// the warp's own ring in shared memory, STAGES steps ahead. What the warps have of an item is added up by one more warp:
// none waits for another until all buffers of sums are full.
//
// int4: a nibble n goes to fp16 by its bits alone: 0x6400 | n is 1024 + n,
// and 0x6400 | n << 4, where it stands, is 1024 + 16 n, for which x has a sixteenth. What is too much, 1032 times the
// columns of x or 1152 times their sixteenths, is where the products of a group begin; its scale is applied to their sum.
// So a weight is never rounded. A lane has a word of each group, whose nibbles 0 and 4, 1 and 5 and so on are the pairs
// that the matrix unit takes: the order of columns within a sum is free. A warp's part of a token's row is in fp16,
// scaled by a power of two to just below the largest, which loses nothing but what is below 2^-25 of its largest element.
//
// FP8: from e4m3 to fp16 there is an instruction; a lane takes 16 weights in a row, and blocks of 128 x 128 share a scale.
//
// A pass is an expert with up to 8 of the tokens that chose it. Up to 8 tokens, every pass has all of them in their
// places and drops those that did not choose it; beyond (GATHER), those that did move up, and an expert with more than 8
// has several passes.
//
// With OWN there is one more expert, every token's, as wide as the others and with weights in bf16. Its items come
// first, by turns, since they are known before the router is done. Its rows of h and y are those behind all pairs. With
// GATHER a pass of it has 32 tokens, in 4 tiles, that do not stay in registers.
//
// Macros: FP8; GATED; COLS, the columns; OUT, the rows of gate, up or down; E, experts; K, experts a token; OWN, with int4;
// TOKENS, at most; STEPS that a warp has, of 256 columns or 128 (FP8); STAGES of the ring; BLOCKS of a multiprocessor.

#include "hopper.cuh"

#if GATED
typedef bf16 Out;
#else
typedef float Out;
#endif
constexpr int GATHER = TOKENS > 8, STEP = FP8 ? 128 : 256, GROUPS = STEP / 32, ROWS = GATED ? 8 : 16;
constexpr int WARPS = COLS / (STEP * STEPS), ITEMS = OUT / ROWS, EXPERT_ROWS = GATED ? 2 * OUT : OUT;
constexpr int UPPER = GATED ? OUT : 8;  // from a row of the item's first eight to its counterpart of the second
constexpr int STEP_BYTES = 128, ROW_BYTES = COLS / STEP * STEP_BYTES;  // of a row of the weights
constexpr int LINE = STEP_BYTES + 16;  // a group of 8 rows in int4, and 16 bytes against bank conflicts
constexpr int WORD_BYTES = 16 * (FP8 ? STEP_BYTES : LINE), SLOT_BYTES = WORD_BYTES + (FP8 ? 16 : 16 * 2 * GROUPS);
constexpr int BLOCK = 128, SCALE_BYTES = FP8 ? COLS / BLOCK * 4 : COLS / 16;  // of a row of scales
constexpr int OWN_STEPS = 4 * STEPS;  // of 64 columns
constexpr int BUFFERS = 4, THREADS = 32 * (WARPS + 1);
constexpr int FULL = 1, EMPTY = FULL + BUFFERS;              // barriers of the buffers
constexpr int COST = 9, OWN_COST = 32;                       // bytes of an item relative to one another
constexpr int PASSES = TOKENS * K, TILES = GATHER ? 4 : 1, OWN_TOKENS = 8 * TILES;
constexpr int NONE = 0xffff;
static_assert(!FP8 || !OWN, "beside weights in float8 there is no expert in bf16");
static_assert(STAGES % STEPS == 0, "what is asked for when a step is done has its number within an item");

__device__ __forceinline__ u32 word(uint4 w, int i) { return i == 0 ? w.x : i == 1 ? w.y : i == 2 ? w.z : w.w; }

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
    float4* sums = (float4*)(shared + WARPS * STAGES * SLOT_BYTES);  // [BUFFERS, WARPS, 32]
#if !FP8
    __shared__ float4 too_much[WARPS][STEPS * GROUPS][4];  // of two tokens, twice
#endif
    __shared__ Passes passes;

    for (int e = tid; e < E; e += THREADS) passes.tokens[e] = 0;
    for (int p = tid; p < PASSES * 4; p += THREADS) ((u32*)passes.pair)[p] = 0xffffffffu;
    __syncthreads();

    // What this block has: its turns of the own expert's items, then a run of the others'.
    const int own_passes = OWN ? (T + OWN_TOKENS - 1) / OWN_TOKENS : 0, own_items = own_passes * ITEMS;
    const int own_count = block < own_items ? (own_items - block + grid - 1) / grid : 0;
    int count = own_count, first = 0;

    // The ring. A step of 256 columns in int4 has 8 groups of 16 bytes a row, one of 64 in bf16 as many parts; 8 lanes
    // copy a line of a row, to where lanes read it without meeting in a bank. Places are counted from `shared`.
    const int ring = warp * STAGES * SLOT_BYTES, row = lane / 8, part = lane % 8;
    const int by_lines = part / 4 * 512 + (row * 4 + part % 4) * 16, put = FP8 ? by_lines : part * LINE + row * 16;
    int asked = 0, asked_left = 0;  // items asked for, and how many more its pass has
    const u8 *asked_words = nullptr, *asked_scales = nullptr, *of_expert = nullptr;  // of_expert: its scales
    auto ask_own = [&](int slot, int step) {
        if (step == 0) {
            const int rows = (block + asked * grid) % ITEMS * ROWS;
            asked_words = (const u8*)(own + (long long)(rows + row) * COLS + warp * STEPS * STEP + part * 8);
        }
        const u8* from = asked_words + step * 128;
        const u32 to = shared_address(shared + slot + by_lines);
#pragma unroll
        for (int i = 0; i < 4; i++)  // 4 rows of the lower or upper 8
            copy16(to + i / 2 * 1024 + i % 2 * 256, from + (long long)(i / 2 * UPPER + i % 2 * 4) * (2 * COLS));
        asked += step == OWN_STEPS - 1;
    };
    auto ask_words = [&](int slot, int step) {
        if (step == 0) {
            if (asked_left == 0) {
                const int item = first + asked - own_count, rows = item % ITEMS;
                const long long at = passes.expert[item / ITEMS] * EXPERT_ROWS + rows * ROWS;
                asked_words = words + (at + row) * ROW_BYTES + warp * STEPS * STEP_BYTES + part * 16;
                if (FP8) {
                    const int block_row = (at - rows * ROWS) / BLOCK + lane % 2 * (GATED ? UPPER / BLOCK : 0);
                    of_expert = scales + (long long)block_row * SCALE_BYTES + 4 * warp * STEPS;
                } else {
                    const long long of = at + lane % 8 + lane / 8 % 2 * UPPER;
                    asked_scales = scales + of * SCALE_BYTES + warp * STEPS * 2 * GROUPS;
                }
                asked_left = ITEMS - rows;
            } else {
                asked_words += ROWS * ROW_BYTES;
                asked_scales += ROWS * SCALE_BYTES;
            }
            if (FP8) asked_scales = of_expert + (ITEMS - asked_left) * ROWS / BLOCK * SCALE_BYTES;
            asked_left--;
        }
        const u8* from = asked_words + step * STEP_BYTES;
        const u32 to = shared_address(shared + slot + put);
#pragma unroll
        for (int i = 0; i < 4; i++)
            copy16(to + i / 2 * (WORD_BYTES / 2) + i % 2 * (FP8 ? 256 : 64),
                   from + (i / 2 * UPPER + i % 2 * 4) * ROW_BYTES);
        if (FP8) {
            if (lane < 2) copy4(shared_address(shared + slot + WORD_BYTES + lane * 4), asked_scales + step * 4);
        } else if (lane < 16)
            copy16_alone(shared_address(shared + slot + WORD_BYTES + lane * 16), asked_scales + step * 2 * GROUPS);
        asked += step == STEPS - 1;
    };
    // Into the place of a step that is done, the one that is STAGES steps behind it.
    auto ask = [&](int slot, int step, bool own_may_be) {
        if (own_may_be && asked < own_count)
            ask_own(slot, (step + STAGES) % OWN_STEPS);
        else if (asked < count)
            ask_words(slot, step % STEPS);
        commit_copies();
    };
    int ahead = 0;
    if (warp < WARPS)
#pragma unroll
        for (int n = 0; n < STAGES; n++)
            if (asked < own_count) {
                ask_own(ring + n * SLOT_BYTES, n % OWN_STEPS);
                commit_copies();
                ahead = n + 1;
            }
#if GATED
    wait_for_kernel_ahead();
    // Only now may "down" start: it reads ids before its own wait, and they are complete here.
#endif
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

    if (warp == WARPS) {  // adds up what the others have, tile by tile
        int n = 0, all = count - own_count;
        for (int j = 0; j < own_count; j++) all += tiles_of(pass_of(j));
#pragma unroll 1
        for (int j = 0; j < count; j++) {
            const int pass = pass_of(j), at = rows_of(j) + quad, tiles = tiles_of(pass);
#pragma unroll 1
            for (int tile = 0; tile < tiles; tile++, n++) {
                const float4* item_sums = sums + n % BUFFERS * WARPS * 32 + lane;
                float v[4] = {};
                wait_at<THREADS>(FULL + n % BUFFERS);
#pragma unroll
                for (int i = 0; i < WARPS; i++) {
                    const float4 some = item_sums[i * 32];
                    v[0] += some.x, v[1] += some.y, v[2] += some.z, v[3] += some.w;
                }
                if (n + BUFFERS < all) arrive_at<THREADS>(EMPTY + n % BUFFERS);
#if !GATED
                if (n == 0) wait_for_kernel_ahead();
#endif
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int p = pair_of(pass, 8 * tile + 2 * pair + i);
                    if (p == NONE) continue;
                    Out* to = out + (long long)p * OUT + at;
#if GATED
                    store_bf16(to, v[i] / (1.0f + __expf(-v[i])) * v[2 + i]);
#else
                    to[0] = v[i];
                    to[8] = v[2 + i];
#endif
                }
            }
        }
    } else {
        u32 rows[STEPS * GROUPS][4];  // a lane's part of the tokens: 8 columns of each group
        float token_scale[2];         // of the two tokens whose sums it gets
        auto load_rows = [&](int pass) {  // with int4 columns 0 and 4, 1 and 5 and so on
            int p = GATED && !GATHER ? (quad < T ? quad : NONE) : pair_of(pass, quad);
            if (GATED && GATHER && p != NONE) p = p < T * K ? p / K : p - T * K;
            const bf16* from = x + p * x_stride + warp * STEPS * STEP + (FP8 ? 16 : 8) * pair;
#pragma unroll
            for (int g = 0; g < STEPS * GROUPS; g++) {
                const int at = FP8 ? g / 2 * 64 + g % 2 * 8 : g * 32;
                const uint4 w = p != NONE ? load16(from + at) : make_uint4(0, 0, 0, 0);
                if (FP8) {
                    rows[g][0] = w.x, rows[g][1] = w.y, rows[g][2] = w.z, rows[g][3] = w.w;
                    continue;
                }
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
#if FP8
#pragma unroll
            for (int i = 0; i < STEPS * GROUPS * 4; i++) {
                u32& two = rows[i / 4][i % 4];
                two = pack_half(low(two) * factor, high(two) * factor);
            }
#else
            __syncwarp();  // all have read what was too much
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
                float* of_two = (float*)&too_much[warp][g][quad / 2] + quad % 2;
                if (pair == 0) of_two[0] = of_two[2] = sum;
            }
            __syncwarp();
#endif
        };
#pragma unroll
        for (int n = 0; n < STAGES; n++)
            if (n >= ahead) ask(ring + n * SLOT_BYTES, n, false);
#if !GATED
        wait_for_kernel_ahead();
#endif
        int held = NONE, slot = ring, n = 0, left = 0, pass = 0;
        auto give = [&](const float(&sum)[4]) {  // to who adds up
            if (n >= BUFFERS) wait_at<THREADS>(EMPTY + n % BUFFERS);
            sums[(n % BUFFERS * WARPS + warp) * 32 + lane] = make_float4(
                sum[0] * token_scale[0], sum[1] * token_scale[1], sum[2] * token_scale[0], sum[3] * token_scale[1]);
            arrive_at<THREADS>(FULL + n % BUFFERS);
            n++;
        };
        auto next = [&](int step, bool is_own) {
            __syncwarp();  // all have read
            ask(slot, step, is_own);
            slot += SLOT_BYTES;
            if (slot == ring + STAGES * SLOT_BYTES) slot = ring;
        };
#pragma unroll 1
        for (int j = 0; j < count; j++) {
            const bool is_own = j < own_count;
            if (is_own) {
                pass = pass_of(j);
            } else if (left == 0) {
                const int item = first + j - own_count;
                pass = item / ITEMS, left = ITEMS - item % ITEMS;
            }
            left -= !is_own;
            const int key = GATED && !GATHER ? -is_own : pass;
            if (key != held && !(GATHER && is_own)) {
                if (!(GATED && !GATHER && held != NONE)) load_rows(pass);  // or it holds them already, in bf16
                if (!is_own) to_fp16();
                held = key;
            }
            float sum[4] = {};
            if (is_own && GATHER) {
                float c[TILES][4] = {};
                const int t = (pass + own_passes) * OWN_TOKENS + quad;
                const bf16* from = x + (GATED ? t : T * K + t) * x_stride + warp * STEPS * STEP + 8 * pair;
#pragma unroll 1
                for (int step = 0; step < OWN_STEPS; step++, from += 64) {
                    wait_for_copies<STAGES - 1>();
                    __syncwarp();
                    const u8* at = shared + slot + 16 * lane;
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        uint4 b[TILES];
#pragma unroll
                        for (int i = 0; i < TILES; i++)
                            b[i] = t + 8 * i < T ? load16(from + 8 * i * x_stride + 32 * half) : make_uint4(0, 0, 0, 0);
                        const uint4 l = *(const uint4*)(at + 512 * half), u = *(const uint4*)(at + 1024 + 512 * half);
                        // Neighbours as they are: here both operands have their own order.
#pragma unroll
                        for (int i = 0; i < TILES; i++) {
                            mma(c[i], l.x, u.x, l.y, u.y, b[i].x, b[i].y);
                            mma(c[i], l.z, u.z, l.w, u.w, b[i].z, b[i].w);
                        }
                    }
                    next(step, true);
                }
                token_scale[0] = token_scale[1] = 1.0f;
                held = NONE;
#pragma unroll
                for (int i = 0; i < TILES; i++)
                    if (t - quad + 8 * i < T) give(c[i]);
                continue;
            }
            if (is_own) {
                float c[2][4] = {};
#pragma unroll
                for (int step = 0; step < OWN_STEPS; step++) {
                    wait_for_copies<STAGES - 1>();
                    __syncwarp();
                    const u8* at = shared + slot + 16 * lane;
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const uint4 l = *(const uint4*)(at + 512 * half), u = *(const uint4*)(at + 1024 + 512 * half);
                        const u32(&b)[4] = rows[2 * step + half];
                        mma(c[0], __byte_perm(l.x, l.z, 0x5410), __byte_perm(u.x, u.z, 0x5410),
                            __byte_perm(l.x, l.z, 0x7632), __byte_perm(u.x, u.z, 0x7632), b[0], b[1]);
                        mma(c[1], __byte_perm(l.y, l.w, 0x5410), __byte_perm(u.y, u.w, 0x5410),
                            __byte_perm(l.y, l.w, 0x7632), __byte_perm(u.y, u.w, 0x7632), b[2], b[3]);
                    }
                    next(step, true);
                }
#pragma unroll
                for (int i = 0; i < 4; i++) sum[i] = c[0][i] + c[1][i];
            } else {
#pragma unroll
                for (int step = 0; step < STEPS; step++) {
                    wait_for_copies<STAGES - 1>();
                    __syncwarp();
#if FP8
                    uint4 w[2][2];  // [lower or upper, half]
#pragma unroll
                    for (int i = 0; i < 4; i++) w[i / 2][i % 2] = *(const uint4*)(shared + slot + 16 * lane + 512 * i);
                    const float2 of_rows = *(const float2*)(shared + slot + WORD_BYTES);
                    float c[2][4] = {};
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        const u32 l = word(w[0][i / 4], i % 4), u = word(w[1][i / 4], i % 4);
                        const u32* b = &rows[step * GROUPS + i / 2][i % 2 * 2];
                        mma_fp16(c[i / 4], widen_half((u16)l), widen_half((u16)u), widen_half((u16)(l >> 16)),
                                 widen_half((u16)(u >> 16)), b[0], b[1]);
                    }
                    next(step, false);
#pragma unroll
                    for (int i = 0; i < 4; i++) sum[i] += (c[0][i] + c[1][i]) * (i < 2 ? of_rows.x : of_rows.y);
#else
                    const u8* at = shared + slot + 4 * lane;
                    const u8* of_rows = shared + slot + WORD_BYTES + quad * 16;
                    const uint4 l_scales = *(const uint4*)of_rows, u_scales = *(const uint4*)(of_rows + 128);
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        u32 l[4], u[4];
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            l[i] = *(const u32*)(at + (4 * half + i) * LINE);
                            u[i] = *(const u32*)(at + (4 * half + i) * LINE + WORD_BYTES / 2);
                        }
                        if (half == 1) next(step, false);
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            const int g = 4 * half + i;
                            const float4 begin = too_much[warp][step * GROUPS + g][pair];
                            float c[4] = {begin.x, begin.y, begin.z, begin.w};
                            const u32(&b)[4] = rows[step * GROUPS + g];
                            const u32 l_8 = l[i] >> 8, u_8 = u[i] >> 8, FIRST = 0x000f000f, SECOND = 0x00f000f0;
                            mma_fp16(c, fp16_of(l[i], FIRST), fp16_of(u[i], FIRST), fp16_of(l[i], SECOND),
                                     fp16_of(u[i], SECOND), b[0], b[1]);
                            mma_fp16(c, fp16_of(l_8, FIRST), fp16_of(u_8, FIRST), fp16_of(l_8, SECOND),
                                     fp16_of(u_8, SECOND), b[2], b[3]);
                            const u32 l2 = word(l_scales, g / 2), u2 = word(u_scales, g / 2);
                            const float s = g % 2 ? high(l2) : low(l2), r = g % 2 ? high(u2) : low(u2);
                            sum[0] += c[0] * s, sum[1] += c[1] * s, sum[2] += c[2] * r, sum[3] += c[3] * r;
                        }
                    }
#endif
                }
            }
            give(sum);
        }
    }
#if !GATED
    // The weighted sum. Whoever comes last to a token's 16 columns adds up what all have there, in one order. The count
    // of those who came is zero again when the kernel ends.
    constexpr int ARRIVALS = K + OWN;
    __shared__ int found;
    int* list = (int*)shared;  // the ring is free
    if (count == 0 && warp == WARPS) wait_for_kernel_ahead();
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
