// Rows of a vocabulary that ranks divide, for few tokens: the rank that has a token's row writes it to every other
// rank's memory, where that one reads it (ranks.cuh says how they meet). The others write zeros, since whoever writes
// has to know that what it wrote before was read. A block takes 8 * BLOCK columns of a token.
//
// Macros: D columns, a multiple of 8; RANKS; RANK; BLOCK threads.

#include "hopper.cuh"
#include "ranks.cuh"

constexpr int COLUMNS = 8 * BLOCK, CHUNKS = (D + COLUMNS - 1) / COLUMNS;
constexpr int PLACE = 4096;  // bytes that a block writes for a rank at most: ops/all_reduce

extern "C" __global__ void __launch_bounds__(BLOCK)
    embed(const long long* ids, const bf16* w, bf16* y, long long rows, const u64* table, long long bytes) {
    const int tid = threadIdx.x, token = blockIdx.x / CHUNKS, column = blockIdx.x % CHUNKS * COLUMNS + 8 * tid;
    Ranks ranks = ranks_of(table, blockIdx.x, bytes);
    start_kernel_behind();
    wait_for_kernel_ahead();
    begin_exchange(ranks);
    const int id = load_id(ids + token), owner = (int)(id / rows);
    if (column < D) {
        const long long place = (long long)blockIdx.x * PLACE + 16 * tid;
        uint4 mine = make_uint4(0, 0, 0, 0), v = mine;
        if (owner == RANK) mine = load16(w + (id - RANK * rows) * D + column);
#pragma unroll
        for (int r = 0; r < RANKS; r++)
            if (r != RANK) {
                u8* to = place_of(ranks, r, RANK) + place;
                tell_rank(to, mine.x, mine.y, ranks.number);
                tell_rank(to + 16 * BLOCK, mine.z, mine.w, ranks.number);
            }
#pragma unroll
        for (int r = 0; r < RANKS; r++) {
            uint4 theirs = mine;
            if (r != RANK) {
                const u8* at = place_of(ranks, RANK, r) + place;
                poll(ranks, [&] {
                    const bool first = told(at, theirs.x, theirs.y, ranks.number);
                    return told(at + 16 * BLOCK, theirs.z, theirs.w, ranks.number) && first;
                });
            }
            if (r == owner) v = theirs;
        }
        *(uint4*)(y + (long long)token * D + column) = v;
    }
    __syncthreads();
    if (tid == 0) end_exchange(ranks);
}
