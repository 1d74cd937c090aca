// Sums over ranks that map each other's memory, one process and device each, of one host.
//
// A block of a kernel that all ranks launch alike meets the blocks of its number on the others, and no one else. What a
// rank has to say goes to a place of its own in the memory of each: 32 bits of it with the number of the exchange beside
// them in one store of 64 bits, so that whoever polls for the number has the bits too, and no fence is needed. Places
// are of two kinds in turn. A rank writes to one of exchange e once it has all of e - 1, and no rank wrote e - 1 before
// its kernel of e - 2 had ended: nothing is overwritten that may still be read. Numbers count up in device memory, a
// count per block, so a graph that holds a kernel may be replayed any number of times.
//
// A rank that is gone leaves others polling; `stop`, a word of host memory, then ends that. What was polled for is
// undefined, as is all that follows.

struct Ranks {
    u8* peers[RANKS];  // each rank's memory, this one's included
    u32* count;        // of this block
    const u32* stop;
    u32 number;  // of the exchange
    long long bytes;  // that a rank has in another's memory for one kind of places
};

// `table`: the ranks' addresses, that of the counts, and that of the word that stops.
__device__ __forceinline__ Ranks ranks_of(const u64* table, int block, long long bytes) {
    Ranks r;
#pragma unroll
    for (int i = 0; i < RANKS; i++) r.peers[i] = (u8*)table[i];
    r.count = (u32*)table[RANKS] + block;
    r.stop = (const u32*)table[RANKS + 1];
    r.bytes = bytes;
    return r;
}

// After the wait for the kernel ahead, in each thread.
__device__ __forceinline__ void begin_exchange(Ranks& r) { r.number = load_anew(r.count) + 1; }
// In one thread, once all of the block have begun.
__device__ __forceinline__ void end_exchange(const Ranks& r) { *r.count = r.number; }

// In the memory of a reader.
__device__ __forceinline__ u8* place_of(const Ranks& r, u8* memory, int writer) {
    return memory + ((r.number & 1) * RANKS + writer) * r.bytes;
}
__device__ __forceinline__ u8* place_of(const Ranks& r, int reader, int writer) {
    return place_of(r, r.peers[reader], writer);
}
__device__ __forceinline__ void tell_rank(u8* to, u32 x, u32 y, u32 number) {
    tell_system((u64*)to, (u64)number << 32 | x, (u64)number << 32 | y);
}
__device__ __forceinline__ bool told(const u8* at, u32& x, u32& y, u32 number) {
    u64 a, b;
    ask_system((const u64*)at, a, b);
    x = (u32)a, y = (u32)b;
    return (u32)(a >> 32) == number && (u32)(b >> 32) == number;
}
// The same of one value.
__device__ __forceinline__ void tell_rank(u8* to, float x, u32 number) {
    tell_system((u64*)to, (u64)number << 32 | __float_as_uint(x));
}
__device__ __forceinline__ bool told(const u8* at, float& x, u32 number) {
    u64 a;
    ask_system((const u64*)at, a);
    x = __uint_as_float((u32)a);
    return (u32)(a >> 32) == number;
}
__device__ __forceinline__ bool stopped(const Ranks& r) { return load_anew(r.stop); }
// Until `there` says so, or never if the ranks were stopped.
template <typename There> __device__ __forceinline__ void poll(const Ranks& r, There there) {
    for (u32 polls = 1; !there(); polls++) {
        if (polls % 1024 == 0 && stopped(r)) break;
#ifdef MOST_POLLS
        if (polls > MOST_POLLS) __trap();
#endif
    }
}
