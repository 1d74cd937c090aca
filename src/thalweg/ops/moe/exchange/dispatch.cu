// Tokens of all ranks, and which experts of this one they take: every rank writes its tokens, with the slots and weights
// of their experts, to every other rank's memory and reads the others' from its own (ranks.cuh says how they meet). A
// thread takes 4 columns of a token, or one of its experts. Rows past a rank's tokens are zeros that take no expert.
//
// Macros: D, a multiple of 4; K experts of a token that ranks divide; SHARED more, of its own rank; HERE experts on each
// rank; RANKS; RANK; BLOCK threads.

#include "hopper.cuh"
#include "ranks.cuh"

constexpr int PLACE = 4096;  // bytes that a block writes for a rank at most: ops/all_reduce
constexpr int WIDTH = D / 4, EACH = K + SHARED, BLOCKS = (WIDTH + EACH + BLOCK - 1) / BLOCK;

// x and all_x in units of 8 bytes, the stride in elements; [tokens, EACH] weights and slots; live [rows], which each rank
// has, of which this launch has those from `first` on.
extern "C" __global__ void __launch_bounds__(BLOCK, 2048 / BLOCK)
    dispatch(const uint2* x, const float* weights, const long long* slots, const long long* live, uint2* all_x,
             float* all_weights, long long* all_ids, int first, int tokens, int rows, long long x_stride,
             const u64* table, long long bytes) {
    const int tid = threadIdx.x, token = first + blockIdx.x / BLOCKS, at = blockIdx.x % BLOCKS * BLOCK + tid;
    const int j = at - WIDTH;
    Ranks ranks = ranks_of(table, blockIdx.x, bytes);
    start_kernel_behind();
    wait_for_kernel_ahead();
    begin_exchange(ranks);
    if (j < EACH) {
        uint2 mine = j < 0 ? make_uint2(0, 0) : make_uint2(~0u, 0);
        if (token < tokens && j < 0) {
            mine = x[token * (x_stride / 4) + at];
        } else if (token < tokens) {
            const float weight = load_fp32(weights + token * EACH + j);
            const int slot = load_id(slots + token * EACH + j);
            mine = make_uint2(load_id(live + token) ? slot : -1, __float_as_uint(weight));
        }
        const long long place = (long long)blockIdx.x * PLACE + 16 * tid;
#pragma unroll
        for (int r = 0; r < RANKS; r++)  // what is of no use to others too, or they would not know of the exchange
            if (r != RANK) tell_rank(place_of(ranks, r, RANK) + place, mine.x, mine.y, ranks.number);
#pragma unroll
        for (int r = 0; r < RANKS; r++) {
            uint2 theirs = mine;
            if (r != RANK)
                poll(ranks, [&] { return told(place_of(ranks, RANK, r) + place, theirs.x, theirs.y, ranks.number); });
            const long long row = (long long)r * rows + token;
            if (j < 0) {
                all_x[row * WIDTH + at] = theirs;
            } else {
                const int slot = (int)theirs.x, id = j < K ? slot - RANK * HERE : HERE + j - K;
                const bool is_here = slot >= 0 && (j < K ? id >= 0 && id < HERE : r == RANK);
                all_ids[row * EACH + j] = is_here ? id : -1;
                all_weights[row * EACH + j] = is_here ? __uint_as_float(theirs.y) : 0.0f;
            }
        }
    }
    __syncthreads();
    if (tid == 0) end_exchange(ranks);
}
