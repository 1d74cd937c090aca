// Gated DeltaNet's part of a prompt's delta rule that needs no state, for Hopper: K = V = 128, bf16 activations, 4 taps.
// It has one decay for all channels of a head, and value heads that share keys and queries. A block makes what
// gdn_states.cu needs of CHUNK tokens of all value heads of a key head. With f_i the products of a head's decays from the
// beginning of the chunk up to token i, g_i those behind it, (j, i] those in between, and S0 the state before the chunk:
//
//     (I + A) U = beta (V - f (K S0^T)),   A_ij = beta_i (j, i] k_i . k_j,  j < i
//     O = f (Q S0^T) + P U,                P_ij = (j, i] q_i . k_j,         j <= i
//     S = f_C S0 + (g U)^T K
//
// Decays are no part of keys and queries, so these are written once for all heads, and of a head T = (I + A)^-1 beta, P,
// V, f and g. No decay is ever divided by another.
//
// (I + A) is inverted for sub-blocks by halves of 1, 2, 4 and 8 tokens (chunk_solve.cuh), and then below them. What is at
// most 1 goes into products as fp16 here, which is finer than bf16 there.
//
// Values of the next head are on their way while those of one are made use of.
//
// Macro: RATIO, value heads per key head.

#include "hopper.cuh"
#include "matrix_unit.cuh"
#include "delta.cuh"
#include "chunk_parts.cuh"
#include "chunk_inputs.cuh"
#include "chunk_tiles.cuh"
#include "chunk_solve.cuh"
#include "gdn.cuh"
#include "gdn_make.cuh"

extern "C" __global__ void __launch_bounds__(MAKERS, 3)
    gdn_chunks(const bf16* qkv, const bf16* beta, const bf16* gate, const bf16* conv_weight, bf16* conv_state,
               const float* A_log, const float* dt_bias, const long long* slots, const int* pieces, const int* offsets,
               const int* saves, u8* work, long long qkv_stride, long long beta_stride, long long gate_stride, int H) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ __align__(16) Making making;

    start_kernel_behind();
    wait_for_kernel_ahead();
    const Prompt of = {qkv,    beta,    gate,  conv_weight, conv_state, A_log,       dt_bias,     slots,
                       pieces, offsets, saves, work,        qkv_stride, beta_stride, gate_stride, H};
    const int key_heads = H / RATIO;
    make_chunk(of, blockIdx.x / key_heads, blockIdx.x % key_heads, shared, making, here());
}
