// As combine.cu, of many rows (many.cuh says how ranks meet). A thread takes 8 columns of the token of one number of every
// rank.
//
// Macros: D columns, a multiple of 8; PARTS; WEIGHTED; WIDE; OWN; RANKS; RANK; BLOCK threads, PER blocks of a
// multiprocessor; NAP, nanoseconds between two looks.

#include "hopper.cuh"
#include "ranks.cuh"
#include "parts.cuh"
#include "many.cuh"

constexpr int WIDTH = D / 8;

// parts [RANKS * rows * PARTS, D] of as many rows of each rank, of which this launch has `count` from `first` on; residual,
// own, fp32, and y [tokens, D] of the first of this rank's.
extern "C" __global__ void __launch_bounds__(BLOCK, PER)
    combine_many(const u8* parts, const float* weights, const bf16* residual, const u8* own, bf16* y, int first, int count,
                 int tokens, int rows, long long residual_stride, const u64* table, long long bytes) {
    const int tid = threadIdx.x, pieces = count * WIDTH, step = gridDim.x * BLOCK;
    Ranks ranks = ranks_of(table, blockIdx.x, bytes);
    wait_for_kernel_ahead();
    start_kernel_behind();
    begin_exchange(ranks);
    auto given = [&](int r, int at) {  // what this rank gives for a row of rank r
        return part_of(parts, weights, (long long)r * rows + first + at / WIDTH, 8 * (at % WIDTH));
    };
    auto send = [&](int at) {
#pragma unroll
        for (int i = 1; i < RANKS; i++) {
            const int r = (RANK + i) % RANKS;
            give(place_of(ranks, r, RANK) + 16ll * at, not_zero(given(r, at)));
        }
    };
    const int begin = blockIdx.x * BLOCK + tid;
    if (begin < pieces) send(begin);
#pragma unroll 1
    for (int at = begin; at < pieces; at += step) {
        if (at + step < pieces) send(at + step);
        const long long token = first + at / WIDTH;
        const int column = 8 * (at % WIDTH);
        uint4 mine = {};
        if (token < tokens) mine = given(RANK, at);
        float sum[8] = {};
#pragma unroll
        for (int r = 0; r < RANKS; r++)
            add(sum, r == RANK ? mine : take(ranks, place_of(ranks, RANK, r) + 16ll * at));
        if (token >= tokens) continue;
        add(sum, load16(residual + token * residual_stride + column));
        if (OWN) {
            float more[8];
            take_fp32(more, load16(own + (token * D + column) * 4), load16(own + (token * D + column) * 4 + 16));
#pragma unroll
            for (int i = 0; i < 8; i++) sum[i] += more[i];
        }
        *(uint4*)(y + token * D + column) = narrow(sum);
    }
    __syncthreads();
    if (tid == 0) end_exchange(ranks);
}
