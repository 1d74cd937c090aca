// One of the experts' two matrix products over weights in int4, for the many tokens of prompts, on Hopper: gate and up with
// SiLU (GATED), or down.
//
// A block takes up to 128 tokens of an expert and 256 of its rows: 128 of gate and the same of up, or 256 of down. Two
// warpgroups have 64 rows twice ("lower" and "upper": gate and up, or neighbours), as the left operand of the matrix unit,
// from registers: while the products of one half are under way, the next half's weights are widened. A third warpgroup
// copies tokens, words and scales, 128 columns at a time, into a ring of STAGES.
//
// A lane has the 32 columns of a group, four words, of a row. So of every 128 columns x and h have them in the order in
// which that gives pairs to the matrix unit: column 32 p + 8 i + 4 b + 2 u + g stands at 32 i + 16 u + 8 g + 2 p + b.
//
// Macros: GATED; COLS, the columns, a multiple of 128; OUT, the rows of gate, up (multiples of 128) or down (of 256);
// STAGES.

#include "hopper.cuh"
#include "matrix_unit.cuh"

constexpr int TOKENS = 128, STEP = 128, STEPS = COLS / STEP, OWN_ROWS = GATED ? 128 : 256, TILES = OUT / OWN_ROWS;
constexpr int EXPERT_ROWS = GATED ? 2 * OUT : OUT, ROW_BYTES = COLS / 2, SCALE_ROW_BYTES = COLS / 16;
constexpr int X_HALF = TOKENS * 128, WORDS = 2 * X_HALF, SCALES = WORDS + 256 * 64, STAGE_BYTES = SCALES + 256 * 8;
constexpr int PITCH = 2 * OWN_ROWS + 16;  // bytes between tokens of what goes out
constexpr int COPYING = 128, MULTIPLYING = 256, THREADS = COPYING + MULTIPLYING;
static_assert(STAGE_BYTES % 1024 == 0 && STAGES * STAGE_BYTES >= TOKENS * PITCH, "stages are aligned; results fit the ring");

__device__ __forceinline__ u32 word(uint4 w, int i) { return i == 0 ? w.x : i == 1 ? w.y : i == 2 ? w.z : w.w; }

// The weights of 16 rows of a warp: for each 16 columns, of rows quad and quad + 8.
__device__ __forceinline__ void widen(u32 (&a)[8][4], const u8* words, const u8* scales) {
    const uint4 l = *(const uint4*)words, u = *(const uint4*)(words + 8 * 64);
    const u32 l_scale = *(const u16*)scales, u_scale = *(const u16*)(scales + 8 * 8);
    const u32 l_scales = l_scale << 16 | l_scale, u_scales = u_scale << 16 | u_scale;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            a[2 * i + j / 2][j % 2 * 2] = widen_nibbles(word(l, i) >> 4 * j, l_scales);
            a[2 * i + j / 2][j % 2 * 2 + 1] = widen_nibbles(word(u, i) >> 4 * j, u_scales);
        }
}

__device__ __forceinline__ int place_of(int row) {
    const int n = row % 8;
    return row / 128 * 128 + row / 8 % 4 * 32 + n / 2 % 2 * 16 + n % 2 * 8 + row / 32 % 4 * 2 + n / 4;
}

// Sums of 16 N tokens: of a warpgroup's lower rows and of its upper ones.
template <int N> __device__ __forceinline__ void multiply_all(u8* ring, u32 come, u32 read, int tid, int count, bf16* out,
                                                              const int* pairs, int first_row) {
    const int lane = tid % 32, quad = lane / 4, pair = lane % 4, warp = tid / 32;
    const int group = warp / 4, row = group * 128 + warp % 4 * 16 + quad;  // of the block's, in shared memory
    float lower[8 * N] = {}, upper[8 * N] = {};
    u32 a[8][4], b[8][4];
#pragma unroll
    for (int i = 0; i < 32; i++) b[i / 4][i % 4] = 0;
    int place = 0, phase = 0, last = 0;
#pragma unroll 1
    for (int step = 0; step < STEPS; step++) {
        u8* stage = ring + place * STAGE_BYTES;
        const u8 *words = stage + WORDS + row * 64 + pair * 16, *scales = stage + SCALES + row * 8 + pair * 2;
        wait_at_barrier(come + 8 * place, phase);
        share_writes();
        const u32 x_at = shared_address(stage);
        auto operand = [&](int t) { return describe(x_at + t / 4 * X_HALF + t % 4 * 32, 16); };
        widen(a, words, scales);
        settle(lower), keep(a);
        begin_products();
#pragma unroll
        for (int t = 0; t < 8; t++) multiply_left<2 * N>(lower, a[t], operand(t));
        commit_products();
        wait_for_products<1>();  // the upper ones of the step before
        settle(upper), keep(b);
        if (step > 0 && lane == 0) arrive_at_barrier(read + 8 * last);
        widen(b, words + 64 * 64, scales + 64 * 8);
        settle(upper), keep(b);
        begin_products();
#pragma unroll
        for (int t = 0; t < 8; t++) multiply_left<2 * N>(upper, b[t], operand(t));
        commit_products();
        wait_for_products<1>();  // the lower ones
        settle(lower), keep(a);
        last = place;
        if (++place == STAGES) place = 0, phase ^= 1;
    }
    wait_for_products<0>();
    settle(upper), keep(b);

    // Out by way of shared memory, so that a token's rows lie together.
    wait_at<MULTIPLYING>(1);
    const int mine = GATED ? group * 64 + warp % 4 * 16 + quad : row;
#pragma unroll
    for (int e = 0; e < 8 * N; e++) {
        const int token = e / 4 * 8 + 2 * pair + e % 2, r = mine + e / 2 % 2 * 8;
        bf16* to = (bf16*)(ring + token * PITCH);
#if GATED
        store_bf16(to + place_of(r), lower[e] / (1.0f + __expf(-lower[e])) * upper[e]);
#else
        store_bf16(to + r, lower[e]);
        store_bf16(to + r + 64, upper[e]);
#endif
    }
    wait_at<MULTIPLYING>(1);
    constexpr int CHUNKS = OWN_ROWS / 8;
#pragma unroll 1
    for (int i = tid; i < count * CHUNKS; i += MULTIPLYING) {
        const int token = i / CHUNKS, chunk = i % CHUNKS;
        const long long to = GATED ? token : pairs[token];
        *(uint4*)(out + to * OUT + first_row + 8 * chunk) = *(const uint4*)(ring + token * PITCH + 16 * chunk);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    product(const bf16* x, const int* sorted, const int* blocks, const u8* all_words, const u8* all_scales, bf16* out,
            long long x_stride, int share) {
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ u64 come_s[STAGES], read_s[STAGES];  // barriers of the ring
    const u32 come = shared_address(come_s), read = shared_address(read_s);
    const int tid = threadIdx.x;
    if (tid == 0) {
#pragma unroll
        for (int i = 0; i < STAGES; i++) init_barrier(come + 8 * i, COPYING), init_barrier(read + 8 * i, MULTIPLYING / 32);
        share_barriers();
    }
    wait_for_kernel_ahead();
    start_kernel_behind();
    __syncthreads();
    const int* block = blocks + 3 * (blockIdx.x / TILES);
    const int expert = load_int(block), first = load_int(block + 1), count = load_int(block + 2);
    const int first_row = blockIdx.x % TILES * OWN_ROWS;
    if (count == 0) return;
    if (tid < MULTIPLYING) {
        take_registers<232>();
        const int* pairs = sorted + first;
        bf16* to = GATED ? out + (long long)first * OUT : out;
        if (count <= 32)
            multiply_all<2>(shared, come, read, tid, count, to, pairs, first_row);
        else if (count <= 64)
            multiply_all<4>(shared, come, read, tid, count, to, pairs, first_row);
        else if (count <= 96)
            multiply_all<6>(shared, come, read, tid, count, to, pairs, first_row);
        else
            multiply_all<8>(shared, come, read, tid, count, to, pairs, first_row);
        return;
    }
    give_registers_back<40>();
    // Eight threads copy 128 bytes of a token, four a row's words of a step, one its scales. What is no token repeats the
    // last one.
    const int i = tid - MULTIPLYING, part = i % 8, token = i / 8;
    u32 at[8];  // of the tokens, in 16 bytes
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const int m = first + min(token + 16 * j, count - 1);
        at[j] = (u32)((GATED ? load_int(sorted + m) / share : m) * (x_stride / 8)) + part;
    }
    const long long row = (long long)expert * EXPERT_ROWS + first_row;
    auto of_half = [](int half) { return half ? (GATED ? OUT : 64) : 0; };
    const u8* words = all_words + (row + i / 4) * ROW_BYTES + i % 4 * 16;
    const u8* scales = all_scales + (row + i % 64 + of_half(i / 64)) * SCALE_ROW_BYTES;
    const u32 ring = shared_address(shared), x_to = ring + token * 128 + (part ^ token % 8) * 16;
    int place = 0, phase = 1;
#pragma unroll 1
    for (int step = 0; step < STEPS; step++) {
        if (step >= STAGES) wait_at_barrier(read + 8 * place, phase);
        const u32 stage = place * STAGE_BYTES;
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (16 * j < count) {
                const bf16* from = x + 8ll * at[j] + step * STEP;
                copy16(x_to + stage + j * 16 * 128, from);
                copy16(x_to + stage + j * 16 * 128 + X_HALF, from + 64);
            }
#pragma unroll
        for (int j = 0; j < 8; j++)
            copy16(ring + stage + WORDS + 16 * i + j * 32 * 64,
                   words + (j / 4 * (GATED ? 64 : 128) + j % 2 * 32 + of_half(j / 2 % 2)) * (long long)ROW_BYTES + step * 64);
#pragma unroll
        for (int j = 0; j < 2; j++)
            copy8(ring + stage + SCALES + 8 * i + j * 128 * 8,
                  scales + j * (GATED ? 64 : 128) * (long long)SCALE_ROW_BYTES + step * 8);
        arrive_after_copies(come + 8 * place);
        if (++place == STAGES) place = 0, phase ^= 1;
    }
}
