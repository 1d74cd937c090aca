// y = residual + the sum over two ranks of x for many tokens: too many bytes for twice as many to be written, as rows.cu
// does.
//
// A thread writes its x to the other rank's memory and adds what the other wrote to the same place of this one's. A word
// of 32 bits that is not zero has come, whatever else has: so nothing tells of it, and there are no fences. Zeros count
// as negative ones, which add up to the same. Whoever has read a place leaves zeros there. A thread writes a batch ahead of
// the one that it awaits, so that the link and the memory are busy at once.
//
// Exchanges have numbers and places of two kinds in turn, as ranks.cuh says: a rank writes to one of exchange e once it
// has all of e - 1, and no rank wrote e - 1 before its kernel of e - 2 had ended, with the zeros that it left.
//
// With WEIGHTED x is the sum of PARTS rows times their weights, the experts' outputs of a token; with OWN an expert of
// its own width is added to `scale` times that, rounded as in op "scaled_residual_add".
//
// With NORM, of blocks whose threads take a row at a time, "rms_norm" of y is written as well; its weight is in NORM
// bytes. All threads of a block then wait for the row's last word.
//
// Macros: D columns, a multiple of 8; PARTS; WEIGHTED; OWN; NORM, 0, 2 or 4; RANKS, which are 2; RANK; BLOCK threads,
// PER blocks of a multiprocessor; BATCH, of 16 bytes; NAP, nanoseconds between two looks.

#include "hopper.cuh"
#include "ranks.cuh"
static_assert(RANKS == 2);
static_assert(!NORM || (8 * BLOCK == D && BLOCK % 32 == 0));
constexpr int WARPS = BLOCK / 32;

struct Eight {
    float x[8];
    __device__ __forceinline__ void add(uint4 v, float by = 1) {
        x[0] += by * low(v.x), x[1] += by * high(v.x), x[2] += by * low(v.y), x[3] += by * high(v.y);
        x[4] += by * low(v.z), x[5] += by * high(v.z), x[6] += by * low(v.w), x[7] += by * high(v.w);
    }
    __device__ __forceinline__ float squares() const {
        return x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3] + x[4] * x[4] + x[5] * x[5] + x[6] * x[6] + x[7] * x[7];
    }
    __device__ __forceinline__ uint4 narrow() const {
        return make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
    }
};
__device__ __forceinline__ u32 not_zero(u32 pair) { return pair ? pair : 0x80008000u; }

// `size`: bytes of y; `bytes`: as of ranks_of, of which this rank's share for each kind of places has two.
extern "C" __global__ void __launch_bounds__(BLOCK, PER)
    sum_of_many(const u8* parts, const float* weights, const u8* own, const u8* residual, u8* y, float scale,
                const u8* norm_weight, u8* normed, float eps, int size, const u64* table, long long bytes) {
    __shared__ float squares_s[2][BATCH][WARPS];
    const int tid = threadIdx.x;
    Eight weight = {};  // of the norm, in this thread's columns
    if (NORM == 2) weight.add(load16(norm_weight + 16 * tid));
    if (NORM == 4) {
#pragma unroll
        for (int c = 0; c < 8; c++) weight.x[c] = load_fp32((const float*)norm_weight + 8 * tid + c);
    }
    Ranks ranks = ranks_of(table, blockIdx.x, bytes);
    wait_for_kernel_ahead();
    start_kernel_behind();
    begin_exchange(ranks);
    const long long kind = (ranks.number & 1) * RANKS * bytes;
    u8 *theirs = ranks.peers[1 - RANK] + kind, *mine = ranks.peers[RANK] + kind;
    auto place = [&](int i, int u) { return ((i * (int)gridDim.x + (int)blockIdx.x) * BATCH + u) * (16 * BLOCK) + 16 * tid; };
    auto given = [&](int at) {  // what this rank adds there
        if (!WEIGHTED) return load16(parts + at);
        const int token = at / (2 * D), column = at % (2 * D);
        uint4 raw[PARTS], by_own;
        float weight[PARTS];
#pragma unroll
        for (int j = 0; j < PARTS; j++) raw[j] = load16(parts + ((long long)token * PARTS + j) * (2 * D) + column);
#pragma unroll
        for (int j = 0; j < PARTS; j++) weight[j] = load_fp32(weights + token * PARTS + j);
        if (OWN) by_own = load16(own + at);
        Eight sum = {};
#pragma unroll
        for (int j = 0; j < PARTS; j++) sum.add(raw[j], weight[j]);
        if (OWN) {
            const uint4 rounded = sum.narrow();
            sum = {};
            sum.add(by_own), sum.add(rounded, scale);
        }
        return sum.narrow();
    };
    uint4 next[BATCH], now[BATCH];
    auto send = [&](int i) {
#pragma unroll
        for (int u = 0; u < BATCH; u++)
            if (place(i, u) < size) {
                const uint4 v = given(place(i, u));
                next[u] = make_uint4(not_zero(v.x), not_zero(v.y), not_zero(v.z), not_zero(v.w));
            }
#pragma unroll
        for (int u = 0; u < BATCH; u++)
            if (place(i, u) < size) give_system(theirs + place(i, u), next[u].x, next[u].y, next[u].z, next[u].w);
    };
    auto write_normed = [&](int i, const uint4 (&sums)[BATCH]) {
#pragma unroll
        for (int u = 0; u < BATCH; u++) {
            Eight sum = {};
            sum.add(sums[u]);
            float squares = sum.squares();
#pragma unroll
            for (int by = 16; by; by /= 2) squares += __shfl_xor_sync(~0u, squares, by);
            if (tid % 32 == 0) squares_s[i & 1][u][tid / 32] = squares;
        }
        __syncthreads();
#pragma unroll
        for (int u = 0; u < BATCH; u++) {
            if (place(i, u) >= size) continue;
            float squares = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) squares += squares_s[i & 1][u][w];
            Eight sum = {};
            sum.add(sums[u]);
            const float by = rsqrtf(squares * (1.0f / D) + eps);
#pragma unroll
            for (int c = 0; c < 8; c++) sum.x[c] *= by * weight.x[c];
            *(uint4*)(normed + place(i, u)) = sum.narrow();
        }
    };
    send(0);
#pragma unroll 1
    for (int i = 0; place(i, 0) < size; i++) {
#pragma unroll
        for (int u = 0; u < BATCH; u++) now[u] = next[u];
        send(i + 1);
        uint4 come[BATCH] = {}, added[BATCH] = {};
#pragma unroll
        for (int u = 0; u < BATCH; u++)
            if (place(i, u) < size) added[u] = load16(residual + place(i, u));
        poll(ranks, [&] {
            bool all = true;
#pragma unroll
            for (int u = 0; u < BATCH; u++)
                if (place(i, u) < size) {
                    take_system(mine + place(i, u), come[u]);
                    all = all && come[u].x && come[u].y && come[u].z && come[u].w;
                }
            if (NAP && !all) nap(NAP);
            return all;
        });
#pragma unroll
        for (int u = 0; u < BATCH; u++) {
            if (place(i, u) >= size) continue;
            Eight sum = {};
            sum.add(RANK ? come[u] : now[u]), sum.add(RANK ? now[u] : come[u]), sum.add(added[u]);
            *(uint4*)(y + place(i, u)) = added[u] = sum.narrow();
            *(uint4*)(mine + place(i, u)) = make_uint4(0, 0, 0, 0);
        }
        if (NORM) write_normed(i, added);
    }
    __syncthreads();
    if (tid == 0) end_exchange(ranks);
}
