"""Kimi-Linear's config.json: its own keys, checked against each other. Layers count from 1 there and from 0 here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thalweg.config.hf import HOUSEKEEPING_KEYS, ConfigReader, checkpoint_dtype
from thalweg.errors import ConfigError
from thalweg.models.family import DecoderConfig, FeedForward, LayerConfig, Mixer, cut_layers
from thalweg.models.parts.kda import KdaDims
from thalweg.models.parts.mla import read_mla
from thalweg.models.parts.mlp import MlpDims
from thalweg.models.parts.moe import MoeKeys, read_moe
from thalweg.models.parts.part import MAX_DIM, MAX_EXPERTS, MAX_LAYERS
from thalweg.models.parts.vocab import VocabDims

# Read by nobody: hidden_size / heads, and the rotary base of a model that never rotates.
_UNUSED_KEYS = frozenset({"head_dim", "rope_theta", "bos_token_id", "max_position_embeddings"})

_MOE_KEYS = MoeKeys(
    experts="num_experts",
    top_k="num_experts_per_token",
    shared="num_shared_experts",
    groups="num_expert_group",
    top_groups="topk_group",
    renormalize="moe_renormalize",
    scoring="moe_router_activation_func",
    also=("moe_intermediate_size", "routed_scaling_factor", "use_grouped_topk"),
)


def read(raw: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """As Family.read says."""
    reader = ConfigReader(raw, where)
    _refuse_other_maths(reader)
    num_layers = reader.get_int("num_hidden_layers", low=1, high=MAX_LAYERS)
    vocab_size = reader.get_int("vocab_size", low=1, high=MAX_DIM)
    eos = reader.get_token_ids("eos_token_id")
    if any(i >= vocab_size for i in eos):
        raise reader.error("eos_token_id", f"ids below vocab_size {vocab_size}")
    mixers, feed_forwards = _read_mixers(reader, num_layers), _read_feed_forwards(reader, num_layers)
    old_key = raw.get("model_max_length") is None and raw.get("max_position_embeddings") is not None
    config = DecoderConfig(
        width=reader.get_int("hidden_size", low=1, high=MAX_DIM),
        vocab=VocabDims(vocab_size, reader.get_bool("tie_word_embeddings", False)),
        layers=tuple(LayerConfig(*pair) for pair in zip(mixers, feed_forwards, strict=True)),
        eps=reader.get_float("rms_norm_eps", low=0, high=1),
        context_len=reader.get_int("max_position_embeddings" if old_key else "model_max_length", low=1),
        dtype=checkpoint_dtype(raw, where),
        eos_token_ids=eos,
    )
    reader.finish(ignored=HOUSEKEEPING_KEYS | _UNUSED_KEYS)
    return config


def _refuse_other_maths(reader: ConfigReader) -> None:
    """Keys whose other values would need another forward pass than the one written here."""
    reader.only("attention_bias", False)
    reader.only("hidden_act", "silu")
    reader.only("q_lora_rank", None)
    reader.only("mla_use_nope", True, default=False)
    reader.only("rope_scaling", None)
    reader.only("num_nextn_predict_layers", 0)
    reader.only("quantization_config", None)
    rope = reader.get_section("rope_parameters")
    if rope is not None:
        rope.only("rope_type", "default")
        rope.finish(ignored={"rope_theta"})


def _read_mixers(reader: ConfigReader, num_layers: int) -> list[Mixer]:
    """What stands in each layer. Without linear_attn_config every layer is MLA."""
    section = reader.get_section("linear_attn_config")
    kda_1 = section.get_int_list("kda_layers") if section else []
    full_1 = section.get_int_list("full_attn_layers") if section else list(range(1, num_layers + 1))
    if sorted(kda_1 + full_1) != list(range(1, num_layers + 1)):
        raise ConfigError(
            f"{reader.where}: linear_attn_config has {len(kda_1)} kda_layers, {len(full_1)} full_attn_layers;"
            f" expected each of 1 to num_hidden_layers {num_layers} in exactly one of them"
        )
    is_kda = [i + 1 in set(kda_1) for i in range(num_layers)]
    reader.agree("layer_types", ["linear_attention" if here else "full_attention" for here in is_kda])
    mixers = {
        True: _read_kda(reader, section if any(is_kda) else None),
        False: read_mla(reader, needed=not all(is_kda)),
    }
    if section is not None:
        section.finish(ignored={"num_heads", "head_dim", "short_conv_kernel_size"})
    return [mixer for kda in is_kda if (mixer := mixers[kda]) is not None]


def _read_kda(reader: ConfigReader, section: ConfigReader | None) -> KdaDims | None:
    if section is None:
        reader.skip("linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim")
        return None
    head_dim = section.get_int("head_dim", low=1, high=MAX_DIM)
    dims = KdaDims(
        heads=section.get_int("num_heads", low=1, high=MAX_DIM),
        head_dim=head_dim,
        taps=section.get_int("short_conv_kernel_size", low=2, high=64),
        rank=head_dim,  # of f_a, f_b, g_a and g_b, as the published layout has it
    )
    reader.agree("linear_num_heads", dims.heads)
    reader.agree("linear_head_dim", dims.head_dim)
    reader.agree("linear_conv_kernel_dim", dims.taps)
    return dims


def _read_feed_forwards(reader: ConfigReader, num_layers: int) -> list[FeedForward]:
    """What stands in each layer. num_experts null or 0 makes every layer dense."""
    num_experts = reader.get_int("num_experts", 0, high=MAX_EXPERTS)
    first = reader.get_int("first_k_dense_replace", 0)
    freq = reader.get_int("moe_layer_freq", 1, low=1)
    is_moe = [num_experts > 0 and i >= first and i % freq == 0 for i in range(num_layers)]
    reader.agree("mlp_layer_types", ["sparse" if moe else "dense" for moe in is_moe])
    blocks: dict[bool, FeedForward] = {}
    if any(is_moe):
        blocks[True] = moe = read_moe(reader, _MOE_KEYS)
        if moe.groups > 1:
            reader.only("use_grouped_topk", True)
        else:
            reader.get_bool("use_grouped_topk", True)  # one group: both ways choose alike
    else:
        reader.skip(*_MOE_KEYS.all())
    if all(is_moe):
        reader.skip("intermediate_size")
    else:
        blocks[False] = MlpDims(reader.get_int("intermediate_size", low=1, high=MAX_DIM))
    return [blocks[moe] for moe in is_moe]


def cut(raw: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """As Family.cut says."""
    shorter = cut_layers(raw, num_layers)
    kinds = raw.get("linear_attn_config")
    if isinstance(kinds, Mapping):
        shorter["linear_attn_config"] = {
            key: [n for n in value if n <= num_layers] if isinstance(value, list) else value
            for key, value in kinds.items()
        }
    return shorter
