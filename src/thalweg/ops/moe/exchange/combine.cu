// y = residual, and a further row with OWN, + what all ranks' experts gave for this rank's tokens, in the order of the
// ranks: every rank writes what its experts gave for a token to the memory of the token's rank (ranks.cuh says how they
// meet). A block takes 8 * BLOCK columns of the token of one number of every rank, so that each rank writes to each in
// every exchange. It has BLOCK threads WAYS times, each with every WAYS-th rank: what they give and take is under way at
// the same time.
//
// Macros: D columns, a multiple of 8; PARTS; WEIGHTED; WIDE, parts in fp32 instead of bf16; OWN; RANKS; RANK; BLOCK
// threads; WAYS.

#include "hopper.cuh"
#include "ranks.cuh"
#include "parts.cuh"

constexpr int COLUMNS = 8 * BLOCK, CHUNKS = (D + COLUMNS - 1) / COLUMNS;
constexpr int PLACE = 4096;  // bytes that a block writes for a rank at most: ops/all_reduce

// parts [RANKS * rows * PARTS, D] of as many rows of each rank, of which this launch has those from `first` on; residual,
// own, fp32, and y [tokens, D] of the first of this rank's.
extern "C" __global__ void __launch_bounds__(BLOCK* WAYS)
    combine(const u8* parts, const float* weights, const bf16* residual, const u8* own, bf16* y, int first,
            int tokens, int rows, long long residual_stride, const u64* table, long long bytes) {
    const int tid = threadIdx.x % BLOCK, way = threadIdx.x / BLOCK, token = first + blockIdx.x / CHUNKS;
    const int column = blockIdx.x % CHUNKS * COLUMNS + 8 * tid;
    Ranks ranks = ranks_of(table, blockIdx.x, bytes);
    __shared__ uint4 given[RANKS][WAYS > 1 ? BLOCK : 1];  // of several ways
    start_kernel_behind();
    wait_for_kernel_ahead();
    begin_exchange(ranks);
    float sum[8] = {};
    if (column < D) {
        const long long place = (long long)blockIdx.x * PLACE + 16 * tid;
        uint4 mine;
        // The own part last: others wait for theirs.
        for (int i = way; i < RANKS; i += WAYS) {
            const int r = (RANK + 1 + i) % RANKS;
            mine = part_of(parts, weights, (long long)r * rows + token, column);
            if (r == RANK) break;
            u8* to = place_of(ranks, (u8*)table[r], RANK) + place;
            tell_rank(to, mine.x, mine.y, ranks.number);
            tell_rank(to + 16 * BLOCK, mine.z, mine.w, ranks.number);
        }
        for (int i = way; i < RANKS; i += WAYS) {
            const int r = WAYS > 1 ? (RANK + 1 + i) % RANKS : i;
            uint4 part = mine;
            if (r != RANK) {
                const u8* from = place_of(ranks, RANK, r) + place;
                poll(ranks, [&] {
                    const bool first = told(from, part.x, part.y, ranks.number);
                    return told(from + 16 * BLOCK, part.z, part.w, ranks.number) && first;
                });
            }
            if (WAYS > 1) given[r][tid] = part;
            else add(sum, part);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) end_exchange(ranks);
    if (way > 0 || column >= D || token >= tokens) return;
    const uint4 before = load16(residual + token * residual_stride + column);
#pragma unroll
    for (int r = 0; WAYS > 1 && r < RANKS; r++) add(sum, given[r][tid]);
    add(sum, before);
    if (OWN) {
        float more[8];
        const u8* at = own + ((long long)token * D + column) * 4;
        take_fp32(more, load16(at), load16(at + 16));
#pragma unroll
        for (int i = 0; i < 8; i++) sum[i] += more[i];
    }
    *(uint4*)(y + (long long)token * D + column) = narrow(sum);
}
