// y = x w^T for some tokens, up to 128, both in float8 (e4m3): w with a scale for each row and 128 columns, x with one for
// each token. Bound by streaming w once. With ADD a residual is added.
//
// A block has `rows` rows of w, at most 64 GROUPS, which are the left operand of the matrix unit, 64 to a warpgroup;
// tokens are its columns. If rows are fewer, warpgroups share out the steps of 128 columns. One thread asks for w and x by
// tensor map, into a ring in shared memory, for w before the wait for the kernel ahead. Sums over 128 columns take the
// weights' scales, and in the end their token's. SPLIT blocks, a cluster, share out the columns of their tile, so that each
// reads as much less of x; sums are then added up by distributed shared memory, in one order.
//
// With X_BLOCKS x has a scale for each 128 columns of a token, [columns / 128, T and some], which those sums take as well.
//
// Blocks behind those have 16 rows each of a rest below w, in bf16, for some of the tokens, by x as it was before it went
// to float8.
//
// Macros: UNITS of 16 tokens; GROUPS of 4 warps that multiply; SPLIT, 1 or 2; ADD; X_BLOCKS; REST, whether there is one,
// of SPLIT 1, and then NORM, 2 for a weight in fp32.

#include "hopper.cuh"
#include "matrix_unit.cuh"

constexpr int TOKENS = 16 * UNITS, MAX_STAGES = 24;
constexpr int WARPS = 4 * GROUPS, MULTIPLIERS = 32 * WARPS, THREADS = MULTIPLIERS + 32;

#if REST
#include "some_rest.cuh"
#endif

extern "C" __global__ void __cluster_dims__(SPLIT, 1, 1) __launch_bounds__(THREADS, 1)
    some_tokens(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const float* scales,
                const float* x_scales, const bf16* residual, bf16* y, long long residual_stride, long long y_stride, int T,
                int O,
                int rows,      // of a tile, a multiple of 8
                int steps,     // of 128 columns, of this block
                int x_pitch,   // of X_BLOCKS: floats between scales of neighbouring columns, a multiple of 4
                int stages  // of the ring: all steps, or a multiple of the warpgroups that share them out: each has its own
#if REST
                , const bf16* rest, const bf16* unquantized, const u8* norm_weight, long long x_stride, int rest_rows,
                int rest_tokens,  // of a block
                float eps
#endif
    ) {
    extern __shared__ __align__(1024) u8 shared[];
#if REST
    if (const int block = blockIdx.x - (O + rows - 1) / rows; block >= 0) {
        const int D = 128 * steps, many = (T + rest_tokens - 1) / rest_tokens;
        const int row = block / many * 16, t = block % many * rest_tokens;
        multiply_rest(unquantized + t * x_stride, x_stride, norm_weight, rest + (long long)row * D,
                      y + t * y_stride + O + row, y_stride, min(rest_tokens, T - t), D, min(16, rest_rows - row), eps, shared);
        return;
    }
#endif
    const int tid = threadIdx.x, lane = tid % 32, warp = __shfl_sync(~0u, tid / 32, 0);
    const int groups = (rows + 63) / 64, phases = GROUPS / groups;  // of warps that share rows, and steps
    const int w_bytes = rows * 128, stage_bytes = w_bytes + TOKENS * 128, pitch = (rows + 15) / 16 * 16 + 4;
    const int rank = SPLIT > 1 ? blockIdx.x % SPLIT : 0, first = blockIdx.x / SPLIT * rows, from = rank * steps;
    // The ring (products may read behind a stage, not behind all), where sums go in the end; barriers, scales of w and x.
    const int ring_bytes = max(stages * stage_bytes, phases * TOKENS * pitch * 4);
    const u32 ring = shared_address(shared), full = ring + ring_bytes, empty = full + 8 * MAX_STAGES;
    float* w_scales_s = (float*)(shared + ring_bytes + 16 * MAX_STAGES);  // [steps, rows]
    float* x_scales_s = w_scales_s + steps * rows;  // [TOKENS], or of X_BLOCKS [stages, TOKENS]
    auto ask_for_w = [&](int k) {  // and expect x
        const int stage = k % stages;
        expect_bytes(full + 8 * stage, stage_bytes + (X_BLOCKS ? 4 * x_pitch : 0));
        copy_tile(ring + stage * stage_bytes, &w, (from + k) * 64, 0, first, full + 8 * stage);
    };
    auto ask_for_x = [&](int k) {
        const int stage = k % stages;
        copy_tile(ring + stage * stage_bytes + w_bytes, &x, (from + k) * 64, 0, 0, full + 8 * stage);
        if (X_BLOCKS)
            copy_bytes(shared_address(x_scales_s + stage * TOKENS), x_scales + (from + k) * x_pitch, 4 * x_pitch, full + 8 * stage);
    };
    if (tid == MULTIPLIERS) {
        for (int i = 0; i < stages; i++) init_barrier(full + 8 * i), init_barrier(empty + 8 * i, 4 * groups);
        share_barriers();
#pragma unroll 1
        for (int k = 0; k < min(stages, steps); k++) ask_for_w(k);
    }
    for (int i = tid; i < rows * steps; i += THREADS)
        w_scales_s[i % steps * rows + i / steps] =
            first + i / steps < O ? scales[(long long)(first + i / steps) * (SPLIT * steps) + from + i % steps] : 0;
    __syncthreads();
    wait_for_kernel_ahead();
    if (tid >= MULTIPLIERS) {
        if (tid == MULTIPLIERS) {
#pragma unroll 1
            for (int k = 0; k < min(stages, steps); k++) ask_for_x(k);
#pragma unroll 1
            for (int k = stages; k < steps; k++) {
                wait_at_barrier(empty + 8 * (k % stages), (k / stages - 1) & 1);
                ask_for_w(k);
                ask_for_x(k);
            }
            start_kernel_behind();
        }
        __syncwarp();
    } else {
        for (int t = tid; !X_BLOCKS && t < T; t += MULTIPLIERS) x_scales_s[t] = load_fp32(x_scales + t);
        const int group = warp / 4 % groups, mine = warp / 4 / groups;
        const int row = 64 * group + 16 * (warp % 4) + lane / 4, column = lane % 4 * 2;
        // Products of 128 columns are over before their sums take the weights' scales: other warpgroups' are under way.
        float sum[8 * UNITS] = {};
#pragma unroll 1
        for (int k = mine; mine < phases && k < steps; k += phases) {
            float c[8 * UNITS];
            const int stage = k % stages;
            const u32 left = ring + stage * stage_bytes + group * 64 * 128, right = ring + stage * stage_bytes + w_bytes;
            wait_at_barrier(full + 8 * stage, k / stages & 1);
            begin_products();
#pragma unroll
            for (int i = 0; i < 128; i += 32) multiply<UNITS, true>(c, describe(left + i, 16), describe(right + i, 16), i);
            commit_products();
            const float* by = w_scales_s + k * rows + row;
            const float scale[2] = {row < rows ? by[0] : 0, row + 8 < rows ? by[8] : 0};
            wait_for_products<0>();
            settle(c);
            if (!X_BLOCKS && lane == 0) arrive_at_barrier(empty + 8 * stage);
#pragma unroll
            for (int i = 0; i < 8 * UNITS; i += 4) {
                float2 x_scale = make_float2(1, 1);
                if (X_BLOCKS) x_scale = *(const float2*)(x_scales_s + stage * TOKENS + 2 * i + column);
#pragma unroll
                for (int e = 0; e < 4; e++) sum[i + e] += c[i + e] * (scale[e / 2] * (e % 2 ? x_scale.y : x_scale.x));
            }
            if (X_BLOCKS) __syncwarp();
            if (X_BLOCKS && lane == 0) arrive_at_barrier(empty + 8 * stage);
        }
        // Sum 4 j + 2 h + e of a thread: of row `row` + 8 h, and token 8 j + `column` + e. They go where the ring is.
        wait_at<MULTIPLIERS>(1);
        float* to = (float*)shared + mine * TOKENS * pitch + row;
        if (mine < phases)
#pragma unroll
            for (int i = 0; i < 8 * UNITS; i++) {
                const int t = 8 * (i / 4) + column + i % 2;
                if (t < T && row + i / 2 % 2 * 8 < rows)
                    to[t * pitch + i / 2 % 2 * 8] = X_BLOCKS ? sum[i] : sum[i] * x_scales_s[t];
            }
    }
    if (SPLIT > 1)
        wait_for_cluster();
    else
        __syncthreads();
    const int eights = rows / 8;
    for (int i = rank * THREADS + tid; i < T * eights; i += SPLIT * THREADS) {
        const int t = i / eights, place = first + i % eights * 8;
        if (place >= O) continue;
        float4 a = make_float4(0, 0, 0, 0), b = a;
#pragma unroll
        for (int block = 0; block < SPLIT; block++)
            for (int part = 0; part < phases; part++) {
                const u32 at = ((part * TOKENS + t) * pitch + i % eights * 8) * 4;
                float4 p, q;
                if (SPLIT > 1)
                    p = load_of_block(block, ring + at), q = load_of_block(block, ring + at + 16);
                else
                    p = *(const float4*)(shared + at), q = *(const float4*)(shared + at + 16);
                a.x += p.x, a.y += p.y, a.z += p.z, a.w += p.w;
                b.x += q.x, b.y += q.y, b.z += q.z, b.w += q.w;
            }
        if (ADD) {
            const uint4 r = load16(residual + t * residual_stride + place);
            a.x += low(r.x), a.y += high(r.x), a.z += low(r.y), a.w += high(r.y);
            b.x += low(r.z), b.y += high(r.z), b.z += low(r.w), b.w += high(r.w);
        }
        *(uint4*)(y + t * y_stride + place) = make_uint4(pack(a.x, a.y), pack(a.z, a.w), pack(b.x, b.y), pack(b.z, b.w));
    }
    if (SPLIT > 1) wait_for_cluster();  // before it ends, the other may still read
}
