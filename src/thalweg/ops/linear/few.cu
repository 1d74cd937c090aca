// y = x w^T for a few tokens, bound by streaming w once. With NORM x is RMS-normalised first, with ADD a residual is
// added.
//
// One block a multiprocessor takes its share of the rows of w, and streams them through a ring of tiles in shared
// memory by bulk copies, which begin before the wait for the kernel ahead: weights are older than it. Its warps share
// out the columns and keep theirs of x in registers, as the matrix unit takes them. A sum has no order, so a thread's 8
// consecutive columns may stand where the instruction expects others, for x and w alike. Partial sums of the warps meet
// in shared memory, and are added in their order.
//
// Macros: D columns, a multiple of 32; TOKENS at most, 8, 16 or 32; ROWS of a tile at most, a multiple of 8; NORM; ADD.

#include "hopper.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS, MAX_STAGES = 16;
constexpr int PITCH = D * 2 + (D % 64 ? 0 : 64);  // bytes between rows in shared memory: no bank conflicts
constexpr int CHUNKS = D / 32, MINE = (CHUNKS + WARPS - 1) / WARPS;  // of 32 columns: all, and a warp's at most
constexpr int HALVES = TOKENS / 8, GROUPS = (HALVES + 1) / 2;  // of the 16 tokens that the matrix unit takes
constexpr int TILE = TOKENS * ROWS, EACH = (TILE + THREADS - 1) / THREADS;  // sums of a tile: all, and a thread's

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    few_tokens(const bf16* x, const bf16* norm_weight, const bf16* w, const bf16* residual, bf16* y,
               long long x_stride, long long w_stride, long long residual_stride, int T, int O, int tile_rows,
               int stages, float eps) {
    const int tid = threadIdx.x, lane = tid % 32, quad = lane / 4, pair = lane % 4;
    const int warp = __shfl_sync(~0u, tid / 32, 0);  // so that the compiler knows it for the same in all lanes
    const int first = (int)((long long)O * blockIdx.x / gridDim.x);
    const int count = (int)((long long)O * (blockIdx.x + 1) / gridDim.x) - first;
    const int tiles = (count + tile_rows - 1) / tile_rows;

    extern __shared__ __align__(128) unsigned char shared[];  // the ring, then partial sums of two tiles
    float* partial_s = (float*)(shared + stages * tile_rows * PITCH);
    __shared__ unsigned long long full_s[MAX_STAGES];
    __shared__ float squares_s[WARPS][TOKENS];

    const u32 full = shared_address(full_s);
    if (tid < stages) {
        init_barrier(full + 8 * tid);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncwarp();
    // The tiles before `end`, as far as they have not been asked for. When all have, the next kernel may start.
    int asked = 0;
    auto ask = [&](int end) {
#pragma unroll 1
        for (; asked < min(end, tiles); asked++)
            if (warp == 0) {
                const int place = asked % stages, rows = min(tile_rows, count - asked * tile_rows);
                const u32 to = shared_address(shared) + place * tile_rows * PITCH, barrier = full + 8 * place;
                const bf16* from = w + (first + asked * tile_rows) * w_stride;
                if (lane == 0) expect_bytes(barrier, rows * D * 2);
                __syncwarp();
                if (lane < rows) copy_bytes(to + lane * PITCH, from + lane * w_stride, D * 2, barrier);
            }
        if (asked == tiles) start_kernel_behind();
    };
    auto columns = [&](int i) { return 32 * (warp + WARPS * i) + 8 * pair; };  // of this thread's chunk i
    auto mine = [&](int i) { return WARPS * (i + 1) <= CHUNKS || warp + WARPS * i < CHUNKS; };

    uint4 scale[NORM ? MINE : 1];
    if (NORM)
#pragma unroll
        for (int i = 0; i < MINE; i++)
            if (mine(i)) scale[i] = load16(norm_weight + columns(i));
    ask(max(1, stages - 1));
    __syncthreads();

    wait_for_kernel_ahead();

    uint4 v[HALVES][MINE];
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            v[h][i] = make_uint4(0, 0, 0, 0);
            if (8 * h + quad < T && mine(i)) v[h][i] = load16(x + (8 * h + quad) * x_stride + columns(i));
        }
    ask(stages);  // what a multiprocessor asks for comes in the order it asked: x goes before the last of the ring

    if (NORM) {
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            if (8 * h >= T) break;
            float square = 0;
#pragma unroll
            for (int i = 0; i < MINE; i++)
                if (mine(i)) {
                    const u32 two[4] = {v[h][i].x, v[h][i].y, v[h][i].z, v[h][i].w};
#pragma unroll
                    for (int e = 0; e < 4; e++) square += low(two[e]) * low(two[e]) + high(two[e]) * high(two[e]);
                }
            square += __shfl_xor_sync(~0u, square, 1);
            square += __shfl_xor_sync(~0u, square, 2);
            if (pair == 0) squares_s[warp][8 * h + quad] = square;
        }
        __syncthreads();
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            if (8 * h >= T) break;
            float square = 0;
#pragma unroll
            for (int p = 0; p < WARPS; p++) square += squares_s[p][8 * h + quad];
            const float r = rsqrtf(square * (1.0f / D) + eps);
#pragma unroll
            for (int i = 0; i < MINE; i++)
                if (mine(i)) {
                    u32* two = (u32*)&v[h][i];
                    const u32 by[4] = {scale[i].x, scale[i].y, scale[i].z, scale[i].w};
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        two[e] = pack(low(two[e]) * r * low(by[e]), high(two[e]) * r * high(by[e]));
                }
        }
    }

    int place = 0;
    u32 phase = 0;
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile++) {
        // Sum j of this thread: of token e / ROWS and row e % ROWS of the tile.
        const int rows = min(tile_rows, count - tile * tile_rows), from = first + tile * tile_rows;
        auto there = [&](int e) { return e < T * ROWS && e % ROWS < rows; };
        float added[EACH] = {};
        if (ADD)
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                const int e = tid + j * THREADS;
                if (there(e)) added[j] = low(load_bf16(residual + e / ROWS * residual_stride + from + e % ROWS));
            }
        wait_at_barrier(full + 8 * place, phase);
        const unsigned char* w_s = shared + place * tile_rows * PITCH;
        float c[ROWS / 8][GROUPS][2][4] = {};  // in two parts each, or products would wait for one another
#pragma unroll
        for (int i = 0; i < MINE; i++)
            if (mine(i))
#pragma unroll
                for (int o = 0; o < ROWS / 8; o++) {
                    const uint4 b = *(const uint4*)(w_s + min(8 * o + quad, tile_rows - 1) * PITCH + 2 * columns(i));
#pragma unroll
                    for (int g = 0; g < GROUPS; g++) {
                        const uint4 a = v[2 * g][i], z = HALVES > 1 ? v[(2 * g + 1) % HALVES][i] : make_uint4(0, 0, 0, 0);
                        mma(c[o][g][0], a.x, z.x, a.y, z.y, b.x, b.y);
                        mma(c[o][g][1], a.z, z.z, a.w, z.w, b.z, b.w);
                    }
                }
        float* partial = partial_s + tile % 2 * WARPS * TILE;
#pragma unroll
        for (int o = 0; o < ROWS / 8; o++)
#pragma unroll
            for (int h = 0; h < HALVES; h++)
                *(float2*)(partial + warp * TILE + (8 * h + quad) * ROWS + 8 * o + 2 * pair) =
                    make_float2(c[o][h / 2][0][h % 2 * 2] + c[o][h / 2][1][h % 2 * 2],
                                c[o][h / 2][0][h % 2 * 2 + 1] + c[o][h / 2][1][h % 2 * 2 + 1]);
        __syncthreads();
        ask(tile + 1 + stages);
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const int e = tid + j * THREADS;
            if (there(e)) {
                float sum = 0;
#pragma unroll
                for (int p = 0; p < WARPS; p++) sum += partial[p * TILE + e];
                y[(long long)(e / ROWS) * O + from + e % ROWS] = (bf16)pack(sum + added[j], 0);
            }
        }
        if (++place == stages) place = 0, phase ^= 1;
    }
}
