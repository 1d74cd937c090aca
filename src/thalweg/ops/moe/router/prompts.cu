// Norm, router and choice in one launch for the tokens of a short prompt on Hopper, in bf16.
//
// A cluster serves TOKENS tokens. Each of its blocks has a part of the experts, in rows of 64 for a warpgroup's products,
// and a part of the columns: SPLIT of them, whose blocks tell each other their sums of squares. A block norms all tokens,
// where they lie in shared memory as the matrix unit reads them. Weights come through a ring, by tensor map, and the
// first of them before the wait for the kernel ahead. Logits go to the block that owns the token, where a warp chooses.
//
// Macros: E, D and K as in the op's contract; SHARED experts behind the chosen ones; GATED, whether these have a gate,
// the last row of the weights; SOFTMAX and RENORMALIZE, 0 or 1; NORM_FLOAT, whether the norm's weight is fp32; TOKENS of
// a cluster, a multiple of 8; PARTS of the experts; SPLIT, 1 or 2; STAGES of the ring; WARPS.

#include "hopper.cuh"
#include "matrix_unit.cuh"
#include "choice.cuh"

constexpr int BLOCKS = PARTS * SPLIT, ROWS = E / PARTS, GROUPS = ROWS / 64, OWN = TOKENS / BLOCKS;
constexpr int COLUMNS = D / SPLIT, VECTORS = COLUMNS / 8, OF_LANE = (VECTORS + 31) / 32, OF_CHOICE = E / 32;
constexpr int STEPS = COLUMNS / 64, STEP_BYTES = 128, UNITS = (TOKENS + 15) / 16;
constexpr int SLAB = TOKENS * STEP_BYTES, STAGE = ROWS * STEP_BYTES;  // bytes of 64 columns, of tokens and of weights
constexpr int PITCH = ROWS + 4;                                       // floats between tokens' sums: no bank conflicts
static_assert(COLUMNS % 64 == 0 && ROWS % 64 == 0 && 4 * GROUPS < WARPS && TOKENS % 8 == 0 && TOKENS % BLOCKS == 0);
static_assert(4 * PITCH * TOKENS <= STEPS * SLAB && STAGES <= STEPS);

// Where 8 columns of a token are in shared memory.
__device__ __forceinline__ int place_of(int t, int vector) { return vector / 8 * SLAB + t * STEP_BYTES + (vector % 8 ^ t % 8) * 16; }

// A warp's choice of one token, whose logits are in shared memory: SPLIT parts of each.
__device__ __forceinline__ void choose(const float* logits, const float* gate, const float* bias, float* weights, long long* ids,
                                       int lane, float scale) {
    float score[OF_CHOICE];
    int key[OF_CHOICE];
    float most = LOWEST, total = 0;
#pragma unroll
    for (int i = 0; i < OF_CHOICE; i++) {
        float logit = logits[32 * i + lane];
        if (SPLIT > 1) logit += logits[OWN * E + 32 * i + lane];
        score[i] = SOFTMAX ? logit : 1.0f / (1.0f + __expf(-logit));
        most = fmaxf(most, logit);
    }
    if (SOFTMAX) {
#pragma unroll
        for (int m = 1; m < 32; m *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, m));
#pragma unroll
        for (int i = 0; i < OF_CHOICE; i++) total += score[i] = __expf(score[i] - most);
        total = sum_of_lanes(total);
#pragma unroll
        for (int i = 0; i < OF_CHOICE; i++) score[i] = score[i] / total;
    }
#pragma unroll
    for (int i = 0; i < OF_CHOICE; i++) key[i] = order(score[i] + bias[32 * i + lane]);
    int id = E - K + lane;  // of a shared expert
    float mine = 0, sum = 0;
#pragma unroll 1
    for (int j = 0; j < K; j++) {
        int best = key[0], at = E;
#pragma unroll
        for (int i = 1; i < OF_CHOICE; i++) best = max(best, key[i]);
        best = __reduce_max_sync(~0u, best);
#pragma unroll
        for (int i = OF_CHOICE - 1; i >= 0; i--)
            if (key[i] == best) at = 32 * i + lane;
        at = __reduce_min_sync(~0u, at);  // of equals the lowest id
        float chosen = 0;
#pragma unroll
        for (int i = 0; i < OF_CHOICE; i++)
            if (32 * i + lane == at) chosen = score[i], key[i] = LOWEST_KEY;
        chosen = __shfl_sync(~0u, chosen, at % 32);
        sum += chosen;
        if (lane == j) id = at, mine = chosen;
    }
    if (lane < K + SHARED) {
        const float divisor = RENORMALIZE ? sum + 1e-20f : 1.0f;
        float shared_weight = 1;
        if (GATED) shared_weight = 1.0f / (1.0f + __expf(-(gate[0] + (SPLIT > 1 ? gate[4 * OWN] : 0))));
        weights[lane] = lane < K ? mine / divisor * scale : shared_weight;
        ids[lane] = id;
    }
}

extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(32 * WARPS, 1)
    router_of_prompts(const __grid_constant__ TensorMap w_map, const bf16* x, const u8* norm_weight, const bf16* w,
                      const float* bias, bf16* normed, float* weights, long long* ids, long long x_stride, int T, float eps,
                      float scale) {
    extern __shared__ __align__(1024) u8 shared[];
    u8* tokens = shared;                                     // [STEPS, TOKENS, 64], swizzled; then sums
    const u32 ring = shared_address(shared + STEPS * SLAB);  // [STAGES, ROWS, 64]
    u8* norm_s = shared + STEPS * SLAB + STAGES * STAGE;     // the norm's weight, of these columns
    float* logits = (float*)(norm_s + 2 * (1 + NORM_FLOAT) * COLUMNS);  // [SPLIT, OWN, E]
    float* gates = logits + SPLIT * OWN * E;                            // [SPLIT, OWN, 4]: the first of 4
    float* squares = gates + SPLIT * OWN * 4;                           // [TOKENS, 4] of the other columns, likewise
    const u32 full = shared_address(squares + TOKENS * 4), empty = full + 8 * STAGES, logits_here = empty + 8 * STAGES;
    const u32 squares_here = logits_here + 8;
    const int tid = threadIdx.x, lane = tid % 32, warp = __shfl_sync(~0u, tid / 32, 0);
    const int rank = BLOCKS > 1 ? blockIdx.x % BLOCKS : 0, part = rank / SPLIT, half = rank % SPLIT;
    const int first = blockIdx.x / BLOCKS * TOKENS, n = min(TOKENS, T - first), begin = half * COLUMNS;
    auto ask = [&](int step) {
        const u32 barrier = full + 8 * (step % STAGES);
        expect_bytes(barrier, STAGE);
        copy_tile(ring + step % STAGES * STAGE, &w_map, begin + 64 * step, 0, ROWS * part, barrier);
    };
    if (tid == 0) {
        for (int i = 0; i < STAGES; i++) init_barrier(full + 8 * i), init_barrier(empty + 8 * i, 4 * GROUPS);
        init_barrier(logits_here), init_barrier(squares_here);
        share_barriers();
        expect_bytes(logits_here, 4 * SPLIT * OWN * E + (GATED ? 16 * SPLIT * OWN : 0));
        expect_bytes(squares_here, SPLIT > 1 ? 16 * TOKENS : 0);
        for (int step = 0; step < STAGES; step++) ask(step);
    }
    for (int i = tid; i < (1 + NORM_FLOAT) * VECTORS; i += 32 * WARPS)
        ((uint4*)norm_s)[i] = ((const uint4*)(norm_weight + 2 * (1 + NORM_FLOAT) * begin))[i];
    if (BLOCKS > 1)
        wait_for_cluster();
    else
        __syncthreads();
    wait_for_kernel_ahead();
    start_kernel_behind();  // not earlier: the experts' second kernel reads ids before its own wait

    // A warp has tokens `warp`, `warp` + WARPS and so on. What is no token repeats the last one.
    for (int t = warp; t < TOKENS; t += WARPS) {
        const bf16* from = x + (first + min(t, n - 1)) * x_stride + begin;
#pragma unroll
        for (int v = 0; v < OF_LANE; v++)
            if (lane + 32 * v < VECTORS) copy16(shared_address(tokens + place_of(t, lane + 32 * v)), from + 8 * lane + 256 * v);
    }
    commit_copies();
    wait_for_copies<0>();
    __syncwarp();
    float square[(TOKENS + WARPS - 1) / WARPS];
#pragma unroll
    for (int i = 0; i < (TOKENS + WARPS - 1) / WARPS; i++) {
        const int t = warp + WARPS * i;
        if (t >= TOKENS) break;
        float sum = 0;
#pragma unroll
        for (int v = 0; v < OF_LANE; v++)
            if (lane + 32 * v < VECTORS) {
                float y[8];
                unpack(y, *(const uint4*)(tokens + place_of(t, lane + 32 * v)));
#pragma unroll
                for (int e = 0; e < 8; e++) sum += y[e] * y[e];
            }
        square[i] = sum_of_lanes(sum);
        if (SPLIT > 1 && lane == 0)
            store_in_block(rank ^ 1, shared_address(squares + 4 * t), make_uint4(__float_as_uint(square[i]), 0, 0, 0), squares_here);
    }
    if (SPLIT > 1) wait_at_barrier(squares_here, 0);
#pragma unroll
    for (int i = 0; i < (TOKENS + WARPS - 1) / WARPS; i++) {
        const int t = warp + WARPS * i;
        if (t >= TOKENS) break;
        // The parts of the columns in one order, whichever is this block's.
        const float other = SPLIT > 1 ? squares[4 * t] : 0, sum = half ? other + square[i] : square[i] + other;
        const float r = rsqrtf(sum * (1.0f / D) + eps);
        const bool is_own = t / (TOKENS / PARTS) == part && t < n;  // of those who have these columns
        float gate = 0;
#pragma unroll
        for (int v = 0; v < OF_LANE; v++) {
            const int vector = lane + 32 * v;
            if (vector >= VECTORS) break;
            uint4* at = (uint4*)(tokens + place_of(t, vector));
            float y[8], weight[8];
            unpack(y, *at);
            if (NORM_FLOAT) {
                const float4 a = ((const float4*)norm_s)[2 * vector], b = ((const float4*)norm_s)[2 * vector + 1];
                weight[0] = a.x, weight[1] = a.y, weight[2] = a.z, weight[3] = a.w;
                weight[4] = b.x, weight[5] = b.y, weight[6] = b.z, weight[7] = b.w;
            } else {
                unpack(weight, ((const uint4*)norm_s)[vector]);
            }
#pragma unroll
            for (int e = 0; e < 8; e++) y[e] = y[e] * r * weight[e];
            const uint4 n8 = make_uint4(pack(y[0], y[1]), pack(y[2], y[3]), pack(y[4], y[5]), pack(y[6], y[7]));
            *at = n8;
            if (is_own) *(uint4*)(normed + (long long)(first + t) * D + begin + 8 * vector) = n8;
            if (GATED && is_own) {
                unpack(y, n8), unpack(weight, *(const uint4*)(w + (long long)E * D + begin + 8 * vector));
#pragma unroll
                for (int e = 0; e < 8; e++) gate += y[e] * weight[e];
            }
        }
        if (GATED && t / (TOKENS / PARTS) == part) {
            gate = sum_of_lanes(gate);
            if (lane == 0)
                store_in_block(t / OWN, shared_address(gates + 4 * (half * OWN + t % OWN)), make_uint4(__float_as_uint(gate), 0, 0, 0),
                               logits_here);
        }
    }
    share_writes();
    __syncthreads();
    if (warp < 4 * GROUPS) {  // warpgroups multiply
        float c[8 * UNITS];
#pragma unroll
        for (int i = 0; i < 8 * UNITS; i++) c[i] = 0;
        settle(c);
        const u32 right = shared_address(tokens);  // products read behind the tokens, and nobody what comes of that
        int stage = 0, phase = 0, before = 0;
#pragma unroll 1
        for (int step = 0; step < STEPS; step++) {
            const u32 left = ring + stage * STAGE + warp / 4 * 64 * STEP_BYTES;
            wait_at_barrier(full + 8 * stage, phase);
            begin_products();
#pragma unroll
            for (int i = 0; i < STEP_BYTES; i += 32)
                multiply<UNITS, false>(c, describe(left + i, 16), describe(right + step * SLAB + i, 16), 1);
            commit_products();
            wait_for_products<1>();
            if (step > 0 && lane == 0) arrive_at_barrier(empty + 8 * before);
            before = stage;
            if (++stage == STAGES) stage = 0, phase ^= 1;
        }
        wait_for_products<0>();
        settle(c);
        wait_at<128 * GROUPS>(1);  // all have read the tokens, where sums go now
        float* sums = (float*)tokens;
        const int row = 16 * warp + lane / 4;
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++) sums[(8 * (i / 4) + lane % 4 * 2 + i % 2) * PITCH + row + i / 2 % 2 * 8] = c[i];
        wait_at<128 * GROUPS>(1);
#pragma unroll 1
        for (int i = tid; i < TOKENS * (ROWS / 4); i += 128 * GROUPS) {
            const int t = i / (ROWS / 4), of = i % (ROWS / 4) * 4;
            const uint4 four = *(const uint4*)(sums + t * PITCH + of);
            store_in_block(t / OWN, shared_address(logits + (half * OWN + t % OWN) * E + ROWS * part + of), four, logits_here);
        }
    } else if (tid == 128 * GROUPS) {
        int stage = 0, phase = 0;
#pragma unroll 1
        for (int step = STAGES; step < STEPS; step++) {
            wait_at_barrier(empty + 8 * stage, phase);
            ask(step);
            if (++stage == STAGES) stage = 0, phase ^= 1;
        }
    }
    __syncwarp();
    wait_at_barrier(logits_here, 0);
    for (int t = warp; t < OWN && rank * OWN + t < n; t += WARPS) {
        const long long out = (long long)(first + rank * OWN + t) * (K + SHARED);
        choose(logits + t * E, gates + 4 * t, bias, weights + out, ids + out, lane, scale);
    }
}
