// Carries states across the chunks of prompts of Gated DeltaNet, for Hopper, behind gdn_chunks.cu: gdn_head.cuh says how.
// The blocks of a head are neighbours in the grid, so that the first ones that have not ended are all there and go on.
//
// Where heads are few, a long sequence is walked in `count` segments side by side (SPLIT), from the states that
// gdn_segments.cu makes for them.
//
// Macros: those of gdn_head.cuh. SPLIT, 1 if `count` may be above 1.

#include "hopper.cuh"
#include "matrix_unit.cuh"
#include "delta.cuh"
#include "walk.cuh"
#include "gdn.cuh"
#include "gdn_walk.cuh"
#include "gdn_head.cuh"

extern "C" __global__ void __launch_bounds__(WALKERS, 1)
    gdn_states(u8* work, const bf16* qkv, const bf16* gate, const Weight* norm_weight, bf16* conv_state, State* state,
               const long long* slots, const int* offsets, const int* firsts, const u8* moves, bf16* out, long long qkv_stride, long long gate_stride, float eps, int H, int count) {
    const int slice = blockIdx.x % SLICES, h = blockIdx.x / SLICES % H;
    const int segment = blockIdx.x / SLICES / H % count, sequence = blockIdx.x / SLICES / H / count;
    extern __shared__ __align__(128) u8 shared[];
    __shared__ __align__(128) Walking s;
    const Walk of = {work, qkv, gate, norm_weight, conv_state, state, slots, offsets, out, qkv_stride, gate_stride, eps, H};

    start_kernel_behind();
    prepare_walk(s, of, slice);
    wait_for_kernel_ahead();

    // Chunks of the sequence, and of the segment.
    const int all = (offsets[sequence + 1] - offsets[sequence] + CHUNK - 1) / CHUNK;
    const int skipped = first_of_segment(segment, count, all), end = first_of_segment(segment + 1, count, all);
    if (skipped == end) return;
    const Part range = {firsts[sequence] + skipped, end - skipped, sequence, segment == 0, end == all};
    auto first_state = [&](float(&S)[16][4], const State* from, int rows) {
        if (segment == 0) read_rows(S, from);
#if SPLIT
        else move_rows(S, moves + ((long long)sequence * (count - 1) * H + h) * MOVE, (long long)H * MOVE, rows, threadIdx.x % 32, segment);
#endif
    };
    walk(of, range, shared, s, h, slice, [](int) {}, first_state);
}
