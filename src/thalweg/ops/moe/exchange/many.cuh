// Exchanges of many rows: too many bytes for twice as many to be written, as in those of few.
//
// A rank writes 16 bytes at a time to the memory of another, which awaits them there. A word of 32 bits that is not zero
// has come, whatever else has: so nothing tells of it, and there are no fences. Zeros are written as something else that
// counts as much. Whoever has read a place leaves zeros there. A thread writes ahead of what it awaits, so that the link and
// the memory are busy at once.
//
// Exchanges have numbers and places of two kinds in turn, as ranks.cuh says, and a place is always of the same block: so a
// rank writes to one of exchange e once it has all of e - 1, and no rank wrote e - 1 before its kernel of e - 2 had ended,
// with the zeros that it left.

__device__ __forceinline__ u32 not_zero(u32 word, u32 instead) { return word ? word : instead; }
__device__ __forceinline__ uint4 not_zero(uint4 v) {  // of bf16: minus zero
    constexpr u32 instead = 0x80008000u;
    return make_uint4(not_zero(v.x, instead), not_zero(v.y, instead), not_zero(v.z, instead), not_zero(v.w, instead));
}
__device__ __forceinline__ void give(u8* to, uint4 v) { give_system(to, v.x, v.y, v.z, v.w); }
// What comes to a place of this rank's, where zeros are left.
__device__ __forceinline__ uint4 take(const Ranks& ranks, u8* at) {
    uint4 come = {};
    poll(ranks, [&] {
        take_system(at, come);
        const bool all = come.x && come.y && come.z && come.w;
        if (NAP && !all) nap(NAP);
        return all;
    });
    *(uint4*)at = make_uint4(0, 0, 0, 0);
    return come;
}
