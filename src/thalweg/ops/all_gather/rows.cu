// All ranks' rows x side by side, in the order of the ranks: each writes its own to every rank's memory and reads what
// the others wrote to this one's (ranks.cuh says how they meet). A thread takes 8 bytes of a row, a block 8 * BLOCK.
//
// Macros: RANKS; RANK; BLOCK threads.

#include "hopper.cuh"
#include "ranks.cuh"

constexpr int PLACE = 4096;  // bytes that a block writes for a rank at most: ops/all_reduce

// `width`: of a row of x, in units of 8 bytes, as are the strides.
extern "C" __global__ void __launch_bounds__(BLOCK)
    gather_rows(const uint2* x, uint2* y, int width, int chunks, long long x_stride, const u64* table, long long bytes) {
    const int tid = threadIdx.x, row = blockIdx.x / chunks, at = blockIdx.x % chunks * BLOCK + tid;
    Ranks ranks = ranks_of(table, blockIdx.x, bytes);
    start_kernel_behind();
    wait_for_kernel_ahead();
    begin_exchange(ranks);
    if (at < width) {
        const uint2 mine = x[row * x_stride + at];
        const long long place = (long long)blockIdx.x * PLACE + 16 * tid;
#pragma unroll
        for (int r = 0; r < RANKS; r++)
            if (r != RANK) tell_rank(place_of(ranks, r, RANK) + place, mine.x, mine.y, ranks.number);
#pragma unroll
        for (int r = 0; r < RANKS; r++) {
            uint2 theirs = mine;
            if (r != RANK)
                poll(ranks, [&] { return told(place_of(ranks, RANK, r) + place, theirs.x, theirs.y, ranks.number); });
            y[((long long)row * RANKS + r) * width + at] = theirs;
        }
    }
    __syncthreads();
    if (tid == 0) end_exchange(ranks);
}
