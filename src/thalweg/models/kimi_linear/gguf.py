"""Kimi-Linear in GGUF files: hyperparameters to and from what its config.json says."""

from __future__ import annotations

from typing import Any

from thalweg.config.gguf.keys import GgufKeys
from thalweg.errors import UnsupportedError
from thalweg.models.family import DecoderConfig
from thalweg.models.parts.gguf_keys import common, latent_attention, latent_attention_keys, sigmoid_experts
from thalweg.models.parts.kda import KdaDims
from thalweg.models.parts.mla import MlaDims

ARCHITECTURE = "kimi-linear"


def config(keys: GgufKeys) -> dict[str, Any]:
    """config.json's object. Raises ConfigError."""
    raw = common(keys)
    layers = raw["num_hidden_layers"]
    is_full = keys.per_layer("attention.head_count_kv", layers)
    kda_heads = keys.get_int("attention.head_count")
    raw |= {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        "model_max_length": keys.get_int("context_length"),
        "linear_attn_config": {
            "kda_layers": [n + 1 for n in range(layers) if not is_full[n]],
            "full_attn_layers": [n + 1 for n in range(layers) if is_full[n]],
            "num_heads": kda_heads,
            "head_dim": keys.get_int("kda.head_dim"),
            "short_conv_kernel_size": keys.get_int("ssm.conv_kernel"),
        },
        "mla_use_nope": True,
        **latent_attention(keys),
        "moe_layer_freq": 1,
    }
    experts = sigmoid_experts(keys)
    if experts:
        raw |= {
            "num_experts": experts["experts"],
            "num_experts_per_token": experts["top_k"],
            "num_shared_experts": experts["shared"],
            "num_expert_group": experts["groups"],
            "topk_group": experts["top_groups"],
            "moe_renormalize": True,
            "moe_router_activation_func": "sigmoid",
            "moe_intermediate_size": experts["inner"],
            "routed_scaling_factor": experts["scale"],
            "first_k_dense_replace": experts["dense"],
        }
    return raw


def metadata(config: DecoderConfig) -> dict[str, Any]:
    """The keys to write. Raises UnsupportedError for what llama.cpp's files cannot say."""
    kda = next((layer.mixer for layer in config.layers if isinstance(layer.mixer, KdaDims)), None)
    mla = next((layer.mixer for layer in config.layers if isinstance(layer.mixer, MlaDims)), None)
    if kda is None or mla is None or kda.heads != mla.heads:
        raise UnsupportedError(
            "GGUF files need as many heads in KDA layers as in MLA layers; this model has other numbers"
        )
    return {
        **latent_attention_keys(mla),
        "attention.head_count_kv": [int(isinstance(layer.mixer, MlaDims)) for layer in config.layers],
        "ssm.conv_kernel": kda.taps,
        "kda.head_dim": kda.head_dim,
    }
