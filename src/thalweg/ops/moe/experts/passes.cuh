// Which tokens chose an expert, up to 8 to a pass.

constexpr int NONE = 0xffff;  // no token

template <int EXPERTS, int EACH, int MOST_TOKENS> struct Passes {
    static constexpr int MOST = MOST_TOKENS * EACH;
    u64 tokens[EXPERTS];    // bit t: token t chose it; zero at first
    u16 first[EXPERTS];     // place of the expert's first pair
    u16 expert[MOST];
    u16 start[MOST + 1];    // place of a pass's first pair; behind the last pass, how many there are
    u16 chosen[MOST];       // the expert of each pair
    u16 pairs[MOST];        // t * EACH + place, pass by pass, of the tokens that chose an expert in their order
    int count;

    __device__ void clear(int thread, int threads) {
        for (int e = thread; e < EXPERTS; e += threads) tokens[e] = 0;
    }
    __device__ int size(int pass) const { return MOST_TOKENS == 1 ? 1 : start[pass + 1] - start[pass]; }
    __device__ int pair(int pass, int i) const {
        return i >= size(pass) ? NONE : pairs[MOST_TOKENS == 1 ? pass : start[pass] + i];
    }

    // By one warp, of whose lanes each lists every 32nd expert. Loops are not unrolled: instructions that run once have to
    // come from memory first, which unrolled took 24 us here for 512 pairs.
    __device__ void list(const long long* ids, int T) {
        constexpr int ROUNDS = (MOST + 31) / 32;
        const int lane = threadIdx.x % 32, all = T * EACH;
        int some[ROUNDS];
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) some[i] = 32 * i + lane < all ? load_id(ids + 32 * i + lane) : -1;
#pragma unroll
        for (int i = 0; i < ROUNDS; i++)
            if (32 * i + lane < MOST) chosen[32 * i + lane] = some[i];
#pragma unroll 1
        for (int p = lane; p < all; p += 32) {
            const int e = chosen[p], t = p / EACH;
            if (e != NONE) atomicOr((u32*)&tokens[e] + t / 32, 1u << t % 32);
        }
        __syncwarp();
        int own = 0;  // passes, and below them pairs
#pragma unroll 4
        for (int e = lane; e < EXPERTS; e += 32) {
            const int n = __popcll(tokens[e]);
            own += (n + 7) / 8 << 16 | n;
        }
        int end = own;
#pragma unroll
        for (int m = 1; m < 32; m *= 2) {
            const int before = __shfl_up_sync(~0u, end, m);
            if (lane >= m) end += before;
        }
        int pass = end - own >> 16, place = end - own & 0xffff;
#pragma unroll 1
        for (int e = lane; e < EXPERTS; e += 32) {
            const int n = __popcll(tokens[e]);
            first[e] = place;
#pragma unroll 1
            for (int i = 0; i < n; i += 8) expert[pass] = e, start[pass++] = place + i;
            place += n;
        }
        if (lane == 31) count = pass, start[pass] = place;
        __syncwarp();
#pragma unroll 1
        for (int p = lane; p < all; p += 32) {
            const int e = chosen[p], t = p / EACH;
            if (e != NONE) pairs[first[e] + __popcll(tokens[e] & ((1ull << t) - 1))] = p;
        }
        __syncwarp();
    }
};
