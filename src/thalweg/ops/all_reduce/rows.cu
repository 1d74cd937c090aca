// y = residual + the sum over ranks of x, in the order of the ranks, so that all have the same bits: by writing x to
// every rank's memory and reading what the others wrote to this one's (ranks.cuh says how they meet).
//
// With WEIGHTED x is the sum of PARTS rows times their weights, the experts' outputs of a token; with OWN an expert of
// its own width is added to `scale` times that, or times x, rounded as in op "scaled_residual_add". A block takes
// 8 * BLOCK columns of a token.
//
// Macros: D columns, a multiple of 8; PARTS; WEIGHTED; WIDE, parts in fp32 instead of bf16; OWN, 2 if it is in fp32;
// RANKS; RANK; BLOCK threads.

#include "hopper.cuh"
#include "ranks.cuh"

constexpr int COLUMNS = 8 * BLOCK, CHUNKS = (D + COLUMNS - 1) / COLUMNS;
constexpr int PLACE = 4096;  // bytes that a block writes for a rank at most: ops/all_reduce

struct Eight {
    float x[8];
};
__device__ __forceinline__ Eight widen(uint4 v) {
    return {low(v.x), high(v.x), low(v.y), high(v.y), low(v.z), high(v.z), low(v.w), high(v.w)};
}
__device__ __forceinline__ Eight floats(uint4 a, uint4 b) {
    return {__uint_as_float(a.x), __uint_as_float(a.y), __uint_as_float(a.z), __uint_as_float(a.w),
            __uint_as_float(b.x), __uint_as_float(b.y), __uint_as_float(b.z), __uint_as_float(b.w)};
}
__device__ __forceinline__ uint4 narrow(const Eight& v) {
    return make_uint4(pack(v.x[0], v.x[1]), pack(v.x[2], v.x[3]), pack(v.x[4], v.x[5]), pack(v.x[6], v.x[7]));
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    sum_over_ranks(const u8* parts, const float* weights, const u8* own, const bf16* residual, bf16* y,
                   long long parts_stride, long long residual_stride, float scale, const u64* table, long long bytes) {
    const int tid = threadIdx.x, token = blockIdx.x / CHUNKS, column = blockIdx.x % CHUNKS * COLUMNS + 8 * tid;
    const bool inside = column < D;
    Ranks ranks = ranks_of(table, blockIdx.x, bytes);
    start_kernel_behind();
    wait_for_kernel_ahead();
    begin_exchange(ranks);
    if (inside) {
        const uint4 added = load16(residual + token * residual_stride + column);
        const long long at_own = (long long)token * D + column;
        uint4 of_own[2], mine;
#pragma unroll
        for (int h = 0; h < OWN; h++) of_own[h] = load16(own + at_own * 2 * OWN + 16 * h);
        if (WEIGHTED) {
            uint4 raw[PARTS][1 + WIDE];
            float weight[PARTS];
#pragma unroll
            for (int j = 0; j < PARTS; j++) {
                const u8* at = parts + ((long long)(token * PARTS + j) * D + column) * (2 + 2 * WIDE);
#pragma unroll
                for (int h = 0; h <= WIDE; h++) raw[j][h] = load16(at + 16 * h);
                weight[j] = load_fp32(weights + token * PARTS + j);
            }
            Eight sum = {};
#pragma unroll
            for (int j = 0; j < PARTS; j++) {
                const Eight part = WIDE ? floats(raw[j][0], raw[j][WIDE]) : widen(raw[j][0]);
#pragma unroll
                for (int i = 0; i < 8; i++) sum.x[i] += weight[j] * part.x[i];
            }
            mine = narrow(sum);
        } else {
            mine = load16(parts + (token * parts_stride + column) * 2);
        }
        if (OWN) {
            Eight sum = widen(mine);
            const Eight by_own = OWN == 2 ? floats(of_own[0], of_own[1]) : widen(of_own[0]);
#pragma unroll
            for (int i = 0; i < 8; i++) sum.x[i] = fmaf(sum.x[i], scale, as_bf16(by_own.x[i]));
            mine = narrow(sum);
        }
        const long long place = (long long)blockIdx.x * PLACE + 16 * tid;
#pragma unroll
        for (int r = 0; r < RANKS; r++)
            if (r != RANK) {
                u8* to = place_of(ranks, r, RANK) + place;
                tell_rank(to, mine.x, mine.y, ranks.number);
                tell_rank(to + 16 * BLOCK, mine.z, mine.w, ranks.number);
            }
        Eight sum = {};
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
            const Eight part = widen(theirs);
#pragma unroll
            for (int i = 0; i < 8; i++) sum.x[i] += part.x[i];
        }
        const Eight to = widen(added);
#pragma unroll
        for (int i = 0; i < 8; i++) sum.x[i] += to.x[i];
        *(uint4*)(y + at_own) = narrow(sum);
    }
    __syncthreads();
    if (tid == 0) end_exchange(ranks);
}
