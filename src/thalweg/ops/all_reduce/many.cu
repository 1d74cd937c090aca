// y = residual + the sum over ranks of x for many tokens: too many bytes for twice as many to be written, as rows.cu does.
//
// A block has the same part of the elements on every rank. It writes its x to every other rank's memory, GROUP bytes at
// a time, each with a count of groups behind it, and AHEAD groups later reads what the others wrote here. So the link
// and the memory are busy at once. Exchanges have numbers and places of two kinds, as ranks.cuh says.
//
// Macros: RANKS; RANK; BLOCK threads.

#include "hopper.cuh"
#include "ranks.cuh"

constexpr int FLAGS = 128;  // bytes ahead of a place, for the count
constexpr int STEPS = 2, GROUP = BLOCK * 16 * STEPS, AHEAD = 4;

// `part`: bytes of a block, a multiple of GROUP, whose place begins with FLAGS bytes for the count; `size`: all bytes.
extern "C" __global__ void __launch_bounds__(BLOCK, 2)
    sum_of_many(const u8* x, const u8* residual, u8* y, long long size, long long part, const u64* table,
                long long bytes, long long place_bytes) {
    const int tid = threadIdx.x;
    Ranks ranks = ranks_of(table, blockIdx.x, bytes);
    wait_for_kernel_ahead();
    start_kernel_behind();
    begin_exchange(ranks);
    const long long first = blockIdx.x * part, count = max(0ll, min(part, size - first));
    const int groups = (int)((count + GROUP - 1) / GROUP);
    auto place = [&](int reader, int writer) {
        return place_of(ranks, reader, writer) + (long long)blockIdx.x * place_bytes;
    };
#pragma unroll 1
    for (int i = 0; i < groups + AHEAD; i++) {
        if (i < groups) {
            uint4 v[STEPS];
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                const long long at = (long long)i * GROUP + (s * BLOCK + tid) * 16;
                if (at < count) v[s] = load16(x + first + at);
            }
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                const long long at = (long long)i * GROUP + (s * BLOCK + tid) * 16;
#pragma unroll
                for (int r = 0; r < RANKS; r++)
                    if (r != RANK && at < count) *(uint4*)(place(r, RANK) + FLAGS + at) = v[s];
            }
            __syncthreads();
#pragma unroll
            for (int r = 0; r < RANKS; r++)
                if (r != RANK && tid == r) {
                    __threadfence_system();
                    tell_system((u64*)place(r, RANK), (u64)ranks.number << 32 | (u32)(i + 1));
                }
        }
        const int ready = i - AHEAD;
        if (ready < 0) continue;
#pragma unroll
        for (int r = 0; r < RANKS; r++)
            if (r != RANK && tid == r) {
                poll(ranks, [&] {
                    u64 told;
                    ask_system((const u64*)place(RANK, r), told);
                    return (u32)(told >> 32) == ranks.number && (u32)told > (u32)ready;
                });
                __threadfence_system();
            }
        __syncthreads();
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            const long long at = (long long)ready * GROUP + (s * BLOCK + tid) * 16;
            if (at >= count) continue;
            const uint4 added = load16(residual + first + at);
            float sum[8] = {};
#pragma unroll
            for (int r = 0; r < RANKS; r++) {
                const uint4 v = load16(r == RANK ? x + first + at : place(RANK, r) + FLAGS + at);
                sum[0] += low(v.x), sum[1] += high(v.x), sum[2] += low(v.y), sum[3] += high(v.y);
                sum[4] += low(v.z), sum[5] += high(v.z), sum[6] += low(v.w), sum[7] += high(v.w);
            }
            *(uint4*)(y + first + at) =
                make_uint4(pack(sum[0] + low(added.x), sum[1] + high(added.x)), pack(sum[2] + low(added.y), sum[3] + high(added.y)),
                           pack(sum[4] + low(added.z), sum[5] + high(added.z)), pack(sum[6] + low(added.w), sum[7] + high(added.w)));
        }
    }
    __syncthreads();
    if (tid == 0 && groups) end_exchange(ranks);  // or the next would not know that the one before was read
}
