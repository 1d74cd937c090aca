// Which tokens chose an expert, up to 8 to a pass.

constexpr int NONE = 0xffff;  // no token

template <int EXPERTS, int EACH, int MOST_TOKENS> struct Passes {
    static constexpr int MOST = MOST_TOKENS * EACH;
    u64 tokens[EXPERTS];    // bit t: token t chose it; zero at first
    u16 first[EXPERTS];     // pass of the expert
    u16 expert[MOST];
    __align__(16) u16 pair[MOST][8];  // t * EACH + place, of the tokens that chose it in their order, then NONE
    int count;

    __device__ void clear(int thread, int threads) {
        for (int e = thread; e < EXPERTS; e += threads) tokens[e] = 0;
        for (int p = thread; p < MOST * 4; p += threads) ((u32*)pair)[p] = 0xffffffffu;
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
            int needed = 0;
            if (chosen[i] >= 0 && !(all & ((1ull << t) - 1))) needed = (__popcll(all) + 7) / 8;
            int end = needed;
#pragma unroll
            for (int m = 1; m < 32; m *= 2) {
                const int before = __shfl_up_sync(~0u, end, m);
                if (lane >= m) end += before;
            }
            for (int n = 0; n < needed; n++) expert[total + end - needed + n] = chosen[i];
            if (needed) first[chosen[i]] = total + end - needed;
            total += __shfl_sync(~0u, end, 31);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            if (chosen[i] < 0) continue;
            const int p = 32 * i + lane, t = p / EACH;
            const int place = __popcll(tokens[chosen[i]] & ((1ull << t) - 1));
            pair[first[chosen[i]] + place / 8][place % 8] = p;
        }
        if (lane == 0) count = total;
        __syncwarp();
    }
};
