// As dispatch.cu, of many rows (many.cuh says how ranks meet). A thread takes 8 columns of a row, or two of its experts.
//
// Macros: D, a multiple of 8; K experts of a token that ranks divide; SHARED more, of its own rank; HERE experts on each
// rank; RANKS; RANK; BLOCK threads, PER blocks of a multiprocessor; NAP, nanoseconds between two looks.

#include "hopper.cuh"
#include "ranks.cuh"
#include "many.cuh"

constexpr int WIDTH = D / 8, EACH = K + SHARED, PIECES = WIDTH + (EACH + 1) / 2;

// x and all_x in units of 16 bytes, the stride in elements; [tokens, EACH] weights and slots; live [rows], which each rank
// has, of which this launch has `count` from `first` on.
extern "C" __global__ void __launch_bounds__(BLOCK, PER)
    dispatch_many(const u8* x, const float* weights, const long long* slots, const long long* live, uint4* all_x,
                  float* all_weights, long long* all_ids, int first, int count, int tokens, int rows, long long x_stride,
                  const u64* table, long long bytes) {
    const int tid = threadIdx.x, pieces = count * PIECES, step = gridDim.x * BLOCK;
    Ranks ranks = ranks_of(table, blockIdx.x, bytes);
    wait_for_kernel_ahead();
    start_kernel_behind();
    begin_exchange(ranks);
    auto put = [&](int r, int at, uint4 v) {
        const long long row = (long long)r * rows + first + at / PIECES;
        const int c = at % PIECES;
        if (c < WIDTH) {
            all_x[row * WIDTH + c] = v;
            return;
        }
        const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int j = 2 * (c - WIDTH) + h, slot = (int)words[2 * h] - 2, id = j < K ? slot - RANK * HERE : HERE + j - K;
            const bool is_here = slot >= 0 && (j < K ? id >= 0 && id < HERE : r == RANK);
            if (j >= EACH) continue;
            all_ids[row * EACH + j] = is_here ? id : -1;
            all_weights[row * EACH + j] = is_here ? __uint_as_float(words[2 * h + 1]) : 0.0f;
        }
    };
    auto send = [&](int at) {
        const long long token = first + at / PIECES;
        const int c = at % PIECES;
        uint4 v = make_uint4(1, 0, 1, 0);  // slots of -1
        if (c < WIDTH) {
            v = token < tokens ? load16(x + (token * x_stride + 8 * c) * 2) : make_uint4(0, 0, 0, 0);
            v = not_zero(v);
        } else {
            u32 words[4] = {1, 0, 1, 0};
            const bool alive = token < tokens && load_id(live + token);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int j = 2 * (c - WIDTH) + h;
                if (j < EACH && alive) {
                    words[2 * h] = load_id(slots + token * EACH + j) + 2;
                    words[2 * h + 1] = __float_as_uint(load_fp32(weights + token * EACH + j));
                }
            }
            constexpr u32 instead = 0x80000000u;
            v = make_uint4(words[0], not_zero(words[1], instead), words[2], not_zero(words[3], instead));
        }
#pragma unroll
        for (int i = 1; i < RANKS; i++) {
            const int r = (RANK + i) % RANKS;
            give(place_of(ranks, r, RANK) + 16ll * at, v);
        }
        put(RANK, at, v);
    };
    const int begin = blockIdx.x * BLOCK + tid;
    if (begin < pieces) send(begin);
#pragma unroll 1
    for (int at = begin; at < pieces; at += step) {
        if (at + step < pieces) send(at + step);
#pragma unroll
        for (int i = 1; i < RANKS; i++) {
            const int r = (RANK + i) % RANKS;
            put(r, at, take(ranks, place_of(ranks, RANK, r) + 16ll * at));
        }
    }
    __syncthreads();
    if (tid == 0) end_exchange(ranks);
}
