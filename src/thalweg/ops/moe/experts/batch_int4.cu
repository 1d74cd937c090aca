// One of the experts' two matrix products over weights in int4, for batches in which an expert has up to some ten tokens,
// on Hopper: gate and up with SiLU (GATED), or down.
//
// A tile is 256 rows of an expert, 128 of gate and the same of up, or 256 of down, for up to TOKENS of its tokens. Blocks
// fill the multiprocessors once and take tiles by turns. Four warps copy tokens, words and scales, 256 columns at a time,
// into a ring of STAGES, which goes on from tile to tile. What a warp does for its weights is a chain, which others hide:
// four warpgroups multiply, each of whose warps has 16 of the rows ("lower" and "upper": gate and up, or 8 and 8 of down),
// widened in registers, as the left operand of the matrix unit, 64 columns at a time: while it takes these, the next are
// widened.
//
// A lane has the 32 columns of a group, four words, of a row. So of every 128 columns x and h have them in the order in
// which that gives pairs to the matrix unit, as in matrix_int4.cu. Which rows a warp has is free: it has those whose
// places in that order are neighbours, and whose words lie in different banks.
//
// Macros: GATED; COLS, the columns, a multiple of 256; OUT, the rows of gate, up (multiples of 128) or down (of 256);
// TOKENS, 32 or 64; FEW: a tile of up to so many is multiplied as one of so many; it is TOKENS where these are 64, since
// registers suffice for two sizes of up to 32; STAGES.

#include "hopper.cuh"
#include "matrix_unit.cuh"

constexpr int STEP = 256, STEPS = COLS / STEP, TILE = GATED ? 128 : 256, TILES = OUT / TILE;
constexpr int EXPERT_ROWS = GATED ? 2 * OUT : OUT, UPPER = GATED ? OUT : 128;  // from a lower row to its upper one
constexpr int SLAB = TOKENS * 128, WORDS = 4 * SLAB, SCALES = WORDS + 256 * 128, STAGE_BYTES = SCALES + 256 * 16;
constexpr int COPYING = 128, MULTIPLYING = 512, THREADS = COPYING + MULTIPLYING;
static_assert(STAGE_BYTES % 1024 == 0, "stages are aligned");

// The lower row, of 128, of a warp's eighth `quad`.
__device__ __forceinline__ int row_of(int warp, int quad) {
    return GATED ? 32 * (quad / 2) + 4 * (quad % 2) + 8 * (warp / 4) + warp % 4 : 8 * warp + quad / 2 + 4 * (quad % 2);
}

struct Tile {
    int expert, first, count, row;
    __device__ __forceinline__ Tile(const int* blocks, int tile, int tiles) {
        const int* block = blocks + 3 * (min(tile, tiles - 1) / TILES);
        expert = load_int(block), first = load_int(block + 1), count = load_int(block + 2);
        row = tile % TILES * TILE;
    }
};

// What those who multiply are told of a tile. Copies are up to STAGES of them ahead of the one that goes out.
struct Notice {
    int count, row;
    int to[TOKENS];  // rows of `out`
};

__device__ __forceinline__ u32 both_low(u32 pair) { return __byte_perm(pair, 0, 0x1010); }
__device__ __forceinline__ u32 both_high(u32 pair) { return __byte_perm(pair, 0, 0x3232); }

// Two words of the lower row and two of the upper one, 16 columns in each operand.
__device__ __forceinline__ void widen(u32 (&a)[4][4], const u32* l, const u32* u, const NibbleScales& scales) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32 l8 = l[i / 2] >> i % 2 * 8, u8s = u[i / 2] >> i % 2 * 8;
        a[i][0] = widen_in_place(l8, 0x000f000f, both_low(scales.first), both_low(scales.less));
        a[i][1] = widen_in_place(u8s, 0x000f000f, both_high(scales.first), both_high(scales.less));
        a[i][2] = widen_in_place(l8, 0x00f000f0, both_low(scales.second), both_low(scales.less));
        a[i][3] = widen_in_place(u8s, 0x00f000f0, both_high(scales.second), both_high(scales.less));
    }
}

struct Ring {
    u32 come, read;  // barriers by stage
    int place = 0;
    u32 phase = 0;
    __device__ __forceinline__ void next() {
        if (++place == STAGES) place = 0, phase ^= 1;
    }
};

// A tile for up to 8 N tokens.
template <int N> __device__ __forceinline__ void multiply_tile(Ring& ring, const u8* stages, const Notice& notice, bf16* out) {
    const int tid = threadIdx.x, lane = tid % 32, quad = lane / 4, pair = lane % 4, warp = tid / 32;
    const int row = row_of(warp, quad);
    float sums[4 * N] = {};
    u32 a[4][4], b[4][4];
#pragma unroll
    for (int i = 0; i < 16; i++) b[i / 4][i % 4] = 0;
    int last = -1;
#pragma unroll 1
    for (int step = 0; step < STEPS; step++) {
        const u8* stage = stages + ring.place * STAGE_BYTES;
        const u8* words = stage + WORDS + row * 128;
        const u8* scales = stage + SCALES + (8 * warp + quad) * 16 + pair * 2;
        const u32 x_at = shared_address(stage);
        wait_at_barrier(ring.come + 8 * ring.place, ring.phase);
        share_writes();
#pragma unroll 1
        for (int half = 0; half < 2; half++) {
            const u8* at = words + ((4 * half + pair) ^ row % 8) * 16;
            const uint4 l4 = *(const uint4*)at, u4 = *(const uint4*)(at + 128 * 128);
            const u32 l[4] = {l4.x, l4.y, l4.z, l4.w}, u[4] = {u4.x, u4.y, u4.z, u4.w};
            const u32 l_scale = *(const u16*)(scales + 8 * half), u_scale = *(const u16*)(scales + 128 * 16 + 8 * half);
            const NibbleScales of_group = nibble_scales(u_scale << 16 | l_scale);
            const Operand x = describe(x_at + 2 * half * SLAB, 16);
            auto multiply = [&](u32(&a)[4][4], u32(&before)[4][4], int i) {
                widen(a, l + 2 * i, u + 2 * i, of_group);
                settle(sums), keep(a);
                begin_products();
#pragma unroll
                for (int t = 0; t < 4; t++) multiply_left<N>(sums, a[t], further(x, i * SLAB + t * 32));
                commit_products();
                wait_for_products<1>();
                keep(before);
            };
            multiply(a, b, 0);
            if (half == 0 && last >= 0 && lane == 0) arrive_at_barrier(ring.read + 8 * last);
            multiply(b, a, 1);
        }
        last = ring.place;
        ring.next();
    }
    wait_for_products<0>();
    settle(sums), keep(b);
    if (lane == 0) arrive_at_barrier(ring.read + 8 * last);
    const int count = notice.count;
    out += notice.row + (GATED ? 8 * warp + quad : row);
#pragma unroll
    for (int e = 0; e < 2 * N; e++) {
        const int token = e / 2 * 8 + 2 * pair + e % 2;
        const float l = sums[e / 2 * 4 + e % 2] * WIDENED, u = sums[e / 2 * 4 + e % 2 + 2] * WIDENED;
        if (token >= count) continue;
        bf16* to = out + (long long)notice.to[token] * OUT;
#if GATED
        store_bf16(to, l / (1.0f + __expf(-l)) * u);
#else
        store_bf16(to, l);
        store_bf16(to + UPPER, u);
#endif
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    product(const __grid_constant__ TensorMap words, const bf16* x, const int* sorted, const int* blocks, const u8* all_scales,
            bf16* out, long long x_stride, int share, int most) {
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ u64 come_s[STAGES], read_s[STAGES];
    __shared__ Notice notices[STAGES + 1];
    Ring ring = {shared_address(come_s), shared_address(read_s)};
    const int tid = threadIdx.x, grid = gridDim.x;
    if (tid == 0) {
#pragma unroll
        for (int i = 0; i < STAGES; i++)
            init_barrier(ring.come + 8 * i, COPYING + COPYING / 32), init_barrier(ring.read + 8 * i, MULTIPLYING / 32);
        share_barriers();
    }
    wait_for_kernel_ahead();
    start_kernel_behind();
    __syncthreads();
    const int tiles = load_int(blocks + 3 * most + 2) * TILES;
    int slot = 0;
    if (tid < MULTIPLYING) {
        take_registers<104>();
#pragma unroll 1
        for (int i = blockIdx.x; i < tiles; i += grid, slot = (slot + 1) % (STAGES + 1)) {
            wait_at_barrier(ring.come + 8 * ring.place, ring.phase);  // the notice comes with the first stage
            const Notice& notice = notices[slot];
            if (FEW < TOKENS && notice.count <= FEW)
                multiply_tile<FEW / 8>(ring, shared, notice, out);
            else
                multiply_tile<TOKENS / 8>(ring, shared, notice, out);
        }
        return;
    }
    give_registers_back<56>();
    // A warp copies 512 bytes of a token; its lane i knows of the i-th of its tokens where it is and where it goes.
    const int thread = tid - MULTIPLYING, lane = tid % 32, warp = thread / 32;
    int from = 0, to = 0;
    auto find_token = [&](const Tile& tile) {
        const int m = tile.first + min(warp + 4 * lane, tile.count - 1), p = load_int(sorted + m);
        from = (GATED ? p / share : m), to = GATED ? m : p;
    };
    const int scale_row = row_of(thread / 8, thread % 8);
    if (blockIdx.x >= tiles) return;
    Tile next(blocks, blockIdx.x, tiles);  // asked for a tile ahead
    find_token(next);
    int asked = 0;
#pragma unroll 1
    for (int i = blockIdx.x; i < tiles; i += grid) {
        const Tile tile = next;
        const u32 at = from * (u32)(x_stride / 8);  // in 16 bytes
        const int row = tile.expert * EXPERT_ROWS + tile.row;
        const u8* scales = all_scales + (long long)(row + scale_row) * (COLS / 16);
#pragma unroll 1
        for (int step = 0; step < STEPS; step++) {
            if (asked >= STAGES) wait_at_barrier(ring.read + 8 * ring.place, ring.phase ^ 1);
            const u32 stage = shared_address(shared) + ring.place * STAGE_BYTES, come = ring.come + 8 * ring.place;
            if (step == 0) {
                Notice& notice = notices[slot];
                if (lane < TOKENS / 4) notice.to[warp + 4 * lane] = to;
                if (thread == 0) notice.count = tile.count, notice.row = tile.row;
                slot = (slot + 1) % (STAGES + 1);
                __syncwarp();
            }
            if (thread == 0) {
                expect_bytes(come, 256 * 128);
                copy_tile(stage + WORDS, &words, step * 64, 0, row, come);
                copy_tile(stage + WORDS + 128 * 128, &words, step * 64, 0, row + UPPER, come);
            } else if (lane == 0) {
                arrive_at_barrier(come);
            }
            copy16(stage + SCALES + thread * 16, scales + step * 16);
            copy16(stage + SCALES + (128 + thread) * 16, scales + UPPER * (COLS / 16) + step * 16);
#pragma unroll 4
            for (int j = 0; j < (tile.count - warp + 3) / 4; j++) {
                const int token = warp + 4 * j;
                copy16(stage + lane / 8 * SLAB + token * 128 + (lane % 8 ^ token % 8) * 16,
                       x + 8ll * __shfl_sync(~0u, at, j) + step * STEP + lane * 8);
            }
            arrive_after_copies(come);
            asked++;
            ring.next();
            if (step == 0) {
                next = Tile(blocks, i + grid, tiles);
                find_token(next);
            }
        }
    }
}
