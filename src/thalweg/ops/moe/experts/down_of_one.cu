// Down of one token over weights in fp8, with the weighted sum, on Hopper: the products of experts.cu, but a block has
// the same few rows of every expert. So it adds up by itself, and nothing goes through memory between blocks.
//
// An item is at most 16 rows of an expert. Each warp has the same columns of all of them, whose weights stream through
// its own ring; one more warp adds up what the others have of an item, and the experts of a row in the token's order.
// Bits are those of experts.cu with ENDS.
//
// Macros: COLS, the columns; OUT, the rows of an expert; K, experts of the token; STEPS of 128 columns that a warp has;
// STAGES of the ring; MOST_ROWS of an expert that a block has.

#include "hopper.cuh"

#include "halves.cuh"

constexpr int BLOCK = 128, ROWS = 16, WARPS = COLS / (BLOCK * STEPS), BLOCKS = COLS / BLOCK;
constexpr int STEP_BYTES = ROWS * BLOCK, THREADS = 32 * (WARPS + 1), BUFFERS = 4;
constexpr int SLOTS = (MOST_ROWS + 31) / 32;     // rows that a lane ends
constexpr int FULL = 1, EMPTY = FULL + BUFFERS;  // barriers of the buffers

// A lane's part of h, of which only the first four lanes have any: 16 neighbours in every 64 columns of its warp.
struct Rows {
    u32 x[STEPS * 16];
    float scale;
};

extern "C" __global__ void __launch_bounds__(THREADS, WARPS <= 12 ? 2 : 1)
    down(const u16* h, const long long* ids, const u8* q, const float* scales, const float* weights,
         const bf16* residual, bf16* y, long long h_stride) {
    const int tid = threadIdx.x, lane = tid % 32, quad = lane / 4, pair = lane % 4;
    const int warp = __shfl_sync(~0u, tid / 32, 0);  // so that the compiler knows it for the same in all lanes
    const int first = (int)((long long)OUT * blockIdx.x / gridDim.x);
    const int count = (int)((long long)OUT * (blockIdx.x + 1) / gridDim.x) - first;
    const int items = (count + ROWS - 1) / ROWS, rows_each = (count + items - 1) / items;  // of an expert

    extern __shared__ __align__(128) u8 shared[];
    float4* sums = (float4*)(shared + WARPS * STAGES * STEP_BYTES);  // [BUFFERS, WARPS, 32]
    u16* h_s = (u16*)(sums + BUFFERS * WARPS * 32);                  // [K, COLS]
    __shared__ float scales_s[WARPS * STAGES * 2], total_s[32 * SLOTS];
    __shared__ int expert_s[K];

    start_kernel_behind();
    // The kernel ahead starts this one when ids are there.
    if (tid < K) expert_s[tid] = load_id(ids + tid);
    __syncthreads();

    if (warp == WARPS) {  // adds up what the others have, item by item
        for (int i = lane; i < count; i += 32) total_s[i] = 0;
        __syncwarp();
        wait_for_kernel_ahead();
        float added[SLOTS];
#pragma unroll
        for (int i = 0; i < SLOTS; i++)
            added[i] = 32 * i + lane < count ? from_bf16(load_bf16(residual + first + 32 * i + lane)) : 0.0f;
        int j = 0;
#pragma unroll 1
        for (int k = 0; k < K; k++) {
            const float weight = load_fp32(weights + k);
#pragma unroll 1
            for (int item = 0; item < items; item++, j++) {
                const float4* item_sums = sums + j % BUFFERS * WARPS * 32 + lane;
                float lower = 0, upper = 0;
                wait_at<THREADS>(FULL + j % BUFFERS);
#pragma unroll
                for (int i = 0; i < WARPS; i++) lower += item_sums[i * 32].x, upper += item_sums[i * 32].z;
                if (j + BUFFERS < K * items) arrive_at<THREADS>(EMPTY + j % BUFFERS);
                const int row = item * rows_each + quad, end = min(count, (item + 1) * rows_each);
                if (pair == 0) {
                    if (row < end) total_s[row] += weight * lower;
                    if (row + 8 < end) total_s[row + 8] += weight * upper;
                }
            }
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < SLOTS; i++)
            if (32 * i + lane < count) store_bf16(y + first + 32 * i + lane, total_s[32 * i + lane] + added[i]);
        return;
    }

    // Eight lanes copy a line of a row, to where the four lanes that multiply it read.
    const u32 ring = shared_address(shared) + warp * STAGES * STEP_BYTES;
    const u32 copy_to = ring + lane % 8 / 4 * 512 + (lane / 8 * 4 + lane % 4) * 16;
    const u32 scale_ring = shared_address(scales_s) + (warp * STAGES * 2 + lane) * 4;
    const u8* lane_q = q + lane / 8 * COLS + warp * STEPS * BLOCK + 16 * (lane % 8);
    // What is asked for next: an item of an expert, or nothing.
    int asked_k = -1, asked_row = count;
    const u8* asked = nullptr;
    int asked_scales = 0;
    auto ask_next = [&](int stage, int step) {
        if (step == 0) {
            if ((asked_row += rows_each) >= count) asked_row = 0, asked_k++;
            if (asked_k < K) {
                const int row = first + asked_row, last = min(rows_each, count - asked_row) - 1;
                asked = lane_q + ((long long)expert_s[asked_k] * OUT + row) * COLS;
                const int of_scales = expert_s[asked_k] * (OUT / BLOCK) + (row + (lane ? last : 0)) / BLOCK;
                asked_scales = of_scales * BLOCKS + warp * STEPS;
            }
        }
        if (asked_k < K) {
            const int rows = min(rows_each, count - asked_row) - lane / 8;
            const u32 to = copy_to + stage * STEP_BYTES;
#pragma unroll
            for (int i = 0; i < 4; i++)  // 4 rows of the lower or upper 8
                if (4 * i < rows) copy16(to + i / 2 * 1024 + i % 2 * 256, asked + 4 * i * COLS + step * BLOCK);
            // Scales of the item's first and last row: no two others are among them.
            if (lane < 2) copy4(scale_ring + stage * 8, scales + asked_scales + step);
        }
        commit_copies();
    };
#pragma unroll
    for (int n = 0; n < STAGES; n++) ask_next(n, n % STEPS);

    wait_for_kernel_ahead();
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int at = warp * STEPS * BLOCK + 8 * lane; at < (warp + 1) * STEPS * BLOCK; at += 256)
            copy16(shared_address(h_s + k * COLS + at), h + k * h_stride + at);
    commit_copies();
    wait_for_copies<0>();
    __syncwarp();

    Rows rows;
    auto take_rows = [&](int k) {
#pragma unroll
        for (int i = 0; i < 4 * STEPS; i++) {
            const int column = (warp * STEPS + i / 4) * BLOCK + i / 2 % 2 * 64 + 16 * pair + i % 2 * 8;
            const uint4 v = quad == 0 ? *(const uint4*)(h_s + k * COLS + column) : make_uint4(0, 0, 0, 0);
            rows.x[4 * i] = v.x, rows.x[4 * i + 1] = v.y, rows.x[4 * i + 2] = v.z, rows.x[4 * i + 3] = v.w;
        }
        rows.scale = __shfl_sync(~0u, scale_to_halves(rows.x), 0);
    };
    int stage = 0, j = 0;
#pragma unroll 1
    for (int k = 0; k < K; k++) {
        take_rows(k);
#pragma unroll 1
        for (int item = 0; item < items; item++, j++) {
            const int row = first + item * rows_each, of_first = BLOCK - row % BLOCK;  // rows with the first scale
            float sum[4] = {};
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                wait_for_copies<STAGES - 1>();
                __syncwarp();
                const float2 both = *(const float2*)(scales_s + (warp * STAGES + stage) * 2);
                const float scale[2] = {quad < of_first ? both.x : both.y, quad + 8 < of_first ? both.x : both.y};
                float c[2][4] = {};
                widen_step(shared + (warp * STAGES + stage) * STEP_BYTES + 16 * lane, [&](int i, u32 a0, u32 a1, u32 a2, u32 a3) {
                    const u32* b = &rows.x[16 * step + 2 * i];
                    mma_fp16(c[i / 4], a0, a1, a2, a3, b[0], b[1]);
                });
                __syncwarp();  // all have read
                ask_next(stage, (step + STAGES) % STEPS);
                if (++stage == STAGES) stage = 0;
#pragma unroll
                for (int i = 0; i < 4; i++) sum[i] += (c[0][i] + c[1][i]) * scale[i / 2];
            }
            if (j >= BUFFERS) wait_at<THREADS>(EMPTY + j % BUFFERS);
            const float s = rows.scale;
            sums[j % BUFFERS * WARPS * 32 + warp * 32 + lane] = make_float4(sum[0] * s, sum[1] * s, sum[2] * s, sum[3] * s);
            arrive_at<THREADS>(FULL + j % BUFFERS);
        }
    }
}
