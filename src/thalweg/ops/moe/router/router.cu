// Norm, router and choice in one launch for Hopper, in bf16.
//
// A cluster of 16 blocks serves up to TOKENS tokens. Each block has a sixteenth of the columns, of tokens and of all
// experts' weights. The blocks tell one another their sums of squares, norm their columns, and send what these add to a
// token's logits to the block that owns the token, all through distributed shared memory. The owner has a thread for
// each expert: experts are ranked within a warp, then the best of the warps among one another.
//
// Above the wait for the kernel ahead stand the loads of weights. What comes of a token does not depend on the others.
//
// A block's part of the weights comes in PARTS: if it is more than shared memory has room for, the first half of the
// columns goes on to registers, and the second takes its place, both above the wait.
//
// A gate of the shared experts is one more row of the weights. The warp that norms a token multiplies it, as it has the
// token in registers.
//
// With FOR_EXPERTS, of 128 columns for each block, tokens also go to float8 (e4m3), over a scale for these columns, and
// (token, expert) pairs to lists of their experts, the last expert first, in no order.
//
// Macros: E, D and K as in the op's contract; SHARED experts behind the chosen ones; GATED, whether these have a gate;
// SOFTMAX and RENORMALIZE, 0 or 1; NORM_FLOAT, whether the norm's weight is fp32; TOKENS of a cluster, 8 or 16; PARTS, 1
// or 2; GROUPS of experts, 1 or as many as warps, of which the best TOP_GROUPS compete; FOR_EXPERTS.

#include "hopper.cuh"
#include "choice.cuh"

constexpr int BLOCKS = 16, WARPS = E / 32;
constexpr int COLUMNS = D / BLOCKS, VECTORS = COLUMNS / 8;  // of a block; VECTORS have 16 bytes
constexpr int STEPS = COLUMNS / 16 / PARTS;                 // of a part
// Between rows in shared memory, of tokens and of a part of the weights: no bank conflicts.
constexpr int ROW = COLUMNS + (COLUMNS / 16 % 2 ? 0 : 16), W_ROW = 16 * (STEPS + (STEPS % 2 ? 0 : 1));
constexpr int OF_LANE = (VECTORS + 31) / 32;
constexpr int MINE = (TOKENS + WARPS - 1) / WARPS;   // tokens that a warp norms
constexpr int TILES = TOKENS / 8;
constexpr int LIST = (K + 3) / 4 * 4;
static_assert(!FOR_EXPERTS || COLUMNS == 128, "a scale is of 128 columns");
static_assert(GROUPS == 1 || GROUPS == WARPS, "a warp ranks the experts of a group");

__device__ __forceinline__ void unpack_norm(float (&to)[8], const uint4 (&from)[1 + NORM_FLOAT]) {
    if (NORM_FLOAT) {
        const uint4 a = from[0], b = from[NORM_FLOAT];
        const u32 bits[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int e = 0; e < 8; e++) to[e] = __uint_as_float(bits[e]);
    } else {
        unpack(to, from[0]);
    }
}
// From shared memory, and not later than written here.
__device__ __forceinline__ uint2 load8(const bf16* p) {
    uint2 x;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(x.x), "=r"(x.y)
                 : "r"(shared_address(p))
                 : "memory");
    return x;
}
// A barrier that opens once; publish_barriers then lets copies and other blocks see it.
__device__ __forceinline__ void expect(u64* barrier, u32 bytes) {
    const u32 at = shared_address(barrier);
    init_barrier(at);
    expect_bytes(at, bytes);
}
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// As wait_at_barrier, with the phase known.
__device__ __forceinline__ void wait_for(u64* barrier) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "AGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n@!done bra AGAIN;\n}" ::"r"(
            shared_address(barrier))
        : "memory");
}

__device__ __forceinline__ void copy(bf16* to, const bf16* from, u32 bytes, u64* barrier) {
    copy_bytes(shared_address(to), from, bytes, shared_address(barrier));
}

__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// Where in another block of the cluster p is in this one.
__device__ __forceinline__ u32 in_block(int block, const void* p) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(p)), "r"(block));
    return there;
}
// Stores in another block, whose barrier counts the bytes.
__device__ __forceinline__ void send(int block, u64* barrier, float* to, float x) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(in_block(block, to)),
        "f"(x), "r"(in_block(block, barrier))
        : "memory");
}
__device__ __forceinline__ void send4(int block, u64* barrier, float* to, float4 x) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
            in_block(block, to)),
        "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(in_block(block, barrier))
        : "memory");
}

extern "C" __global__ void __cluster_dims__(BLOCKS) __launch_bounds__(E)
    norm_router(const bf16* x, const u8* norm_weight, const bf16* w, const float* bias, bf16* normed, float* weights,
                long long* ids, long long x_stride, int T, float eps, float scale
#if FOR_EXPERTS
                , u8* narrow, float* narrow_scales,  // [T, D], [T, BLOCKS]
                int* counts, int* lists              // [E + SHARED], zero before; [E + SHARED, T]
#endif
    ) {
    const int tid = threadIdx.x, lane = tid % 32, quad = lane / 4, pair = lane % 4;
    const int warp = __shfl_sync(~0u, tid / 32, 0);  // so that the compiler knows it for the same in all lanes
    const int rank = blockIdx.x % BLOCKS, first = blockIdx.x / BLOCKS * TOKENS, n = min(TOKENS, T - first);

    extern __shared__ __align__(128) unsigned char shared[];
    float* logits = (float*)shared;            // [BLOCKS, E], what each block adds to them
    bf16* n_s = (bf16*)(logits + BLOCKS * E);  // [TOKENS, ROW]
    bf16* w_s = n_s + TOKENS * ROW;            // [E, W_ROW]
    __shared__ __align__(16) float squares[TOKENS][BLOCKS], gates[BLOCKS];
    __shared__ __align__(16) int keys[E], list_key[WARPS][LIST];
    __shared__ int list_id[WARPS][LIST], chosen_id[K];
    __shared__ float list_score[WARPS][LIST], chosen_score[K];
    __shared__ u64 squares_here, logits_here, weights_here[WARPS];

    if (tid == 0) {
        expect(&squares_here, 4 * BLOCKS * n);
        expect(&logits_here, 4 * BLOCKS * (E + GATED));
        publish_barriers();
    }
    cluster_arrive();
    // A warp takes the products of 32 experts. Its matrix instructions give a lane 4 rows: those are 4 neighbours among
    // the experts, so that their logits go out at once, and so row i of shared memory is not expert i.
    if (lane == 0) {
        expect(weights_here + warp, 32 * 2 * 16 * STEPS);
        publish_barriers();
    }
    __syncwarp();
    const int row = 32 * warp + lane / 4 + lane % 2 * 8 + lane / 2 % 2 * 16;
    const bf16* w_from = w + (long long)tid * D + rank * COLUMNS;
    copy(w_s + row * W_ROW, w_from, 2 * 16 * STEPS, weights_here + warp);
    const int column = rank * COLUMNS + 8 * lane;
    const uint4 none = make_uint4(0, 0, 0, 0);
    constexpr int NORM_WORDS = 1 + NORM_FLOAT;  // of 16 bytes, to 8 columns
    uint4 norm_weight8[OF_LANE][NORM_WORDS], gate8[OF_LANE];
#pragma unroll
    for (int v = 0; v < OF_LANE; v++) {
        const bool is = lane + 32 * v < VECTORS;
#pragma unroll
        for (int i = 0; i < NORM_WORDS; i++)
            norm_weight8[v][i] = is ? load16(norm_weight + (column + 256 * v) * 2 * NORM_WORDS + 16 * i) : none;
        if (GATED) gate8[v] = is ? load16(w + (long long)E * D + column + 256 * v) : none;
    }
    const float shift = bias[tid];

    // Operands of the products.
    uint2 a[STEPS][4];
    auto load_step = [&](uint2(&to)[4], int c) {
#pragma unroll
        for (int j = 0; j < 4; j++) to[j] = load8(w_s + (32 * warp + 8 * j + quad) * W_ROW + 16 * c + 4 * pair);
    };
    if (PARTS == 2) {
        wait_for(weights_here + warp);
#pragma unroll
        for (int c = 0; c < STEPS; c++) load_step(a[c], c);
        __syncwarp();  // all have read
        if (lane == 0) expect_bytes(shared_address(weights_here + warp), 32 * 2 * 16 * STEPS);
        __syncwarp();
        copy(w_s + row * W_ROW, w_from + 16 * STEPS, 2 * 16 * STEPS, weights_here + warp);
    }

    wait_for_kernel_ahead();
    // Not earlier: experts then ask for the shared ones' weights, and all that is above came behind those.
    start_kernel_behind();

    // The norm. A warp takes tokens warp, warp + WARPS and so on.
    uint4 x8[MINE][OF_LANE];
#pragma unroll
    for (int i = 0; i < MINE; i++)
#pragma unroll
        for (int v = 0; v < OF_LANE; v++) {
            const int t = warp + i * WARPS;
            const bool is = lane + 32 * v < VECTORS && t < n;
            x8[i][v] = is ? load16(x + (first + t) * x_stride + column + 256 * v) : none;
        }
    cluster_wait();  // for all blocks' barriers
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        const int t = warp + i * WARPS;
        float square = 0;
#pragma unroll
        for (int v = 0; v < OF_LANE; v++) {
            float y[8];
            unpack(y, x8[i][v]);
#pragma unroll
            for (int e = 0; e < 8; e++) square += y[e] * y[e];
        }
#pragma unroll
        for (int m = 1; m < 32; m *= 2) square += __shfl_xor_sync(~0u, square, m);
        if (t < n && lane < BLOCKS) send(lane, &squares_here, &squares[t][rank], square);
    }
    if (PARTS == 1) {  // while the squares are on their way
        wait_for(weights_here + warp);
#pragma unroll
        for (int c = 0; c < STEPS; c++) load_step(a[c], c);
    }
    wait_for(&squares_here);
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        const int t = warp + i * WARPS;
        if (t >= n) break;
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int b = 0; b < BLOCKS; b += 4) {
            const float4 four = *(float4*)&squares[t][b];
            sum.x += four.x, sum.y += four.y, sum.z += four.z, sum.w += four.w;
        }
        const float r = rsqrtf(((sum.x + sum.y) + (sum.z + sum.w)) * (1.0f / D) + eps);
        float gate = 0;
#pragma unroll
        for (int v = 0; v < OF_LANE; v++) {
            float y[8], weight[8];
            unpack(y, x8[i][v]);
            unpack_norm(weight, norm_weight8[v]);
#pragma unroll
            for (int e = 0; e < 8; e++) y[e] = y[e] * r * weight[e];
            if (lane + 32 * v < VECTORS) {
                const uint4 n8 = make_uint4(pack(y[0], y[1]), pack(y[2], y[3]), pack(y[4], y[5]), pack(y[6], y[7]));
                *(uint4*)(n_s + t * ROW + 8 * lane + 256 * v) = n8;
                *(uint4*)(normed + (long long)(first + t) * D + column + 256 * v) = n8;
#if FOR_EXPERTS
                unpack(y, n8);
                float largest = 0;
#pragma unroll
                for (int e = 0; e < 8; e++) largest = fmaxf(largest, fabsf(y[e]));
#pragma unroll
                for (int m = 1; m < VECTORS; m *= 2) largest = fmaxf(largest, __shfl_xor_sync((1u << VECTORS) - 1, largest, m));
                const float over = fmaxf(largest, FLOAT8_SMALLEST) / FLOAT8_LARGEST;
                *(uint2*)(narrow + (long long)(first + t) * D + column) =
                    make_uint2(to_float8(y[0] / over, y[1] / over) | to_float8(y[2] / over, y[3] / over) << 16,
                               to_float8(y[4] / over, y[5] / over) | to_float8(y[6] / over, y[7] / over) << 16);
                if (lane == 0) narrow_scales[(first + t) * BLOCKS + rank] = over;
#endif
                if (GATED) {
                    unpack(y, n8);
                    unpack(weight, gate8[v]);
#pragma unroll
                    for (int e = 0; e < 8; e++) gate += y[e] * weight[e];
                }
            }
        }
        if (GATED) {
#pragma unroll
            for (int m = 1; m < 32; m *= 2) gate += __shfl_xor_sync(~0u, gate, m);
            if (lane == 0) send(t, &logits_here, &gates[rank], gate);
        }
    }
    __syncthreads();

    // Products. A lane's 4 neighbours among the columns stand for two pairs of one product: their order is the matrix
    // unit's to choose, as long as weights and tokens share it. What is no token repeats the last one.
    float acc[2][TILES][2][4] = {};  // even and odd steps: a matrix instruction does not wait for the last
    auto multiply = [&](const uint2(&w4)[4], int c) {
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            const uint2 b = *(uint2*)(n_s + min(8 * t + quad, n - 1) * ROW + 16 * c + 4 * pair);
            mma(acc[c % 2][t][0], w4[0].x, w4[1].x, w4[0].y, w4[1].y, b.x, b.y);
            mma(acc[c % 2][t][1], w4[2].x, w4[3].x, w4[2].y, w4[3].y, b.x, b.y);
        }
    };
#pragma unroll
    for (int c = 0; c < STEPS; c++) multiply(a[c], c);
    if (PARTS == 2) {
        wait_at_barrier(shared_address(weights_here + warp), 1);
#pragma unroll
        for (int c = 0; c < STEPS; c++) {
            uint2 w4[4];
            load_step(w4, c);
            multiply(w4, STEPS + c);
        }
    }
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            auto sum = [&](int j) { return acc[0][t][j / 2][j % 2 * 2 + e] + acc[1][t][j / 2][j % 2 * 2 + e]; };
            const int owner = 8 * t + 2 * pair + e;
            const float4 four = make_float4(sum(0), sum(1), sum(2), sum(3));
            if (owner < n) send4(owner, &logits_here, logits + rank * E + 32 * warp + 4 * quad, four);
        }
    if (rank >= n) return;

    // The choice of token `rank`.
    wait_for(&logits_here);
    float sum[4] = {};
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) sum[b % 4] += logits[b * E + tid];
    const float logit = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    float score = 1.0f / (1.0f + __expf(-logit));
    if (SOFTMAX) {
        float most = logit, total = 0;
        logits[tid] = logit;  // only this thread has read it
        __syncthreads();
        for (int i = lane; i < E; i += 32) most = fmaxf(most, logits[i]);
#pragma unroll
        for (int m = 1; m < 32; m *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, m));
        for (int i = lane; i < E; i += 32) total += __expf(logits[i] - most);
#pragma unroll
        for (int m = 1; m < 32; m *= 2) total += __shfl_xor_sync(~0u, total, m);
        score = __expf(logit - most) / total;
    }
    // The place among the warp's. Of equals the lower id comes first.
    int key = order(score + shift);
    keys[tid] = key;
    __syncwarp();
    int above[4] = {};
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
        const int4 four = *(int4*)&keys[32 * warp + i];
        above[0] += four.x > key, above[1] += four.y > key, above[2] += four.z > key, above[3] += four.w > key;
    }
    int place = (above[0] + above[1]) + (above[2] + above[3]);
    if (__reduce_add_sync(~0u, place) != 31 * 16)  // less than 0 + 1 + ... + 31: some are equal
#pragma unroll 1
        for (int i = 0; i < lane; i++) place += keys[32 * warp + i] == key;
    if (GROUPS > 1) {  // by the two best of each; of equals the first
        __shared__ float best[WARPS][2];
        if (place < 2) best[warp][place] = score + shift;
        __syncthreads();
        const float mine = best[warp][0] + best[warp][1];
        int above = 0;
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            const float other = best[g][0] + best[g][1];
            above += other > mine || (other == mine && g < warp);
        }
        if (above >= TOP_GROUPS) key = order(-__int_as_float(0x7f800000));
    }
    if (place < K) list_key[warp][place] = key, list_score[warp][place] = score, list_id[warp][place] = tid;
    if (lane < LIST - K) list_key[warp][K + lane] = LOWEST_KEY;
    __syncthreads();
    // The place among all, which 4 lanes find together.
#pragma unroll
    for (int i = 0; i < WARPS * K; i += 8 * WARPS) {
        const int c = i + tid / 4, list = min(c / K, WARPS - 1), at = c % K, mine = list_key[list][at];
        int place = 0;
#pragma unroll
        for (int j = 0; j < WARPS; j += 4) {
            const int other = j + tid % 4;
            if (other >= WARPS) break;
            const int least = mine - (other < list);
            int above[4] = {};
#pragma unroll
            for (int k = 0; k < LIST; k += 4) {
                const int4 four = *(int4*)&list_key[other][k];
                above[0] += four.x > least, above[1] += four.y > least;
                above[2] += four.z > least, above[3] += four.w > least;
            }
            place += other == list ? at : (above[0] + above[1]) + (above[2] + above[3]);
        }
        place += __shfl_xor_sync(~0u, place, 1);
        place += __shfl_xor_sync(~0u, place, 2);
        if (tid % 4 == 0 && c < WARPS * K && place < K)
            chosen_id[place] = list_id[list][at], chosen_score[place] = list_score[list][at];
    }
    __syncthreads();
    if (tid < K + SHARED) {
        float total = 0;
#pragma unroll
        for (int j = 0; j < K; j++) total += chosen_score[j];
        const float divisor = RENORMALIZE ? total + 1e-20f : 1.0f;
        const long long out = (long long)(first + rank) * (K + SHARED) + tid;
        float shared_weight = 1;
        if (GATED) {
            float gate[4] = {};
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) gate[b % 4] += gates[b];
            shared_weight = 1.0f / (1.0f + __expf(-((gate[0] + gate[1]) + (gate[2] + gate[3]))));
        }
        weights[out] = tid < K ? chosen_score[tid] / divisor * scale : shared_weight;
        const int id = tid < K ? chosen_id[tid] : E - K + tid;
        ids[out] = id;
#if FOR_EXPERTS
        const int list = E + SHARED - 1 - id;
        const int place = atomicAdd(counts + list, 1);
        if (place < T) lists[list * T + place] = (int)out;  // or the counts were not 0
#endif
    }
}
