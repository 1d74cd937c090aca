"""Configs of Qwen3.5's layout in any shape, small by default: 3 layers of Gated DeltaNet to one of full attention."""

from __future__ import annotations

from typing import Any


def config(
    *,
    layers: int = 4,
    hidden: int = 32,
    key_heads: int = 2,
    value_heads: int = 4,
    key_dim: int = 16,
    value_dim: int = 16,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    rotary: float = 0.25,
    experts: int = 6,
    top_k: int = 2,
    inner: int = 24,
    shared: int = 40,
    dense: int = 0,
    vocab: int = 131,
    context: int = 512,
    **more: Any,
) -> dict[str, Any]:
    """config.json of Qwen3.5, flat; `dense` is the width of dense layers, 0 for experts."""
    feed_forward = {"intermediate_size": dense} if dense else {
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": inner,
        "shared_expert_intermediate_size": shared,
    }  # fmt: skip
    return {
        "architectures": ["Qwen3_5ForCausalLM" if dense else "Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_text" if dense else "qwen3_5_moe_text",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-6,
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": key_dim,
        "linear_value_head_dim": value_dim,
        "linear_conv_kernel_dim": 4,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": rotary},
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "dtype": "bfloat16",
        **feed_forward,
        **more,
    }
