// Pairs (token, expert) sorted by expert, in the order in which they come, and cut into blocks of rows, in one launch.
//
// One cluster of BLOCKS blocks of WARPS warps; a warp has as many neighbouring pairs as any other. It counts those of
// each expert, 32 at a time; the counts of all warps and blocks say where its first of each expert goes, and going
// through its pairs once more, it puts them there.
//
// Macros: E, experts; BLOCKS; WARPS.

#include "hopper.cuh"
#include "matrix_unit.cuh"

constexpr int THREADS = 32 * WARPS;

// x of this thread and all before it in the block, and of the whole block; `sums` has room for a number per warp.
__device__ __forceinline__ int sum_up(int x, int* sums, int& all) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const int y = __shfl_up_sync(~0u, x, d);
        if (lane >= d) x += y;
    }
    __syncthreads();
    if (lane == 31) sums[warp] = x;
    __syncthreads();
    all = 0;
    for (int w = 0; w < WARPS; w++) {
        if (w == warp) x += all;
        all += sums[w];
    }
    return x;
}

// Counts a warp's pairs in next; with PUT each goes to its place, which is the count before it.
template <bool PUT>
__device__ __forceinline__ void count_pairs(const u16* experts, int mine, int* next, int first, int* sorted) {
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < mine; i += 32) {
        const int e = experts[i + lane];
        const u32 same = __match_any_sync(~0u, e), before = same & (1u << lane) - 1;
        if (PUT && e < E) sorted[next[e] + __popc(before)] = first + i + lane;
        __syncwarp();
        if (e < E && before == 0) next[e] += __popc(same);
        __syncwarp();
    }
}

extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS, 1) sort_pairs(
    const long long* ids,
    int* sorted,   // [pairs]
    int* blocks,   // [count, 3] (expert, first of sorted, how many), as many as could be needed; the rest have 0. Behind them
                   // two counters for who goes through them, how many there are, and a count of zero for each
    int pairs,
    int count,
    int rows,      // of a block at most
    int unit,      // which divides rows, and all blocks of an expert but its last
    int of_warp) {  // pairs, a multiple of 32
    extern __shared__ __align__(16) u8 shared[];
    int* places = (int*)shared;         // [WARPS, E] pairs of a warp; then where its next one goes
    int* of_block = places + WARPS * E;  // [E] pairs of this block
    int* sums = of_block + E;            // [WARPS]
    u16* experts = (u16*)(sums + WARPS);  // [WARPS, of_warp]
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, block = BLOCKS > 1 ? blockIdx.x : 0;
    const int first = (block * WARPS + warp) * of_warp, mine = min(of_warp, pairs - first);
    int* next = places + warp * E;
    experts += warp * of_warp;
    for (int e = lane; e < E; e += 32) next[e] = 0;
    wait_for_kernel_ahead();
    start_kernel_behind();
#pragma unroll 4
    for (int i = lane; i < of_warp; i += 32) experts[i] = i < mine ? load_id(ids + first + i) : E;
    __syncwarp();
    count_pairs<false>(experts, mine, next, first, sorted);
    __syncthreads();
    for (int e = tid; e < E; e += THREADS) {
        int sum = 0;
#pragma unroll 8
        for (int w = 0; w < WARPS; w++) {
            const int n = places[w * E + e];
            places[w * E + e] = sum;
            sum += n;
        }
        of_block[e] = sum;
    }
    if (BLOCKS > 1)
        wait_for_cluster();
    else
        __syncthreads();
    int pairs_before = 0, blocks_before = 0;
    for (int from = 0; from < E; from += THREADS) {
        const int e = from + tid;
        int total = 0, ahead = 0;
        if (e < E)
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
                const int n = load_of_block(b, of_block + e);
                if (b < block) ahead += n;
                total += n;
            }
        const int own = (total + rows - 1) / rows;
        int all_pairs, all_blocks;
        const int start = pairs_before + sum_up(total, sums, all_pairs) - total;
        const int at = blocks_before + sum_up(own, sums, all_blocks) - own;
        pairs_before += all_pairs;
        blocks_before += all_blocks;
        if (e < E) {
#pragma unroll 8
            for (int w = 0; w < WARPS; w++) places[w * E + e] += start + ahead;
            if (e % BLOCKS == block) {
                const int most = own ? ((total + unit - 1) / unit + own - 1) / own * unit : 0;
                for (int j = 0; j < own; j++) {
                    int* to = blocks + 3 * (at + j);
                    to[0] = e;
                    to[1] = start + j * most;
                    to[2] = max(min(total - j * most, most), 0);
                }
            }
        }
    }
    for (int i = blocks_before + block * THREADS + tid; i < count; i += BLOCKS * THREADS)
        for (int j = 0; j < 3; j++) blocks[3 * i + j] = 0;
    for (int i = block * THREADS + tid; i < count; i += BLOCKS * THREADS) blocks[3 * count + 3 + i] = 0;
    if (block == 0 && tid < 3) blocks[3 * count + tid] = tid < 2 ? 0 : blocks_before;
    __syncthreads();
    count_pairs<true>(experts, mine, next, first, sorted);
    if (BLOCKS > 1) wait_for_cluster();  // before it ends, others may still read its counts
}
