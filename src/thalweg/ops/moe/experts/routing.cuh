// Norm and choice of experts of one token within their first product: each block multiplies a few of the router's rows,
// tells the others the logits, and chooses by itself, while the own expert's weights stream.

#include "choice.cuh"

constexpr int ROUTED_ROWS = 3;  // of the router, that a block has: its blocks have all
constexpr int MEET = 10, MULTIPLIED = 11;  // barriers by number

struct Routing {
    const bf16* norm_weight;
    const bf16* router;   // [E, COLS]
    const float* bias;    // [E]
    u32* told;            // [E, 2] logits and the launch that told them; behind them, by block, the number of the last launch
    float* weights;       // [K]
    long long* ids;       // [K]
    float eps, scale;
};
template <int WARPS> struct Routed {
    float squares[32], sums[ROUTED_ROWS][32], scores[16];
};

// Columns of a lane: 8 of each 256 of its warp's.
template <int VECTORS> struct Portion {
    uint4 rows[ROUTED_ROWS][VECTORS], norm[VECTORS], x[VECTORS];
    __device__ __forceinline__ static int column(int warp, int v) { return (warp * VECTORS + v) * 256 + threadIdx.x % 32 * 8; }
    __device__ __forceinline__ void ask(const Routing& from, int block, int warp, int columns, int experts) {
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
#pragma unroll
            for (int i = 0; i < ROUTED_ROWS; i++)
                rows[i][v] = load16(from.router + (long long)min(block * ROUTED_ROWS + i, experts - 1) * columns + column(warp, v));
            norm[v] = load16(from.norm_weight + column(warp, v));
        }
    }
    template <int WARPS, int COLUMNS>
    __device__ __forceinline__ void norm_and_multiply(const Routing& from, Routed<WARPS>& routed, const bf16* token, int warp) {
        const int lane = threadIdx.x % 32;
        float y[8], by[8], square = 0, sum[ROUTED_ROWS] = {};
#pragma unroll
        for (int v = 0; v < VECTORS; v++) x[v] = load16(token + column(warp, v));
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            unpack(y, x[v]);
#pragma unroll
            for (int e = 0; e < 8; e++) square += y[e] * y[e];
        }
        square = sum_of_lanes(square);
        if (lane == 0) routed.squares[warp] = square;
        wait_at<32 * WARPS>(MEET);
        const float r = rsqrtf(sum_of_lanes(lane < WARPS ? routed.squares[lane] : 0.0f) * (1.0f / COLUMNS) + from.eps);
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            unpack(y, x[v]);
            unpack(by, norm[v]);
#pragma unroll
            for (int e = 0; e < 8; e++) y[e] = y[e] * r * by[e];
            x[v] = make_uint4(pack(y[0], y[1]), pack(y[2], y[3]), pack(y[4], y[5]), pack(y[6], y[7]));
            unpack(y, x[v]);
#pragma unroll
            for (int i = 0; i < ROUTED_ROWS; i++) {
                unpack(by, rows[i][v]);
#pragma unroll
                for (int e = 0; e < 8; e++) sum[i] += y[e] * by[e];
            }
        }
#pragma unroll
        for (int i = 0; i < ROUTED_ROWS; i++) {
            sum[i] = sum_of_lanes(sum[i]);
            if (lane == 0) routed.sums[i][warp] = sum[i];
        }
        arrive_at<32 * (WARPS + 1)>(MULTIPLIED);
    }
};

// By one warp: the CHOSEN experts of the token, best first, to `experts` in shared memory and, of one block, to memory,
// where BEHIND shared ones follow.
template <int EXPERTS, int CHOSEN, int BEHIND, int WARPS, class Id>
__device__ __forceinline__ void route(const Routing& to, Routed<WARPS>& routed, int block, Id* experts) {
    constexpr int KEYS = EXPERTS / 32;
    const int lane = threadIdx.x % 32;
    u32* last = to.told + 2 * (EXPERTS + block);
    const u32 launch = ask_blocks(last).x + 1;
    float shift[KEYS], score[KEYS];
    int key[KEYS];
#pragma unroll
    for (int i = 0; i < KEYS; i++) shift[i] = load_fp32(to.bias + 32 * i + lane);
    wait_at<32 * (WARPS + 1)>(MULTIPLIED);
#pragma unroll
    for (int i = 0; i < ROUTED_ROWS; i++) {
        const float logit = sum_of_lanes(lane < WARPS ? routed.sums[i][lane] : 0.0f);
        if (lane == i && block * ROUTED_ROWS + i < EXPERTS)
            tell_blocks(to.told + 2 * (block * ROUTED_ROWS + i), __float_as_uint(logit), launch);
    }
    bool all;
    do {
        all = true;
        uint2 told[KEYS];
#pragma unroll
        for (int i = 0; i < KEYS; i++) told[i] = ask_blocks(to.told + 2 * (32 * i + lane));
#pragma unroll
        for (int i = 0; i < KEYS; i++) all = all && told[i].y == launch, score[i] = __uint_as_float(told[i].x);
    } while (!__all_sync(~0u, all));
    if (lane == 0) tell_blocks(last, launch, 0);
#pragma unroll
    for (int i = 0; i < KEYS; i++) score[i] = 1.0f / (1.0f + __expf(-score[i])), key[i] = order(score[i] + shift[i]);
    choose_experts<CHOSEN>(key, [&](int k, int i, int id) { routed.scores[k] = score[i], experts[k] = (Id)id; });
    __syncwarp();
    if (block == 0) {
        float sum = 0;
#pragma unroll
        for (int k = 0; k < CHOSEN; k++) sum += routed.scores[k];
        if (lane < CHOSEN + BEHIND) {
            to.weights[lane] = lane < CHOSEN ? routed.scores[lane] / (sum + 1e-20f) * to.scale : 1.0f;
            to.ids[lane] = lane < CHOSEN ? experts[lane] : EXPERTS - CHOSEN + lane;
        }
        __threadfence();
        __syncwarp();
    }
}
