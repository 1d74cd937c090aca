"""What several families read from a GGUF file's hyperparameters, as keys of config.json."""

from __future__ import annotations

from typing import Any

from thalweg.config.gguf.keys import GgufKeys
from thalweg.errors import CheckpointError

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_SIGMOID = 2


def common(keys: GgufKeys) -> dict[str, Any]:
    """Width, depth and vocabulary. Layers that draft tokens are left out."""
    embedding = keys.tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{keys.where}: {EMBEDDING} is missing or no matrix; expected one of [vocabulary, width]")
    vocab_size, width = embedding.shape
    keys.agree("vocab_size", vocab_size)
    keys.agree("embedding_length", width)
    layers = keys.get_int("block_count") - keys.get_int("nextn_predict_layers", 0)
    if not 0 < layers <= len(keys.tensors):
        raise keys.error("block_count", "the number of layers that there are tensors of")
    plain = all(tensor.type.name == "F32" for tensor in keys.tensors.values())
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "rms_norm_eps": keys.get_float("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "tie_word_embeddings": HEAD not in keys.tensors,
        "dtype": "float32" if plain else "bfloat16",
        **({"intermediate_size": inner} if (inner := keys.get_int("feed_forward_length", 0)) else {}),
    }


def latent_attention(keys: GgufKeys) -> dict[str, Any]:
    """Multi-head latent attention by DeepSeek's keys."""
    heads, rank, rope = (
        keys.get_int(k) for k in ("attention.head_count", "attention.kv_lora_rank", "rope.dimension_count")
    )
    head_dim = keys.get_int("attention.key_length_mla")
    keys.agree("attention.key_length", rank + rope)
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "kv_lora_rank": rank,
        "q_lora_rank": keys.get_int("attention.q_lora_rank", None) or None,
        "qk_nope_head_dim": head_dim - rope,
        "qk_rope_head_dim": rope,
        "v_head_dim": keys.get_int("attention.value_length_mla"),
    }


def sigmoid_experts(keys: GgufKeys) -> dict[str, Any]:
    """Numbers of a mixture with sigmoid scores by our names; nothing without experts."""
    experts = keys.get_int("expert_count", 0)
    if not experts:
        return {}
    if keys.get_int("expert_gating_func", _SIGMOID) != _SIGMOID:
        raise keys.error("expert_gating_func", f"{_SIGMOID}, which is sigmoid")
    return {
        "experts": experts,
        "top_k": keys.get_int("expert_used_count"),
        "shared": keys.get_int("expert_shared_count", 0),
        "groups": keys.get_int("expert_group_count", 1) or 1,
        "top_groups": keys.get_int("expert_group_used_count", 1) or 1,
        "renormalize": keys.get_bool("expert_weights_norm", False),
        "inner": keys.get_int("expert_feed_forward_length"),
        "scale": keys.get_float("expert_weights_scale", 1.0),
        "dense": keys.get_int("leading_dense_block_count", 0),
    }
