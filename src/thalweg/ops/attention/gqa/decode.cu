// What a gated attention layer of grouped heads does for one token of a sequence between its projections, in one launch
// for Hopper: heads of 256 dims, norms and rotation of queries and key, the new token's rows in the cache, attention
// over the cached tokens, and the gate.
//
// A cluster of SPLITS blocks serves the RATIO query heads of a key head of one sequence; each block has a part of the
// context. Its warps take tiles of 16 tokens in turn, each through a ring of its own in shared memory by bulk copies,
// so that none waits for another. The matrix unit gets tokens (or dims of values) as its 16 rows, and heads as its 8
// columns. Sums of the warps are joined in each block, those of the blocks through the cluster's shared memory.
//
// A long context is cut over up to most_parts clusters; if it is short, some have nothing to do. Each block leaves its
// cluster's sums in memory, and the one that comes last with those of its heads joins them, always in one order.
//
// Above the wait for the kernel ahead stand the loads of what the op's contract says was written before the step, keys
// and values of earlier tokens among it.
//
// Macros: RATIO, at most 8. SPLITS. HALF, half of the dims that are rotated, a multiple of 32. NORM_FLOAT, 1 if the
// norms' weights are fp32. STAGES, tiles of a warp's ring. BLOCK, tokens of a block of the cache.

#include "hopper.cuh"

constexpr int K = 256, WARPS = 4, THREADS = 32 * WARPS, TOKENS = 16, HEADS = 8;
constexpr int PITCH = 2 * K + 16;  // bytes between rows in shared memory: no bank conflicts
constexpr int TILE_BYTES = 2 * TOKENS * PITCH, RING_BYTES = STAGES * TILE_BYTES, ACC_PITCH = K + 4;
constexpr int LEAST_TILES = 2;  // of a warp of a context that is cut over clusters
constexpr int WIDE = K / 32;  // dims of a lane: lane, lane + 32 and so on

#if SPLITS > 1
#define CLUSTER __cluster_dims__(SPLITS, 1, 1)
__device__ __forceinline__ void meet_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Of the block of that rank in the cluster, at the place that `p` has here.
__device__ __forceinline__ float load_from(const float* p, int rank) {
    u32 there;
    float x;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(p)), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(there) : "memory");
    return x;
}
#else
#define CLUSTER
__device__ __forceinline__ void meet_cluster() { __syncthreads(); }
__device__ __forceinline__ float load_from(const float* p, int) { return *p; }
#endif

#if NORM_FLOAT
typedef float Weight;
__device__ __forceinline__ float weight_of(const float* p) { return *p; }
#else
typedef bf16 Weight;
__device__ __forceinline__ float weight_of(const bf16* p) { return from_bf16(*p); }
#endif

// Normed and rotated, lane l of a warp with dims l, l + 32 and so on.
__device__ __forceinline__ void prepare(float (&x)[WIDE], const Weight* weight, const float* frequencies,
                                        float position, float eps, float rope_scale, int lane) {
    float square = 0;
#pragma unroll
    for (int j = 0; j < WIDE; j++) square += x[j] * x[j];
#pragma unroll
    for (int m = 1; m < 32; m *= 2) square += __shfl_xor_sync(~0u, square, m);
    const float by = rsqrtf(square * (1.0f / K) + eps);
#pragma unroll
    for (int j = 0; j < WIDE; j++) x[j] *= by * weight_of(weight + lane + 32 * j);
#pragma unroll
    for (int j = 0; j < HALF / 32; j++) {
        const float angle = position * frequencies[lane + 32 * j], turns = rintf(angle * 0.15915494f);
        // Less whole turns, in two parts of 2 pi: what is left is small, where the fast functions are right.
        const float rest = fmaf(turns, 1.7484556e-7f, fmaf(turns, -6.2831855f, angle));
        const float c = cosf(rest) * rope_scale, s = sinf(rest) * rope_scale, a = x[j], b = x[j + HALF / 32];
        x[j] = a * c - b * s, x[j + HALF / 32] = b * c + a * s;
    }
}

extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, 1)
    decode(const bf16* proj, const Weight* q_norm, const Weight* k_norm, const float* frequencies,
           const long long* positions, bf16* keys, bf16* values, const long long* rows, const int* tables,
           const int* lens, bf16* out,
           float* parts,  // [contexts, most_parts]: sums [RATIO, K], then largest scores and their sums [RATIO, 2]
           int* arrived,  // [contexts, SPLITS]: how many parts are there; zero before and after
           long long proj_stride, long long table_stride, int G, int most_parts,
           float eps, float rope_scale, float scale) {
    const int tid = threadIdx.x, lane = tid % 32, quad = lane / 4, pair = lane % 4;
    const int warp = __shfl_sync(~0u, tid / 32, 0);  // so that the compiler knows it for the same in all lanes
    const int rank = blockIdx.x % SPLITS, cluster = blockIdx.x / SPLITS;
    const int part = cluster % most_parts, context = cluster / most_parts;
    const int g = context % G, b = context / G, H = G * RATIO;

    extern __shared__ __align__(128) u8 shared[];
    u8* const ring_s = shared + warp * RING_BYTES;
    float* const joined_s = (float*)(shared + WARPS * RING_BYTES);  // [HEADS, K]
    u8* const q_s = (u8*)(joined_s + HEADS * K);                    // [HEADS, PITCH]
    u8* const new_s = q_s + HEADS * PITCH;                          // key and value of the new token, PITCH each
    __shared__ u64 full_s[WARPS * STAGES];
    __shared__ float most_s[WARPS][HEADS], sum_s[WARPS][HEADS], joined_most_s[HEADS], joined_sum_s[HEADS];

    start_kernel_behind();
    const int n = lens[b], cached = n - 1, tiles = (n + TOKENS - 1) / TOKENS;
    const int num_parts = max(1, min(most_parts, tiles / (SPLITS * WARPS * LEAST_TILES)));
    if (part >= num_parts) {
        wait_for_kernel_ahead();
        return;
    }
    const int share = part * SPLITS + rank, shares = num_parts * SPLITS;

    const u32 full = shared_address(full_s + warp * STAGES), ring = shared_address(ring_s);
    if (lane < STAGES) {
        init_barrier(full + 8 * lane);
        share_barriers();
    }
    __syncwarp();

    const int first = (int)((long long)tiles * share / shares), last = (int)((long long)tiles * (share + 1) / shares);
    const bool has_new = share == shares - 1;
    // This warp's tiles are first + warp, and every WARPS-th behind it; a lane copies the key or the value of a token.
    int asked = first + warp, asked_place = 0;
    auto ask = [&]() {
        if (asked >= last) return;
        const int token = asked * TOKENS + lane % TOKENS, there = max(0, min(TOKENS, cached - asked * TOKENS));
        const u32 barrier = full + 8 * asked_place;
        if (lane == 0) expect_bytes(barrier, 2 * there * 2 * K);
        __syncwarp();
        const u32 to = ring + asked_place * TILE_BYTES + lane * PITCH;
        if (token < cached) {
            const long long row = (long long)tables[b * table_stride + token / BLOCK] * BLOCK + token % BLOCK;
            copy_bytes(to, (lane < TOKENS ? keys : values) + (row * G + g) * K, 2 * K, barrier);
        } else {
            u8* const row_s = ring_s + asked_place * TILE_BYTES + lane * PITCH;
            for (int j = 0; j < 2 * K; j += 16) *(uint4*)(row_s + j) = make_uint4(0, 0, 0, 0);
        }
        asked += WARPS;
        if (++asked_place == STAGES) asked_place = 0;
    };
    ask();

    wait_for_kernel_ahead();

    const bf16* const token_proj = proj + b * proj_stride;
    const float position = (float)load_id(positions + b);
    for (int i = warp; i < HEADS + has_new; i += WARPS) {
        // Queries of this key head; at HEADS the key.
        const int head = g * RATIO + i;
        const bf16* from = token_proj + (i < HEADS ? 2 * head * K : 2 * H * K + g * K) + lane;
        float x[WIDE] = {};
        if (i < RATIO || i == HEADS) {
#pragma unroll
            for (int j = 0; j < WIDE; j++) x[j] = from_bf16(load_bf16(from + 32 * j));
            prepare(x, i < HEADS ? q_norm : k_norm, frequencies, position, eps, rope_scale, lane);
        }
#pragma unroll
        for (int j = 0; j < WIDE; j++) store_bf16((bf16*)(q_s + i * PITCH) + lane + 32 * j, x[j]);
    }
    if (has_new && warp == WARPS - 1)
        *(uint4*)(new_s + PITCH + 16 * lane) = load16(token_proj + 2 * H * K + (G + g) * K + 8 * lane);
#pragma unroll 1
    for (int j = 1; j < STAGES; j++) ask();
    __syncthreads();
    if (has_new && warp < 2) {
        const long long row = load_id(rows + b);
        bf16* const to = (warp ? values : keys) + (row * G + g) * K + 8 * lane;
        *(uint4*)to = *(const uint4*)(new_s + warp * PITCH + 16 * lane);
    }

    u32 q[K / 16][2];
#pragma unroll
    for (int i = 0; i < K / 16; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) q[i][j] = *(const u32*)(q_s + quad * PITCH + 2 * (16 * i + 8 * j + 2 * pair));
    float o[K / 16][4] = {}, most[2] = {LOWEST, LOWEST}, sum[2] = {0, 0};  // of heads 2 pair and 2 pair + 1
    int place = 0;
    u32 phase = 0;
#pragma unroll 1
    for (int tile = first + warp; tile < last; tile += WARPS) {
        wait_at_barrier(full + 8 * place, phase);
        u8* const tile_s = ring_s + place * TILE_BYTES;
        const int of_new = cached - tile * TOKENS;  // the new token's place in the tile
        if (of_new < TOKENS) {
            __syncwarp();
            *(uint4*)(tile_s + of_new * PITCH + 16 * lane) = *(const uint4*)(new_s + 16 * lane);
            *(uint4*)(tile_s + (TOKENS + of_new) * PITCH + 16 * lane) = *(const uint4*)(new_s + PITCH + 16 * lane);
            __syncwarp();
        }
        const u32 at = ring + place * TILE_BYTES;
        // [8 tokens, 8 dims] four times, tokens first; and for values dims first, transposed.
        const u32 key_at = at + lane % 16 * PITCH + lane / 16 * 16;
        const u32 value_at = at + (TOKENS + lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * 16;
        float c[2][4] = {};
#pragma unroll
        for (int i = 0; i < K / 16; i++) {
            u32 a[4];
            load_matrices(a, key_at + 32 * i);
            mma(c[i % 2], a[0], a[1], a[2], a[3], q[i][0], q[i][1]);
        }
        float p[4], keep[2];
#pragma unroll
        for (int e = 0; e < 4; e++)
            p[e] = tile * TOKENS + quad + e / 2 * 8 < n ? (c[0][e] + c[1][e]) * scale : LOWEST;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float largest = fmaxf(most[h], fmaxf(p[h], p[2 + h]));
#pragma unroll
            for (int m = 4; m < 32; m *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, m));
            keep[h] = exp2f(most[h] - largest);
            most[h] = largest;
            p[h] = exp2f(p[h] - largest), p[2 + h] = exp2f(p[2 + h] - largest);
            sum[h] = sum[h] * keep[h] + p[h] + p[2 + h];
        }
        const u32 p0 = transpose_matrix(pack(p[0], p[1])), p1 = transpose_matrix(pack(p[2], p[3]));
        if (__ballot_sync(~0u, keep[0] != 1 || keep[1] != 1))
#pragma unroll
            for (int i = 0; i < K / 16; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) o[i][e] *= keep[e % 2];
#pragma unroll
        for (int i = 0; i < K / 16; i++) {
            u32 a[4];
            load_matrices_transposed(a, value_at + 32 * i);
            mma(o[i], a[0], a[1], a[2], a[3], p0, p1);
        }
        __syncwarp();
        ask();
        if (++place == STAGES) place = 0, phase ^= 1;
    }

    // All of the ring has been read. It holds the warp's sums now, by head.
    float* const acc_s = (float*)ring_s;
#pragma unroll
    for (int i = 0; i < K / 16; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc_s[(2 * pair + e % 2) * ACC_PITCH + 16 * i + quad + e / 2 * 8] = o[i][e];
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int m = 4; m < 32; m *= 2) sum[h] += __shfl_xor_sync(~0u, sum[h], m);
        if (quad == 0) most_s[warp][2 * pair + h] = most[h], sum_s[warp][2 * pair + h] = sum[h];
    }
    __syncthreads();
    {
        const int head = tid / 16;
        float largest = most_s[0][head], by[WARPS], total = 0;
#pragma unroll
        for (int w = 1; w < WARPS; w++) largest = fmaxf(largest, most_s[w][head]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            by[w] = largest == LOWEST ? 0 : exp2f(most_s[w][head] - largest);
            total += by[w] * sum_s[w][head];
        }
        if (tid % 16 == 0) joined_most_s[head] = largest, joined_sum_s[head] = total;
        if (head < RATIO)
#pragma unroll
            for (int j = 0; j < K / 64; j++) {
                const int dim = 64 * j + tid % 16 * 4;
                float4 x = make_float4(0, 0, 0, 0);
#pragma unroll
                for (int w = 0; w < WARPS; w++) {
                    const float4 y = *(const float4*)((const float*)(shared + w * RING_BYTES) + head * ACC_PITCH + dim);
                    x.x += by[w] * y.x, x.y += by[w] * y.y, x.z += by[w] * y.z, x.w += by[w] * y.w;
                }
                *(float4*)(joined_s + head * K + dim) = x;
            }
    }
    meet_cluster();

    constexpr int EACH = RATIO * K / SPLITS;  // results of this block
    const auto give = [&](int e, float x, float y, float total) {
        const int head = e / K, dim = e % K;
        const u32 gate = *(const u32*)(token_proj + (2 * (g * RATIO + head) + 1) * K + dim);
        const float by = 1.0f / fmaxf(total, 1e-30f);
        x *= by / (1.0f + __expf(-low(gate))), y *= by / (1.0f + __expf(-high(gate)));
        *(u32*)(out + ((long long)b * H + g * RATIO) * K + e) = pack(x, y);
    };
    float* const of_context = parts + (long long)context * most_parts * RATIO * (K + 2);
#pragma unroll 1
    for (int e = rank * EACH + 2 * tid; e < (rank + 1) * EACH; e += 2 * THREADS) {
        const int head = e / K;
        float largest = LOWEST, of_rank[SPLITS], x = 0, y = 0, total = 0;
#pragma unroll
        for (int s = 0; s < SPLITS; s++) largest = fmaxf(largest, of_rank[s] = load_from(joined_most_s + head, s));
#pragma unroll
        for (int s = 0; s < SPLITS; s++) {
            const float by = of_rank[s] == LOWEST ? 0 : exp2f(of_rank[s] - largest);
            total += by * load_from(joined_sum_s + head, s);
            x += by * load_from(joined_s + e, s), y += by * load_from(joined_s + e + 1, s);
        }
        if (num_parts == 1) {
            give(e, x, y, total);
        } else {
            float* const mine = of_context + part * RATIO * (K + 2);
            *(float2*)(mine + e) = make_float2(x, y);
            *(float2*)(mine + RATIO * K + 2 * head) = make_float2(largest, total);
        }
    }
    if (num_parts > 1) {
        __shared__ bool ends;
        __threadfence();
        __syncthreads();
        if (tid == 0) {
            int* const here = arrived + context * SPLITS + rank;
            ends = atomicAdd(here, 1) == num_parts - 1;
            if (ends) *here = 0;
        }
        __syncthreads();
        __threadfence();
        if (ends)
#pragma unroll 1
            for (int e = rank * EACH + 2 * tid; e < (rank + 1) * EACH; e += 2 * THREADS) {
                const int head = e / K;
                float largest = LOWEST, x = 0, y = 0, total = 0;
#pragma unroll 4
                for (int c = 0; c < num_parts; c++) {
                    const float* const theirs = of_context + c * RATIO * (K + 2);
                    const float most = load_fp32(theirs + RATIO * K + 2 * head), now = fmaxf(largest, most);
                    const float keep = exp2f(largest - now), by = exp2f(most - now);
                    total = total * keep + by * load_fp32(theirs + RATIO * K + 2 * head + 1);
                    x = x * keep + by * load_fp32(theirs + e), y = y * keep + by * load_fp32(theirs + e + 1);
                    largest = now;
                }
                give(e, x, y, total);
            }
    }
    meet_cluster();  // nobody leaves while others read
}
