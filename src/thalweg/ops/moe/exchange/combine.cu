// y = residual + what all ranks' experts gave for this rank's tokens, in the order of the ranks: every rank writes what
// its experts gave for a token to the memory of the token's rank (ranks.cuh says how they meet). A block takes 8 * BLOCK
// columns of the token of one number of every rank, so that each rank writes to each in every exchange.
//
// With WEIGHTED a token's part is the sum of PARTS rows times their weights; rows whose weight is 0 are left out. With
// SKIPS they are not read, for which the others wait until the weights are there.
//
// Macros: D columns, a multiple of 8; PARTS; WEIGHTED; WIDE, parts in fp32 instead of bf16; SKIPS; RANKS; RANK; BLOCK
// threads.

#include "hopper.cuh"
#include "ranks.cuh"

constexpr int COLUMNS = 8 * BLOCK, CHUNKS = (D + COLUMNS - 1) / COLUMNS;
constexpr int PLACE = 4096;  // bytes that a block writes for a rank at most: ops/all_reduce

__device__ __forceinline__ void add(float (&sum)[8], uint4 v) {
    sum[0] += low(v.x), sum[1] += high(v.x), sum[2] += low(v.y), sum[3] += high(v.y);
    sum[4] += low(v.z), sum[5] += high(v.z), sum[6] += low(v.w), sum[7] += high(v.w);
}
__device__ __forceinline__ uint4 narrow(const float (&x)[8]) {
    return make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
}

// What this rank gives for a token, numbered over all ranks.
__device__ __forceinline__ uint4 part_of(const u8* parts, const float (&weight)[PARTS], long long token, int column) {
    if (!WEIGHTED) return load16(parts + (token * D + column) * 2);
    uint4 raw[PARTS][1 + WIDE] = {};
    float sum[8] = {};
#pragma unroll
    for (int j = 0; j < PARTS; j++) {
        const u8* at = parts + ((token * PARTS + j) * D + column) * (2 + 2 * WIDE);
#pragma unroll
        for (int h = 0; h <= WIDE; h++)
            if (!SKIPS || weight[j] != 0.0f) raw[j][h] = load16(at + 16 * h);
    }
#pragma unroll
    for (int j = 0; j < PARTS; j++) {
        float part[8] = {};
        if (WIDE) {
            const uint4 a = raw[j][0], b = raw[j][WIDE];
            const u32 words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
            for (int i = 0; i < 8; i++) part[i] = __uint_as_float(words[i]);
        } else {
            add(part, raw[j][0]);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) sum[i] += weight[j] == 0.0f ? 0.0f : weight[j] * part[i];
    }
    return narrow(sum);
}

// parts [RANKS * tokens * PARTS, D]
extern "C" __global__ void __launch_bounds__(BLOCK)
    combine(const u8* parts, const float* weights, const bf16* residual, bf16* y, int tokens, long long residual_stride,
            const u64* table, long long bytes) {
    const int tid = threadIdx.x, token = blockIdx.x / CHUNKS, column = blockIdx.x % CHUNKS * COLUMNS + 8 * tid;
    Ranks ranks = ranks_of(table, blockIdx.x, bytes);
    start_kernel_behind();
    wait_for_kernel_ahead();
    begin_exchange(ranks);
    if (column < D) {
        const uint4 before = load16(residual + token * residual_stride + column);
        float weight[RANKS][PARTS];
#pragma unroll
        for (int r = 0; r < RANKS; r++)
#pragma unroll
            for (int j = 0; j < PARTS; j++)
                weight[r][j] = WEIGHTED ? load_fp32(weights + ((long long)r * tokens + token) * PARTS + j) : 1.0f;
        const long long place = (long long)blockIdx.x * PLACE + 16 * tid;
#pragma unroll
        for (int i = 1; i < RANKS; i++) {
            const int r = (RANK + i) % RANKS;
            const uint4 part = part_of(parts, weight[r], (long long)r * tokens + token, column);
            u8* to = place_of(ranks, r, RANK) + place;
            tell_rank(to, part.x, part.y, ranks.number);
            tell_rank(to + 16 * BLOCK, part.z, part.w, ranks.number);
        }
        const uint4 mine = part_of(parts, weight[RANK], (long long)RANK * tokens + token, column);
        float sum[8] = {};
#pragma unroll
        for (int r = 0; r < RANKS; r++) {
            uint4 part = mine;
            if (r != RANK) {
                const u8* at = place_of(ranks, RANK, r) + place;
                poll(ranks, [&] {
                    const bool first = told(at, part.x, part.y, ranks.number);
                    return told(at + 16 * BLOCK, part.z, part.w, ranks.number) && first;
                });
            }
            add(sum, part);
        }
        add(sum, before);
        *(uint4*)(y + (long long)token * D + column) = narrow(sum);
    }
    __syncthreads();
    if (tid == 0) end_exchange(ranks);
}
