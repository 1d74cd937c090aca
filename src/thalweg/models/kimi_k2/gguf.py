"""Kimi-K2 and DeepSeek-V3 in GGUF files: hyperparameters to what config.json says."""

from __future__ import annotations

from typing import Any

from thalweg.config.gguf.keys import GgufKeys
from thalweg.models.family import DecoderConfig
from thalweg.models.parts.gguf_keys import (
    common,
    latent_attention,
    latent_attention_keys,
    sigmoid_experts,
    weighted_rope_keys,
    weighted_yarn,
)
from thalweg.models.parts.mla import MlaDims

ARCHITECTURE = "deepseek2"


def config(keys: GgufKeys) -> dict[str, Any]:
    """config.json's object. Raises ConfigError."""
    raw = common(keys) | latent_attention(keys)
    if keys.get_int("attention.head_count_kv", 1) not in (1, raw["num_attention_heads"]):
        raise keys.error("attention.head_count_kv", f"1, or attention.head_count {raw['num_attention_heads']}")
    raw |= {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "kimi_k2",
        "max_position_embeddings": keys.get_int("context_length"),
        "rope_theta": keys.get_float("rope.freq_base", 10000.0),
        "rope_scaling": weighted_yarn(keys),
    }
    experts = sigmoid_experts(keys)
    if experts:
        raw |= {
            "n_routed_experts": experts["experts"],
            "num_experts_per_tok": experts["top_k"],
            "n_shared_experts": experts["shared"],
            "n_group": experts["groups"],
            "topk_group": experts["top_groups"],
            "norm_topk_prob": experts["renormalize"],
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "moe_intermediate_size": experts["inner"],
            "routed_scaling_factor": experts["scale"],
            "first_k_dense_replace": experts["dense"],
            "moe_layer_freq": 1,
        }
    return raw


def metadata(config: DecoderConfig) -> dict[str, Any]:
    """The keys to write. Raises UnsupportedError for what llama.cpp's files cannot say."""
    mla = config.layers[0].mixer
    assert isinstance(mla, MlaDims)
    assert mla.rotation is not None
    return {**latent_attention_keys(mla), **weighted_rope_keys(mla.rotation), "attention.head_count_kv": 1}
