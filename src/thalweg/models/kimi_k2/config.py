"""config.json of DeepSeek-V3's architecture: flat, or a text model's beside a vision model's (Kimi-K2.5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thalweg.config.hf import HOUSEKEEPING_KEYS, ConfigReader, checkpoint_dtype
from thalweg.models.family import DecoderConfig, FeedForward, LayerConfig
from thalweg.models.parts.mla import read_rotated_mla
from thalweg.models.parts.mlp import MlpDims
from thalweg.models.parts.moe import MoeKeys, read_moe
from thalweg.models.parts.part import MAX_DIM, MAX_EXPERTS, MAX_LAYERS
from thalweg.models.parts.quantized import Quantized, read_quantized
from thalweg.models.parts.vocab import VocabDims

# Of training, and the width of what is rotated once more; the base model has no use for bos.
_UNUSED_KEYS = frozenset({"aux_loss_alpha", "seq_aux", "ep_size", "head_dim", "bos_token_id"})
# Beside the text model's keys: the vision model, and which tokens stand for what it sees.
_VISION_KEYS = frozenset(
    {"text_config", "vision_config", "media_placeholder_token_id", "video_placeholder", "use_unified_vision_chunk"}
    | {"ignore_index", "bos_token_id"}
)
_MOE_KEYS = MoeKeys(
    experts="n_routed_experts",
    top_k="num_experts_per_tok",
    shared="n_shared_experts",
    groups="n_group",
    top_groups="topk_group",
    renormalize="norm_topk_prob",
    scoring="scoring_func",
    also=("moe_intermediate_size", "routed_scaling_factor", "topk_method"),
)


def read(raw: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """As Family.read says."""
    text = raw.get("text_config")
    if text is None:
        return _read_text(raw, where, quantized=None, tied=False)
    outer = ConfigReader(raw, where)
    if not isinstance(text, Mapping):
        raise outer.error("text_config", "an object")
    quantized = read_quantized(outer)
    outer.get_token_ids("eos_token_id")
    tied = outer.get_bool("tie_word_embeddings", False)
    outer.finish(ignored=HOUSEKEEPING_KEYS | _VISION_KEYS)
    dtype = {key: raw[key] for key in ("dtype", "torch_dtype") if raw.get(key) is not None}
    return _read_text({**dtype, **text}, f"{where}: text_config", "text_config.", quantized=quantized, tied=tied)


def _read_text(
    raw: Mapping[str, Any], where: str, path: str = "", *, quantized: Quantized | None, tied: bool
) -> DecoderConfig:
    reader = ConfigReader(raw, where, path)
    reader.only("attention_bias", False)
    reader.only("hidden_act", "silu")
    # The layer that drafts tokens stands behind the last one; its tensors are skipped.
    reader.get_int("num_nextn_predict_layers", 0, high=1)
    vocab_size = reader.get_int("vocab_size", low=1, high=MAX_DIM)
    eos = reader.get_token_ids("eos_token_id")
    if any(i >= vocab_size for i in eos):
        raise reader.error("eos_token_id", f"ids below vocab_size {vocab_size}")
    mla = read_rotated_mla(reader)
    config = DecoderConfig(
        width=reader.get_int("hidden_size", low=1, high=MAX_DIM),
        vocab=VocabDims(vocab_size, reader.get_bool("tie_word_embeddings", False) or tied),
        layers=tuple(LayerConfig(mla, mlp) for mlp in _read_feed_forwards(reader)),
        eps=reader.get_float("rms_norm_eps", low=0, high=1),
        context_len=reader.get_int("max_position_embeddings", low=1),
        dtype=checkpoint_dtype(raw, where),
        eos_token_ids=eos,
        quantized=read_quantized(reader) or quantized,
    )
    reader.finish(ignored=HOUSEKEEPING_KEYS | _UNUSED_KEYS)
    return config


def _read_feed_forwards(reader: ConfigReader) -> list[FeedForward]:
    """What stands in each layer. n_routed_experts null or 0 makes every layer dense."""
    count = reader.get_int("num_hidden_layers", low=1, high=MAX_LAYERS)
    experts = reader.get_int("n_routed_experts", 0, high=MAX_EXPERTS)
    first = reader.get_int("first_k_dense_replace", 0)
    every = reader.get_int("moe_layer_freq", 1, low=1)
    is_moe = [experts > 0 and i >= first and i % every == 0 for i in range(count)]
    blocks: dict[bool, FeedForward] = {}
    if any(is_moe):
        reader.only("topk_method", "noaux_tc")
        blocks[True] = read_moe(reader, _MOE_KEYS)
    else:
        reader.skip(*_MOE_KEYS.all())
    if all(is_moe):
        reader.skip("intermediate_size")
    else:
        blocks[False] = MlpDims(reader.get_int("intermediate_size", low=1, high=MAX_DIM))
    return [blocks[moe] for moe in is_moe]
