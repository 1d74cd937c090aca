// What the kernels that choose experts share. It is included behind hopper.cuh.

__device__ __forceinline__ void unpack(float (&to)[8], uint4 from) {
    to[0] = low(from.x), to[1] = high(from.x), to[2] = low(from.y), to[3] = high(from.y);
    to[4] = low(from.z), to[5] = high(from.z), to[6] = low(from.w), to[7] = high(from.w);
}
__device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
    for (int m = 1; m < 32; m *= 2) x += __shfl_xor_sync(~0u, x, m);
    return x;
}

constexpr int LOWEST_KEY = -2147483647 - 1;

// Floats as integers in the same order. NaN is as low as -infinity, and that above LOWEST_KEY.
__device__ __forceinline__ int order(float x) {
    const int bits = x == x ? (int)__float_as_uint(x) : (int)0xff800000;
    return bits < 0 ? bits ^ 0x7fffffff : bits;
}

// By one warp, whose lane has the keys of experts lane, lane + 32 and so on: calls put(k, i, id) for the CHOSEN experts
// with the largest keys, best first, in the lane that has expert `id` as its i-th. Of equals the lower id comes first.
template <int CHOSEN, int KEYS, class Put> __device__ __forceinline__ void choose_experts(int (&key)[KEYS], Put put) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int k = 0; k < CHOSEN; k++) {
        int best = LOWEST_KEY, id = 32 * KEYS;
#pragma unroll
        for (int i = 0; i < KEYS; i++) best = max(best, key[i]);
        best = __reduce_max_sync(~0u, best);
#pragma unroll
        for (int i = KEYS - 1; i >= 0; i--) id = key[i] == best ? 32 * i + lane : id;
        id = __reduce_min_sync(~0u, id);
#pragma unroll
        for (int i = 0; i < KEYS; i++)
            if (32 * i + lane == id) key[i] = LOWEST_KEY, put(k, i, id);
    }
}
