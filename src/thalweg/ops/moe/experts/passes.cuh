// Which tokens chose an expert, up to 8 to a pass.

constexpr int NONE = 0xffff;  // no token

template <int EXPERTS, int EACH, int MOST_TOKENS> struct Passes {
    static constexpr int MOST = MOST_TOKENS * EACH;
    u64 tokens[EXPERTS];    // bit t: token t chose it; zero at first
    u16 first[EXPERTS];     // place of the expert's first pair
    u16 expert[MOST];
    u16 start[MOST + 1];    // place of a pass's first pair; behind the last pass, how many there are
    u16 pairs[MOST];        // t * EACH + place, pass by pass, of the tokens that chose an expert in their order
    int count;

    __device__ void clear(int thread, int threads) {
        for (int e = thread; e < EXPERTS; e += threads) tokens[e] = 0;
    }
    __device__ int size(int pass) const { return MOST_TOKENS == 1 ? 1 : start[pass + 1] - start[pass]; }
    __device__ int pair(int pass, int i) const {
        return i >= size(pass) ? NONE : pairs[MOST_TOKENS == 1 ? pass : start[pass] + i];
    }

    // By one warp. Passes are in the order of their experts' first tokens.
    __device__ void list(const long long* ids, int T) {
        constexpr int ROUNDS = (MOST + 31) / 32;
        const int lane = threadIdx.x % 32;
        int chosen[ROUNDS], total = 0;
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) chosen[i] = 32 * i + lane < T * EACH ? load_id(ids + 32 * i + lane) : -1;
#pragma unroll
        for (int i = 0; i < ROUNDS; i++)
            if (chosen[i] >= 0) atomicOr(&tokens[chosen[i]], 1ull << (32 * i + lane) / EACH);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const int t = (32 * i + lane) / EACH;
            if (32 * i >= T * EACH) break;
            const u64 all = tokens[max(chosen[i], 0)];
            int own = 0;  // passes, and below them pairs, of the expert whose first token this is
            if (chosen[i] >= 0 && !(all & ((1ull << t) - 1))) own = (__popcll(all) + 7) / 8 << 16 | __popcll(all);
            int end = own;
#pragma unroll
            for (int m = 1; m < 32; m *= 2) {
                const int before = __shfl_up_sync(~0u, end, m);
                if (lane >= m) end += before;
            }
            const int from = total + end - own;
            for (int n = 0; n < own >> 16; n++) {
                expert[(from >> 16) + n] = chosen[i];
                start[(from >> 16) + n] = (from & 0xffff) + 8 * n;
            }
            if (own) first[chosen[i]] = from & 0xffff;
            total += __shfl_sync(~0u, end, 31);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            if (chosen[i] < 0) continue;
            const int p = 32 * i + lane, t = p / EACH;
            pairs[first[chosen[i]] + __popcll(tokens[chosen[i]] & ((1ull << t) - 1))] = p;
        }
        if (lane == 0) count = total >> 16, start[total >> 16] = total & 0xffff;
        __syncwarp();
    }
};
