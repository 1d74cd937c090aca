// Tiles of products.cu: what they are made of, who works on which, where they lie in shared memory.

constexpr int STAGES = LATER ? 3 : 4, STEP_BYTES = 128, UNIT = 16, MOST = UNIT * UNITS;
constexpr int BOX = 128 * STEP_BYTES;  // bytes of weights that a copy brings
constexpr int SCALES = FP8 ? MOST + (DENSE ? 256 : 2) : 0;  // floats: of x's rows, in the first step; of the weights
constexpr int WEIGHTS = 2 * BOX, ROWS = MOST * STEP_BYTES;
constexpr int OUT_BYTES = 2 * UNIT * STEP_BYTES;  // of 32 rows of 64 columns, swizzled
constexpr int COPIERS = 128, MULTIPLIERS = 256;
constexpr int TOLD = 8;  // tiles that may be told before the first of them is done: more than the ring has stages, and two

// `all` the rows of the cluster, of which `count` are the block's; `of` the entry of `blocks` that they are.
struct Work { int all, expert, first, count, part, of; };

// A tile that is told to those who work on it: none if it has no rows.
struct alignas(16) Told { int expert, first, all, tile; };

struct Shared {
    alignas(1024) u8 weights[STAGES][WEIGHTS];
    u8 rows[STAGES][ROWS];
#if LATER
    u8 out[2][ROWS];                 // by warpgroup: 64 columns, swizzled
#else
    u8 out[2][2][OUT_BYTES];         // by warpgroup, by turns
#endif
    alignas(16) float scales[STAGES][SCALES ? SCALES : 1];
    int to[2][2][DENSE ? 1 : MOST];  // by warpgroup, by turns: where rows go
    alignas(16) float of_rows[2][FP8 ? MOST : 1];  // by warpgroup: scales of x's rows
    u64 full[STAGES], empty[STAGES];
    alignas(16) Told told[TOLD];     // but of DENSE, by turns
    u64 known[TOLD];
};

struct Ring {
    int stage = 0;
    u32 phase = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
};

// What all warps know of the tiles.
struct Tiles {
    const int* blocks;
    int parts, count, tokens;
    // Tile i of the launch; nothing, and a count of 0, behind the last.
    __device__ __forceinline__ Work at(int i) const {
#if DENSE
        constexpr int GROUP = 12;  // tiles of rows that go together, for the weights they share
        const int group = i / (GROUP * parts), width = min(count - group * GROUP, GROUP), within = i - group * GROUP * parts;
        if (group * GROUP >= count || within >= width * parts) return {};
        const int block = group * GROUP + within % width;
        const int units = (tokens + UNIT - 1) / UNIT, first = UNIT * (int)((long long)block * units / count);
        const int end = UNIT * (int)((long long)(block + 1) * units / count);
        return share_out(0, first, min(end, tokens) - first, within / width, 0);
#else
        const int block = i / parts;
        if (block >= count) return {};
        const int* at = blocks + 3 * block;
        return share_out(load_int(at), load_int(at + 1), load_int(at + 2), i - block * parts, block);
#endif
    }
    __device__ __forceinline__ Work share_out(int expert, int first, int all, int part, int of) const {
        if (CLUSTER == 1) return {all, expert, first, all, part, of};
        const int half = min(all, (all + 2 * UNIT - 1) / (2 * UNIT) * UNIT);
        if (blockIdx.x % 2 == 0) return {all, expert, first, half, part, of};
        return {all, expert, all > half ? first + half : first, all - half, part, of};
    }
};

// What one thread of a cluster does to find the next tile, bit by bit while it copies the one before: tiles go to
// whoever is free. The counter is zero before and after a launch.
struct Finder {
    int* counter;
    int total;  // tiles of the launch
    int got = 0;
    Told found = {};
    __device__ __forceinline__ void claim() { got = take_number(counter); }
    __device__ __forceinline__ void look(const Tiles& tiles) {
        const int i = got + gridDim.x / CLUSTER, block = i / tiles.parts;  // the first ones need not be claimed
        const int* at = tiles.blocks + 3 * block;
        found.all = 0;
        if (i < total) found = {load_int(at), load_int(at + 1), load_int(at + 2), i};
        if (got == total - 1) *counter = 0;  // of as many claims as tiles this was the last
    }
    __device__ __forceinline__ void tell(Shared& s, int turn) const {
        const u32 to = shared_address(&s.told[turn % TOLD]), known = shared_address(&s.known[turn % TOLD]);
#pragma unroll
        for (int b = 0; b < CLUSTER; b++) store_in_block(b, to, make_uint4(found.expert, found.first, found.all, found.tile), known);
    }
};

// The tiles of a block, one after another, for each of those who work on them.
struct Walk {
    const Tiles& tiles;
    int turn = 0;  // tiles begun
    __device__ __forceinline__ Work first() const { return tiles.at(blockIdx.x / CLUSTER); }
    __device__ __forceinline__ Work next(Shared& s) {
#if !DENSE
        const int slot = turn % TOLD;
        wait_at_barrier(shared_address(&s.known[slot]), turn / TOLD % 2);
        turn++;
        const Told x = s.told[slot];
        const int of = x.tile / tiles.parts;
        return x.all ? tiles.share_out(x.expert, x.first, x.all, x.tile - of * tiles.parts, of) : Work{};
#else
        turn++;
        return tiles.at(blockIdx.x / CLUSTER + turn * (gridDim.x / CLUSTER));
#endif
    }
};
