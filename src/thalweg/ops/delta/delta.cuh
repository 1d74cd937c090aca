// What the kernels for prompts share.

// Where in `work` a chunk of a head has its parts (Gated DeltaNet: gdn.cuh), and the bytes of a block of 16 by 16 and of
// a tile.
constexpr int K = 128, CHUNK = 64, BLOCK = 512, TILE = CHUNK * K * 2;
constexpr int W_AT = 0, Q_AT = TILE, K_AT = 2 * TILE, P_AT = 3 * TILE, A_AT = P_AT + 10 * BLOCK, U_AT = A_AT + 4 * K;
// And sums of its outputs' squares by 16 rows of V and token, which blocks of states.cu tell each other.
constexpr int SUMS_AT = U_AT + TILE, SUMS = 4 * CHUNK;
constexpr int WORK = SUMS_AT + 8 * SUMS;
constexpr u32 NOT_YET = ~0u;  // what is there before, which no sum is

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

// COUNT of twice as many sums go on in this lane, the others in the one that differs by `mask`.
template <int COUNT, int ALL> __device__ __forceinline__ void halve(float (&v)[ALL], int lane, int mask) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const float other = __shfl_xor_sync(~0u, lane & mask ? v[i] : v[i + COUNT], mask);
        v[i] = (lane & mask ? v[i + COUNT] : v[i]) + other;
    }
}
