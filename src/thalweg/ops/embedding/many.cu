// Rows of a vocabulary that two ranks divide, for many tokens: the rank that has a token's row writes it to the other
// one's memory as it is, half as many bytes on average as a sum over ranks of rows and zeros. A word of 32 bits that is
// not zero has come, as ops/all_reduce/many.cu says; zeros go as negative ones, and the reader of a place leaves zeros.
//
// What the first batch of the first block has, both ranks write and read: so each has something of the other's in every
// exchange, without which it might write to places that the other has yet to read.
//
// Macros: D columns, a multiple of 8; RANKS, which are 2; RANK; BLOCK threads, PER blocks of a multiprocessor; NAP,
// nanoseconds between two looks.

#include "hopper.cuh"
#include "ranks.cuh"
static_assert(RANKS == 2);

__device__ __forceinline__ u32 not_zero(u32 pair) { return pair ? pair : 0x80008000u; }

// `rows`: of w, this rank's; `size`: bytes of y; `bytes`: as of ranks_of, of which each kind of places has two.
extern "C" __global__ void __launch_bounds__(BLOCK, PER)
    embed_many(const long long* ids, const u8* w, u8* y, long long rows, int size, const u64* table, long long bytes) {
    const int tid = threadIdx.x;
    Ranks ranks = ranks_of(table, blockIdx.x, bytes);
    wait_for_kernel_ahead();
    start_kernel_behind();
    begin_exchange(ranks);
    const long long kind = (ranks.number & 1) * RANKS * bytes;
    u8 *theirs = ranks.peers[1 - RANK] + kind, *mine = ranks.peers[RANK] + kind;
    auto place = [&](int i) { return (i * (int)gridDim.x + (int)blockIdx.x) * (16 * BLOCK) + 16 * tid; };
    auto meets = [&](int i) { return i == 0 && blockIdx.x == 0; };
    auto send = [&](int i) {  // whether this rank has the row
        const int at = place(i);
        if (at >= size) return false;
        const long long row = load_id(ids + at / (2 * D)) - RANK * rows;
        const bool here = row >= 0 && row < rows;
        uint4 v = {};
        if (here) v = load16(w + row * (2 * D) + at % (2 * D));
        v = make_uint4(not_zero(v.x), not_zero(v.y), not_zero(v.z), not_zero(v.w));
        if (here || meets(i)) give_system(theirs + at, v.x, v.y, v.z, v.w);
        if (here) *(uint4*)(y + at) = v;
        return here;
    };
    bool next = send(0);
#pragma unroll 1
    for (int i = 0; place(i) < size; i++) {
        const bool here = next;
        next = send(i + 1);
        if (here && !meets(i)) continue;
        uint4 come = {};
        poll(ranks, [&] {
            take_system(mine + place(i), come);
            const bool all = come.x && come.y && come.z && come.w;
            if (NAP && !all) nap(NAP);
            return all;
        });
        if (!here) *(uint4*)(y + place(i)) = come;
        *(uint4*)(mine + place(i)) = make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
    if (tid == 0) end_exchange(ranks);
}
