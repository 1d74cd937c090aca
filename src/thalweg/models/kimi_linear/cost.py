"""The least a decode step can move and compute, counted from the config: what its measured time is held against."""

from __future__ import annotations

from dataclasses import dataclass

from thalweg.config.quantization import BLOCK
from thalweg.models.kimi_linear.config import KimiLinearConfig


@dataclass(frozen=True, slots=True)
class StepCost:
    """Bytes through device memory, each input read once and each output written once, and floating-point operations."""

    bytes: float
    flops: float


def decode_cost(
    c: KimiLinearConfig,
    batch: int,
    context: int,
    *,
    dtype_bytes: int = 2,
    state_bytes: int = 4,
    quantization: str | None = None,
) -> StepCost:
    """One step of `batch` sequences with `context` cached tokens each, on one rank.

    Routing is taken as even: `batch` tokens that each take k of E experts touch E (1 - (1 - k/E)^batch) of them.
    Activations are left out (they stay in the caches of the chip), as are rows of the embedding table.
    """
    D = c.hidden_size
    expert_bytes = dtype_bytes if quantization is None else 1 + 4 / BLOCK**2
    fixed = c.vocab_size * D  # parameters every token takes: here the output head
    shared, expert, distinct, states, latents = 0.0, 0.0, 0.0, 0.0, 0.0
    flops_token = 0.0
    for n in range(c.num_layers):
        if n in c.kda_layers:
            assert c.kda is not None
            HK, R = c.kda.num_heads * c.kda.head_dim, c.kda.gate_rank
            fixed += D * (4 * HK + c.kda.num_heads + 2 * R) + 2 * R * HK + 3 * HK * c.kda.conv_kernel
            states += 2 * HK * c.kda.head_dim * state_bytes  # read and written
            states += 2 * 3 * HK * (c.kda.conv_kernel - 1) * dtype_bytes
            flops_token += 8 * HK * c.kda.head_dim  # decay, k^T S, rank-one update, q^T S
        else:
            assert c.mla is not None
            H, C = c.mla.num_heads, c.mla.latent_dim
            fixed += D * (H * c.mla.qk_head_dim + C + H * c.mla.v_head_dim)
            fixed += H * (c.mla.qk_nope_head_dim + c.mla.v_head_dim) * c.mla.kv_lora_rank
            latents += C * dtype_bytes
            flops_token += 2 * H * (C + c.mla.kv_lora_rank) * context
        if n in c.moe_layers:
            assert c.moe is not None
            E, k, size = c.moe.num_experts, c.moe.top_k, 3 * D * c.moe.intermediate_size
            fixed += E * D
            shared += c.moe.num_shared * size
            distinct += E * (1 - (1 - k / E) ** batch) * size
            expert += k * size
        else:
            fixed += 3 * D * c.intermediate_size
    return StepCost(
        bytes=fixed * dtype_bytes + (shared + distinct) * expert_bytes + batch * (states + latents * context),
        flops=batch * (2 * (fixed + shared + expert) + flops_token),
    )


def prefill_cost(
    c: KimiLinearConfig,
    batch: int,
    length: int,
    *,
    dtype_bytes: int = 2,
    state_bytes: int = 4,
    quantization: str | None = None,
) -> StepCost:
    """`batch` prompts of `length` tokens from nothing to one row of logits each, all in one step, on one rank.

    Every weight is read once (experts as in `decode_cost`, for all tokens at once) and the cache is written once.
    Attention counts its causal half, with keys and values expanded from the latent once a token; KDA counts the
    recurrence, which chunked forms exceed.
    """
    tokens = batch * length
    step = decode_cost(c, tokens, 0, dtype_bytes=dtype_bytes, state_bytes=state_bytes, quantization=quantization)
    head = c.vocab_size * c.hidden_size
    flops, bytes_moved = step.flops - 2 * (tokens - batch) * head, step.bytes
    for n in range(c.num_layers):
        if n in c.kda_layers:
            assert c.kda is not None
            HK = c.kda.num_heads * c.kda.head_dim
            # decode_cost reads and writes a state for every token; a prompt writes one.
            state = HK * c.kda.head_dim * state_bytes + 3 * HK * (c.kda.conv_kernel - 1) * dtype_bytes
            bytes_moved -= (2 * tokens - batch) * state
        else:
            assert c.mla is not None
            H = c.mla.num_heads
            bytes_moved += tokens * c.mla.latent_dim * dtype_bytes
            flops += tokens * 2 * H * (c.mla.qk_head_dim + c.mla.v_head_dim) * (length + 1) / 2
    return StepCost(bytes_moved, flops)
