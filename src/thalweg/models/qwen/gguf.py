"""Qwen3-Next and Qwen3.5 in GGUF files: hyperparameters to what config.json says of a text model."""

from __future__ import annotations

from typing import Any

from thalweg.config.gguf.keys import GgufKeys
from thalweg.errors import UnsupportedError
from thalweg.models.family import DecoderConfig
from thalweg.models.parts.gdn import GdnDims
from thalweg.models.parts.gguf_keys import common, expert_count, has_mtp, rope_keys, yarn
from thalweg.models.parts.gqa import GqaDims
from thalweg.models.qwen.config import FULL, GDN

NEXT, DENSE, MOE = "qwen3next", "qwen35", "qwen35moe"
_NAMES = {
    NEXT: ("Qwen3NextForCausalLM", "qwen3_next"),
    DENSE: ("Qwen3_5ForCausalLM", "qwen3_5_text"),
    MOE: ("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text"),
}
SPELT = frozenset({"model.embed_tokens.weight"})  # the prefix of a text model; neither packed nor stacked
PACKED = SPELT | {"model.layers.0.linear_attn.in_proj_qkvz.weight"}  # as Qwen3-Next is published


def config(keys: GgufKeys) -> dict[str, Any]:
    """config.json's object. Raises ConfigError."""
    architecture, model_type = _NAMES[keys.architecture]
    raw = common(keys)
    head_dim, value_heads = keys.get_int("attention.key_length"), keys.get_int("ssm.time_step_rank")
    keys.agree("attention.value_length", head_dim)
    if value_heads <= 0 or head_dim <= 0:
        raise keys.error("ssm.time_step_rank", "a number of value heads, and an attention.key_length, above 0")
    inner = keys.get_int("ssm.inner_size")
    if inner % value_heads:
        raise keys.error("ssm.inner_size", f"a multiple of ssm.time_step_rank {value_heads}")
    scaling = yarn(keys)
    return raw | {
        "architectures": [architecture],
        "model_type": model_type,
        "max_position_embeddings": keys.get_int("context_length"),
        "head_dim": head_dim,
        "num_attention_heads": keys.get_int("attention.head_count"),
        "num_key_value_heads": keys.get_int("attention.head_count_kv"),
        "layer_types": _kinds(keys, raw["num_hidden_layers"]),
        "linear_num_key_heads": keys.get_int("ssm.group_count"),
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": keys.get_int("ssm.state_size"),
        "linear_value_head_dim": inner // value_heads,
        "linear_conv_kernel_dim": keys.get_int("ssm.conv_kernel"),
        "rope_parameters": {
            **({"rope_type": "default"} if scaling is None else scaling),
            "rope_theta": keys.get_float("rope.freq_base"),
            "partial_rotary_factor": keys.get_int("rope.dimension_count") / head_dim,
        },
        "mtp_num_hidden_layers": int(has_mtp(keys.tensors, raw["num_hidden_layers"])),
        **_experts(keys),
    }


def _kinds(keys: GgufKeys, layers: int) -> list[str]:
    recurrent = keys.get_list("attention.recurrent_layers", None)
    if recurrent is None:
        interval = keys.get_int("full_attention_interval", 4)
        if interval <= 0:
            raise keys.error("full_attention_interval", "an integer above 0")
        recurrent = [(n + 1) % interval != 0 for n in range(layers)]
    if len(recurrent) < layers:
        raise keys.error("attention.recurrent_layers", f"true or false for each of {layers} layers")
    return [GDN if here else FULL for here in recurrent[:layers]]


def _experts(keys: GgufKeys) -> dict[str, Any]:
    experts = expert_count(keys)
    if not experts:
        return {}
    inner = keys.get_int("expert_feed_forward_length")
    if keys.get_int("expert_gating_func", 1) != 1:
        raise keys.error("expert_gating_func", "1, which is softmax")
    return {
        "num_experts": experts,
        "num_experts_per_tok": keys.get_int("expert_used_count"),
        "moe_intermediate_size": inner,
        "shared_expert_intermediate_size": keys.get_int("expert_shared_feed_forward_length", inner),
        "norm_topk_prob": True,
    }


def metadata_35(config: DecoderConfig) -> dict[str, Any]:
    """Besides, pairs of dims by axis of position: for images alone, since text has one position on all of them."""
    keys = metadata(config)
    pairs = keys["rope.dimension_count"] // 2
    first = -(-pairs // 3)
    second = -(-(pairs - first) // 2)
    return {**keys, "rope.dimension_sections": [first, second, pairs - first - second, 0]}


def metadata(config: DecoderConfig) -> dict[str, Any]:
    """The keys to write. Raises UnsupportedError for what llama.cpp's files cannot say."""
    gdn = next((layer.mixer for layer in config.layers if isinstance(layer.mixer, GdnDims)), None)
    gqa = next((layer.mixer for layer in config.layers if isinstance(layer.mixer, GqaDims)), None)
    if gdn is None or gqa is None or gdn.key_dim != gdn.value_dim:
        raise UnsupportedError(
            "GGUF files need attention layers, and GDN layers with keys as wide as values; this model differs"
        )
    layers = config.layers if config.mtp is None else (*config.layers, config.mtp)
    full = [isinstance(layer.mixer, GqaDims) for layer in layers]
    return {
        "attention.head_count": gqa.heads,
        "attention.head_count_kv": gqa.kv_heads,
        "attention.key_length": gqa.head_dim,
        "attention.value_length": gqa.head_dim,
        **rope_keys(gqa.rope),
        "ssm.conv_kernel": gdn.taps,
        "ssm.state_size": gdn.key_dim,
        "ssm.group_count": gdn.key_heads,
        "ssm.time_step_rank": gdn.value_heads,
        "ssm.inner_size": gdn.value_heads * gdn.value_dim,
        "full_attention_interval": full.index(True) + 1,
        "attention.recurrent_layers": [not here for here in full],
    }
