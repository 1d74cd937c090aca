// Products of many rows with matrices of weights, on Hopper: an expert's rows with the expert's (gate and up with SiLU
// if GATED, or down), or all rows with one matrix (DENSE).
//
// A tile is 256 rows of weights, of gate and up 128 each, by up to 16 * UNITS rows of x, as few as there are: weights are
// the left operand, so that the rows of x, whose number varies, are columns of the matrix unit, which takes any multiple
// of 16. Blocks fill the multiprocessors once. Tiles of experts, which differ in their rows, go to whoever is free, those
// of DENSE round and round. A warpgroup copies: weights by tensor map, rows of x from wherever they lie by copies of 16
// bytes, or by tensor map too (MAPPED) where they lie side by side, 128 bytes of a row for each step of a ring in shared
// memory.
// Two warpgroups multiply, with 128 rows of the weights each; a warp's end of a step is counted apart from the others'.
// Two blocks may be a CLUSTER: they have the same weights and half of the rows each, each copies half of the weights, to
// both.
//
// FP8: both sides are e4m3 with scales, of x's rows, and of weights per 128 columns and per row (DENSE) or per 128 rows.
// Sums of 128 columns go to float32 apart, times the weights' scale; that of x's row, which would be as many multiplications
// again and a load for each, waits for the end of the tile.
//
// EARLY: of a gated launch and the one behind it, the latter begins on multiprocessors that have no tile of the former any
// more, with rows that are made: the former counts the tiles of an expert's rows that are stored.
//
// Macros: GATED; DENSE; FP8; ADD, whether results are added to what is there, of DENSE; UNITS; CLUSTER, 1 or 2; EARLY.

#define MAPPED (!GATED)                  // rows of a tile lie side by side
#define LATER (FP8 && (GATED || DENSE))  // results are stored while the next tile is multiplied, for a stage of the ring

#include "hopper.cuh"
#include "matrix_unit.cuh"
#include "tiles.cuh"
#include "multiply.cuh"

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(COPIERS + MULTIPLIERS, 1) products(
    const __grid_constant__ TensorMap map,
    const __grid_constant__ TensorMap rows_map,  // of MAPPED
    const __grid_constant__ TensorMap out_map,   // of LATER
    const u8* x,            // rows
    const float* x_scales,  // of FP8: [rows]
    const float* w_scales,  // of FP8: [experts * rows / 128, steps], or of DENSE [steps, w_scales_stride]
    const int* sorted,      // places of pairs by expert, but of DENSE
    const int* blocks,      // [count, 3] (expert, first of sorted, how many), those of 0 last; behind them two counters
                            // of zero, for GATED and not, how many are not of 0, and counts of zero, for EARLY; but of DENSE
    u16* out,               // bf16
    int x_stride,           // of 16 bytes
    long long out_stride,   // elements
    int w_scales_stride,
    int steps,              // of 128 bytes in a row of x
    int columns,            // of out
    int parts,              // of PART columns
    int share,              // pairs of a row of x, if GATED
    int count,              // blocks
    int tokens) {           // rows of x, of DENSE
    extern __shared__ __align__(1024) u8 shared[];
    Shared& s = *(Shared*)shared;
    const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            init_barrier(shared_address(&s.full[i]), MAPPED && !FP8 ? 1 : COPIERS + 1);
            init_barrier(shared_address(&s.empty[i]), CLUSTER * MULTIPLIERS / 32);
        }
        for (int i = 0; i < TOLD; i++) init_barrier(shared_address(&s.known[i]));
        share_barriers();
    }
    if (CLUSTER > 1)
        wait_for_cluster();
    else
        __syncthreads();
    if (EARLY && !GATED)
        begin_before_kernel_ahead_ends();
    else
        wait_for_kernel_ahead();
    start_kernel_behind();
    constexpr int PART = GATED ? 128 : 256;
    const Tiles tiles = {blocks, parts, count, tokens};
    Ring ring;
    Walk walk = {tiles};

    if (warpgroup == 0) {
        give_registers_back<FP8 ? 40 : 56>();
        const int tid = threadIdx.x;
        [[maybe_unused]] const int chunk = tid % 8, row = tid / 8;
        const bool copies = !MAPPED || FP8 || tid == 0;  // whoever does not arrive could be a round behind, and miss it
#if !DENSE
        int* counters = (int*)blocks + 3 * count;
        [[maybe_unused]] u32* const stored = (u32*)counters + 3;
        [[maybe_unused]] int before = -1;  // whose rows the tile before has
        const bool finds = tid == 0 && (CLUSTER == 1 || blockIdx.x % 2 == 0);
        Finder finder = {counters + !GATED, finds ? load_int(counters + 2) * parts : 0};
#endif
#pragma unroll 1
        for (Work work = walk.first(); copies && work.all > 0; work = walk.next(s)) {
#if !DENSE
            if (tid == 0) expect_bytes(shared_address(&s.known[walk.turn % TOLD]), sizeof(Told));
            if (finds) finder.claim();
#endif
#if !MAPPED || FP8
            u32 from[UNITS];  // rows of x
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                const int place = work.first + min(UNIT * u + row, max(work.count, 1) - 1);
#if DENSE
                from[u] = place;
#else
                from[u] = GATED ? (u32)load_int(sorted + place) / (u32)share : (u32)place;
#endif
            }
#endif
            const int n = max(1, (work.count + UNIT - 1) / UNIT);
#if FP8
            wait_at_barrier(shared_address(&s.empty[ring.stage]), ring.phase ^ 1);
#pragma unroll
            for (int u = 0; u < UNITS; u++)  // their scales come with the first step
                if (chunk == 0 && u < n) copy4(shared_address(s.scales[ring.stage] + UNIT * u + row), x_scales + from[u]);
#endif
#if !MAPPED
#pragma unroll
            for (int u = 0; u < UNITS; u++) from[u] *= x_stride;
#endif
            const int of_expert = work.expert * (GATED ? 2 * columns : columns);
            const int box = of_expert + work.part * PART, other = box + (GATED ? columns : 128);
#pragma unroll 1
            for (int k = 0; k < steps; k++) {
                const int stage = ring.stage;
                const u32 full = shared_address(&s.full[stage]);
                wait_at_barrier(shared_address(&s.empty[stage]), ring.phase ^ 1);
                if (tid == 0) {
                    expect_bytes(full, WEIGHTS + (FP8 && DENSE ? 4 * 256 : 0) + (MAPPED ? n * UNIT * STEP_BYTES : 0));
#if FP8 && DENSE
                    copy_bytes(shared_address(s.scales[stage] + MOST), w_scales + (long long)k * w_scales_stride + box, 4 * 256, full);
#endif
                    const int column = k * (STEP_BYTES / 2);  // in units of 2 bytes, whatever the weights are
                    const u32 to = shared_address(s.weights[stage]);
                    if (CLUSTER > 1) {
                        const int mine = blockIdx.x % 2;
                        copy_tile_to(3, to + mine * BOX, &map, column, mine ? other : box, full);
                    } else {
                        copy_tile(to, &map, column, 0, box, full);
                        copy_tile(to + BOX, &map, column, 0, other, full);
                    }
#if EARLY && MAPPED
                    if (k == 0) wait_until_counted(stored + work.of, CLUSTER * ((steps + 1) / 2));  // tiles, of 128 columns
#endif
#if MAPPED
#pragma unroll 1
                    for (int u = 0; u < n; u++)
                        copy_tile(shared_address(s.rows[stage]) + u * UNIT * STEP_BYTES, &rows_map, column, 0, work.first + UNIT * u, full);
#endif
                }
#if !MAPPED
                const u32 to = shared_address(s.rows[stage]) + row * STEP_BYTES + ((chunk ^ row % 8) << 4);
                const u8* at = x + k * STEP_BYTES + chunk * 16;
#pragma unroll
                for (int u = 0; u < UNITS; u++)
                    if (u < n) copy16(to + u * UNIT * STEP_BYTES, at + ((u64)from[u] << 4));
#endif
#if FP8 && !DENSE
                if (tid < 2) copy4(shared_address(s.scales[stage] + MOST + tid), w_scales + (long long)((tid ? other : box) / 128) * steps + k);
#endif
#if !MAPPED || FP8
                arrive_after_copies(full);
#endif
#if EARLY && GATED
                // Whoever has given the first stage of this tile back has stored the one before.
                if (tid == COPIERS - 1 && k == STAGES && before >= 0) count_stored(stored + before);
#endif
#if !DENSE
                if (finds && k == min(1, steps - 1)) finder.look(tiles);
                if (finds && k == min(2, steps - 1)) finder.tell(s, walk.turn);
#endif
                ring.advance();
            }
#if EARLY && GATED
            before = work.of;
#endif
        }
#if EARLY && GATED
        if (tid >= COPIERS - 32) wait_at<MULTIPLIERS + 32>(4);
        if (tid == COPIERS - 1 && before >= 0) count_stored(stored + before);
#endif
        __syncwarp();
        commit_copies();
        wait_for_copies<0>();
    } else {
        take_registers<FP8 ? 232 : 224>();
        const int group = warpgroup - 1;
        const Out to = {out, out_stride, columns, &out_map};
        int turn = 0, parity = 0;
#pragma unroll 1
        for (Work work = walk.first(); work.all > 0; work = walk.next(s)) {
            switch (max(1, (work.count + UNIT - 1) / UNIT)) {
#define CASE(n) \
    case n: multiply_tile<n>(s, ring, steps, work, sorted, to, group, turn, parity); break;
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#if UNITS > 8
                CASE(9)
#endif
#if UNITS > 9
                CASE(10)
#endif
            }
        }
        if (LATER) wait_until_written();
#if EARLY && GATED
        arrive_at<MULTIPLIERS + 32>(4);
#endif
    }
    if (CLUSTER > 1) wait_for_cluster();  // before it ends, the other may still copy and arrive here
}
