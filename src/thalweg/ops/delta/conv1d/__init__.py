"""Causal depthwise convolution with SiLU and a rolling state, a part of the mixers: `reference.conv1d_decode` for one
token of each sequence, `conv1d_prefill` of `reference` and `triton` for prompts.

weight_CW [C, W + 1] has one row of taps per channel; the last tap multiplies the current input, the one
before it the previous input, and so on (a checkpoint's [C, 1, W + 1] squeezed). state_NWC [N, W, C] holds
the last W raw inputs of every slot, oldest first; a new sequence starts from zeros. Sums and SiLU are in
fp32, y has x's dtype. slots_B is int64 [B]. Slots that are not named stay bit-identical. A slot named twice
in one call (padding rows share a sink slot) ends with any one of the rows written to it.

    conv1d_prefill(x_TC, state_NWC, slots_B, offsets, weight_CW, *, boundaries=()) -> y_TC

Sequence b owns tokens offsets[b]:offsets[b + 1]. The state of its slot is read first and moves on by its length, in
place: a sequence shorter than W shifts it, one of length 0 leaves it bit-identical. x may have any strides.
`boundaries` as package kda says.
"""

PIECE = 16  # tokens of a sequence that a program of the Triton kernel takes; W is at most this
