"""Kimi Delta Attention, a part of the mixers: `reference.kda_decode` for one token of each sequence, `kda_prefill` of
`reference` and `triton` for prompts, `kda_gate` for their decays.

For one head with state S [V, K] (kept as [N, H, V, K] over all slots, key dim contiguous), per token:

    q, k <- q / sqrt(sum q^2 + 1e-6), likewise k;  q <- q * K^-0.5
    S <- S * exp(g)                    g is a log decay per key channel, <= 0, without a lower bound
    S <- S + beta * (v - S k) k^T
    o  = S q

q and k come raw: they are normalised and scaled here. Maths is in fp32, o has v's dtype; the state is fp32
storage, or bf16 storage that is rounded once per call. A new sequence starts from a zero state. slots_B is
int64 [B]; slots that are not named stay bit-identical. A slot named twice (padding rows share a sink slot)
ends with any one of the rows written to it.

    kda_gate(f_THK, A_log_H, dt_bias_HK) -> g_THK fp32 = -exp(A_log) * softplus(f + dt_bias), unbounded below
    kda_prefill(q_THK, k_THK, v_THV, g_THK, beta_TH, *, state_NHVK, slots_B, offsets, boundaries=()) -> o_THV

Sequence b owns tokens offsets[b]:offsets[b + 1]. It starts from the state of its slot, which is updated in place;
length 0 leaves it bit-identical. Inputs of tokens may have any strides. For each (b, n, slot) of `boundaries` the state
of sequence b after n of its tokens, a multiple of BOUNDARY, is written into `slot` too, which no sequence of the call
has.
"""

BOUNDARY = 64  # tokens: every implementation has a state after a multiple of these
