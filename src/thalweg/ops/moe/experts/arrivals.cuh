// The weighted sum that ends the experts, within "down": whoever comes last to a strip of 16 columns of a token adds up
// what all have there, in one order. So it needs no launch of its own, and its bits do not depend on who is last.

struct Ending {
    const float* weights;        // [T, experts a token]
    const bf16* residual;        // or null
    bf16* y;                     // [T, WIDTH]
    int* arrived;                // how many came to a strip of a token: zero before and after
    long long residual_stride;
    float scale;                 // of the sum, beside the own expert
};

// Ends a block. Its threads have written what it has of `out` [T * EACH, WIDTH], and of the own expert [T, WIDTH] behind it.
// `list` is shared memory that is free now. `each` calls its argument with (token, strip) of each part that the block
// had, shared out over its threads.
template <int EACH, int WITH_OWN, int WIDTH, int BLOCK_THREADS, class Parts>
__device__ void end_experts(const Ending& to, const float* out, int T, int* list, Parts each) {
    constexpr int STRIPS = WIDTH / 16, PARTS = EACH + WITH_OWN;
    __shared__ int found;
    const int tid = threadIdx.x;
    if (tid == 0) found = 0;
    __threadfence();
    __syncthreads();
    each([&](int t, int strip) {
        if (atomicAdd(to.arrived + t * STRIPS + strip, 1) == PARTS - 1) list[atomicAdd(&found, 1)] = t * STRIPS + strip;
    });
    __syncthreads();
    __threadfence();
    for (int n = tid / 16; n < found; n += BLOCK_THREADS / 16) {
        const int t = list[n] / STRIPS, at = list[n] % STRIPS * 16 + tid % 16;
        float parts[PARTS], weight[EACH], total = 0;
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            parts[k] = load_fp32(out + (long long)(t * EACH + k) * WIDTH + at);
            weight[k] = load_fp32(to.weights + t * EACH + k);
        }
        if (WITH_OWN) parts[EACH] = load_fp32(out + (long long)(T * EACH + t) * WIDTH + at);
        const float before = to.residual ? from_bf16(load_bf16(to.residual + t * to.residual_stride + at)) : 0.0f;
#pragma unroll
        for (int k = 0; k < EACH; k++) total += weight[k] * parts[k];
        // Rounded where the unfused additions round.
        if (WITH_OWN) total = as_bf16(fmaf(as_bf16(total), to.scale, as_bf16(parts[EACH])));
        store_bf16(to.y + (long long)t * WIDTH + at, to.residual ? total + before : total);
        if (tid % 16 == 0) to.arrived[list[n]] = 0;
    }
}
