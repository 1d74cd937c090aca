// Norm, router and choice in one launch for Hopper, in bf16, for very few tokens and wide weights of many experts.
//
// A block has one token and all columns of ROWS experts, in registers, so that it finds room beside a block of the
// projection ahead, whose ring fills shared memory: its weights come while that one ends. Every block norms the token,
// which saves an exchange of squares, and writes its part of what comes of it. Logits go to memory, where one block of
// each token awaits them: `told` is zero wherever no logit has come, before a launch and after it.
//
// Macros: E, D and K as in the op's contract; SHARED experts behind the chosen ones; SOFTMAX and RENORMALIZE, 0 or 1;
// ROWS; WARPS.

#include "hopper.cuh"
#include "choice.cuh"

constexpr int THREADS = 32 * WARPS, VECTORS = D / 8 / THREADS;  // of 16 bytes, of a row, that a thread has
constexpr int KEYS = E / 32;                                    // of a lane
static_assert(D % (8 * THREADS) == 0 && E % 32 == 0 && WARPS <= 32, "");

// Two blocks' registers at most, so that there is room beside another kernel's.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    norm_router(const bf16* x, const bf16* norm_weight, const bf16* w, const float* bias, bf16* normed, float* weights,
                long long* ids, u32* told, long long x_stride, float eps, float scale) {
    const int tid = threadIdx.x, lane = tid % 32, block = blockIdx.x, token = blockIdx.y;
    const bool chooses = block == gridDim.x - 1;
    const int warp = __shfl_sync(~0u, tid / 32, 0);  // so that the compiler knows it for the same in all lanes
    __shared__ float squares_s[32], sums_s[ROWS][32], bias_s[E], scores_s[K];
    __shared__ int ids_s[K];

    uint4 w8[ROWS][VECTORS], norm8[VECTORS], x8[VECTORS];
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
#pragma unroll
        for (int i = 0; i < ROWS; i++)
            w8[i][v] = load16(w + (long long)min(block * ROWS + i, E - 1) * D + 8 * (tid + v * THREADS));
        norm8[v] = load16(norm_weight + 8 * (tid + v * THREADS));
    }
    if (chooses)
        for (int e = tid; e < E; e += THREADS) bias_s[e] = bias[e];

    wait_for_kernel_ahead();
    // Not earlier: the kernel behind asks for weights of its own.
    start_kernel_behind();

    x += token * x_stride;
    float square = 0;
#pragma unroll
    for (int v = 0; v < VECTORS; v++) x8[v] = load16(x + 8 * (tid + v * THREADS));
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        float y[8];
        unpack(y, x8[v]);
#pragma unroll
        for (int e = 0; e < 8; e++) square += y[e] * y[e];
    }
    square = sum_of_lanes(square);
    if (lane == 0) squares_s[warp] = square;
    __syncthreads();
    const float r = rsqrtf(sum_of_lanes(lane < WARPS ? squares_s[lane] : 0.0f) * (1.0f / D) + eps);
    const int each = (D / 8 + gridDim.x - 1) / gridDim.x;  // vectors of the token that a block writes
    float sum[ROWS] = {};
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        float y[8], by[8];
        unpack(y, x8[v]);
        unpack(by, norm8[v]);
#pragma unroll
        for (int e = 0; e < 8; e++) y[e] = y[e] * r * by[e];
        const uint4 n8 = make_uint4(pack(y[0], y[1]), pack(y[2], y[3]), pack(y[4], y[5]), pack(y[6], y[7]));
        const int at = tid + v * THREADS;
        if (at / each == block) *(uint4*)(normed + (long long)token * D + 8 * at) = n8;
        unpack(y, n8);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            unpack(by, w8[i][v]);
#pragma unroll
            for (int e = 0; e < 8; e++) sum[i] += y[e] * by[e];
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        sum[i] = sum_of_lanes(sum[i]);
        if (lane == 0) sums_s[i][warp] = sum[i];
    }
    __syncthreads();
    if (warp > 0) return;
    told += 2 * token * E;
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const float logit = sum_of_lanes(lane < WARPS ? sums_s[i][lane] : 0.0f);
        if (lane == i && block * ROWS + i < E) tell_blocks(told + 2 * (block * ROWS + i), __float_as_uint(logit), 1);
    }
    if (!chooses) return;

    // The choice.
    uint2 here[KEYS];
    told += 2 * lane;
    bool all;
    do {
        all = true;
#pragma unroll
        for (int i = 0; i < KEYS; i++) here[i] = ask_blocks(told + 64 * i);
#pragma unroll
        for (int i = 0; i < KEYS; i++) all = all && here[i].y;
    } while (!__all_sync(~0u, all));
    float score[KEYS], most = LOWEST, total = 0;
    int key[KEYS];
#pragma unroll
    for (int i = 0; i < KEYS; i++) {
        tell_blocks(told + 64 * i, 0, 0);
        score[i] = __uint_as_float(here[i].x);
        most = fmaxf(most, score[i]);
    }
    if (SOFTMAX) {
#pragma unroll
        for (int m = 1; m < 32; m *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, m));
#pragma unroll
        for (int i = 0; i < KEYS; i++) total += score[i] = __expf(score[i] - most);
        total = sum_of_lanes(total);
    }
#pragma unroll
    for (int i = 0; i < KEYS; i++) {
        score[i] = SOFTMAX ? score[i] / total : 1.0f / (1.0f + __expf(-score[i]));
        key[i] = order(score[i] + bias_s[32 * i + lane]);
    }
    choose_experts<K>(key, [&](int k, int i, int id) { scores_s[k] = score[i], ids_s[k] = id; });
    __syncwarp();
    for (int k = lane; k < K + SHARED; k += 32) {
        float chosen = 0;
#pragma unroll
        for (int j = 0; j < K; j++) chosen += scores_s[j];
        const float divisor = RENORMALIZE ? chosen + 1e-20f : 1.0f;
        weights[(long long)token * (K + SHARED) + k] = k < K ? scores_s[k] / divisor * scale : 1.0f;
        ids[(long long)token * (K + SHARED) + k] = k < K ? ids_s[k] : E - K + k;
    }
}
