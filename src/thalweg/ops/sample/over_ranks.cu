// One id for each row of logits of which ranks have parts: the best of a rank's blocks goes to every other rank's memory,
// and all choose from what all have (ranks.cuh says how they meet). A block of one warp takes a row. Of equal values the
// lowest id counts.
//
// Macros: RANKS; RANK.

#include "hopper.cuh"
#include "ranks.cuh"

constexpr int PLACE = 4096;  // bytes that a block writes for a rank at most: ops/all_reduce

// `values` and `ids` [rows, blocks]: the best of each block of a row, in the order of ids.
extern "C" __global__ void __launch_bounds__(32)
    choose_over_ranks(const float* values, const int* ids, long long* out, int blocks, const u64* table, long long bytes) {
    const int lane = threadIdx.x, row = blockIdx.x;
    Ranks ranks = ranks_of(table, row, bytes);
    start_kernel_behind();
    wait_for_kernel_ahead();
    begin_exchange(ranks);
    float best = LOWEST;
    int at = blocks - 1;
    for (int i = lane; i < blocks; i += 32) {
        const float value = load_fp32(values + (long long)row * blocks + i);
        if (value > best || i == lane) best = value, at = i;
    }
#pragma unroll
    for (int by = 16; by; by /= 2) {
        const float other = __shfl_xor_sync(~0u, best, by);
        const int other_at = __shfl_xor_sync(~0u, at, by);
        if (other > best || (other == best && other_at < at)) best = other, at = other_at;
    }
    if (lane == 0) {
        int id = (int)load_anew((const u32*)ids + (long long)row * blocks + at);
        const long long place = (long long)row * PLACE;
#pragma unroll
        for (int r = 0; r < RANKS; r++)
            if (r != RANK) tell_rank(place_of(ranks, r, RANK) + place, __float_as_uint(best), (u32)id, ranks.number);
        float highest = LOWEST;
        int chosen = -1;
#pragma unroll
        for (int r = 0; r < RANKS; r++) {
            u32 value = __float_as_uint(best), of = (u32)id;
            if (r != RANK)
                poll(ranks, [&] { return told(place_of(ranks, RANK, r) + place, value, of, ranks.number); });
            if (r == 0 || __uint_as_float(value) > highest) highest = __uint_as_float(value), chosen = (int)of;
        }
        out[row] = chosen;
        end_exchange(ranks);
    }
}
