// Gated DeltaNet's delta rule over a prompt in one launch, for Hopper: what gdn_chunks.cu and gdn_states.cu do one after
// the other, where a head's state goes from chunk to chunk on few multiprocessors. The others make chunks meanwhile.
//
// The grid is of one block to a multiprocessor. The last 2 H blocks are the walkers of gdn_head.cuh, two to a head. A block
// is two teams that make chunks, in their order, whoever is free the next one: teams of walkers so many `rounds` of them
// before they walk, the others until there are none. These blocks begin first and wait for nobody, so that all chunks come
// even if other kernels have multiprocessors that walkers want. For each chunk there is a flag of each walker, which its
// fetching warp awaits and takes back. Flags, and what is counted ahead of them, are 0 between launches.
//
// Macros: those of gdn_head.cuh.

#define TEAMS 2
#include "hopper.cuh"
#include "matrix_unit.cuh"
#include "delta.cuh"
#include "chunk_parts.cuh"
#include "chunk_inputs.cuh"
#include "chunk_tiles.cuh"
#include "chunk_solve.cuh"
#include "walk.cuh"
#include "gdn.cuh"
#include "gdn_make.cuh"
#include "gdn_walk.cuh"
#include "gdn_head.cuh"

static_assert(WALKERS == TEAMS * MAKERS);

extern "C" __global__ void __launch_bounds__(WALKERS, 1)
    gdn_prompt(const bf16* qkv, const bf16* beta, const bf16* decays, const bf16* conv_weight, bf16* conv_state,
               const float* A_log, const float* dt_bias, const long long* slots, const int* pieces, const int* offsets,
               const int* firsts, const int* saves, u8* work, const bf16* gate, const Weight* norm_weight, State* state,
               bf16* out, u32* counters, long long qkv_stride, long long beta_stride, long long decays_stride,
               long long gate_stride, float eps, int H, int sequences, int chunks, int rounds) {
    const int walkers = SLICES * H, block = blockIdx.x - (gridDim.x - walkers), slice = block % SLICES;  // below 0: no walker
    int *const taken = (int*)counters, *const ended = taken + 1;
    u32* const made = counters + 4;
    extern __shared__ __align__(128) u8 shared[];
    __shared__ __align__(128) Walking s;

    start_kernel_behind();
    wait_for_kernel_ahead();
    {
        const Prompt of = {qkv,    beta,    decays, conv_weight, conv_state, A_log,       dt_bias,       slots,
                           pieces, offsets, saves,  work,        qkv_stride, beta_stride, decays_stride, H};
        const Here at = here();
        const int key_heads = H / RATIO, items = chunks * key_heads, tid = maker();
        u8* const own = shared + at.team * (3 * INPUT + SOLVING + (int)sizeof(Making));
        Making& making = *(Making*)(own + 3 * INPUT + SOLVING);
#pragma unroll 1
        for (int round = 0; block < 0 || round < rounds; round++) {
            if (tid == 0) making.item = take_number(taken);
            wait_for_team(at);
            const int item = making.item, n = item / key_heads, key_head = item % key_heads;
            if (item >= items || !make_chunk(of, n, key_head, own, making, at)) break;  // there is none behind it either
            share_writes_to_memory();
            wait_for_team(at);
            if (tid < SLICES * RATIO) tell_made(made + n * walkers + key_head * SLICES * RATIO + tid);
        }
        if (tid == 0 && take_number(ended) == (int)gridDim.x * TEAMS - 1) *taken = *ended = 0;
    }
    if (block < 0) return;
    __syncthreads();
    share_writes();
    const int h = block / SLICES;
    const Walk of = {work, qkv, gate, norm_weight, conv_state, state, slots, offsets, out, qkv_stride, gate_stride, eps, H};
    prepare_walk(s, of, slice);
    const Part range = {0, firsts[sequences], 0, sequences, true};
    if (range.chunks == 0) return;
    auto await = [&](int n) {
        await_made(made + n * walkers + block);
        share_writes_to_memory();
    };
    walk(of, range, shared, s, h, slice, await, [](float(&S)[16][4], const State* from, int) { read_rows(S, from); });
}
