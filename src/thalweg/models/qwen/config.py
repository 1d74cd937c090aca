"""config.json of the Qwen families: flat, or a text model's beside a vision model's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thalweg.config.hf import HOUSEKEEPING_KEYS, ConfigReader, checkpoint_dtype
from thalweg.errors import ConfigError
from thalweg.models.family import DecoderConfig, FeedForward, LayerConfig
from thalweg.models.parts.gdn import GdnDims
from thalweg.models.parts.gqa import GqaDims
from thalweg.models.parts.mlp import MlpDims
from thalweg.models.parts.moe import MoeDims
from thalweg.models.parts.part import MAX_DIM, MAX_EXPERTS, MAX_LAYERS
from thalweg.models.parts.quantized import Fp8Checkpoint, read_fp8
from thalweg.models.parts.rope import read_rope
from thalweg.models.parts.vocab import VocabDims

GDN, FULL = "linear_attention", "full_attention"

# Beside the text model's keys: which tokens stand for images, and the vision model, which text does not need.
_VISION_KEYS = frozenset(
    {"vision_config", "language_model_only"}
    | {f"{x}_token_id" for x in ("image", "video", "vision_start", "vision_end")}
)
_UNUSED_KEYS = frozenset({"bos_token_id"})


def read(raw: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """As Family.read says."""
    text = raw.get("text_config")
    if text is None:
        return _read_text(raw, where, tied=False, fp8=None)
    if not isinstance(text, Mapping):
        raise ConfigReader(raw, where).error("text_config", "an object")
    outer = ConfigReader(raw, where)
    fp8 = read_fp8(outer)
    outer.get_token_ids("eos_token_id")
    tied = outer.get_bool("tie_word_embeddings", False)
    outer.finish(ignored=HOUSEKEEPING_KEYS | _VISION_KEYS | {"text_config"})
    dtype = {key: raw[key] for key in ("dtype", "torch_dtype") if raw.get(key) is not None}
    return _read_text({**dtype, **text}, f"{where}: text_config", "text_config.", tied=tied, fp8=fp8)


def _read_text(
    raw: Mapping[str, Any], where: str, path: str = "", *, tied: bool, fp8: Fp8Checkpoint | None
) -> DecoderConfig:
    reader = ConfigReader(raw, where, path)
    _refuse_other_maths(reader)
    vocab_size = reader.get_int("vocab_size", low=1, high=MAX_DIM)
    eos = reader.get_token_ids("eos_token_id")
    if any(i >= vocab_size for i in eos):
        raise reader.error("eos_token_id", f"ids below vocab_size {vocab_size}")
    kinds = _read_kinds(reader)
    gdn, gqa, mlp = _read_gdn(reader), _read_gqa(reader), _read_feed_forward(reader)
    drafting = reader.get_int("mtp_num_hidden_layers", 1)  # Qwen3-Next has the layer without the key
    config = DecoderConfig(
        width=reader.get_int("hidden_size", low=1, high=MAX_DIM),
        vocab=VocabDims(vocab_size, reader.get_bool("tie_word_embeddings", False) or tied),
        layers=tuple(LayerConfig(gdn if kind == GDN else gqa, mlp) for kind in kinds),
        eps=reader.get_float("rms_norm_eps", low=0, high=1),
        context_len=reader.get_int("max_position_embeddings", low=1),
        dtype=checkpoint_dtype(raw, where),
        eos_token_ids=eos,
        shifted_norms=True,
        mtp=LayerConfig(gqa, mlp) if drafting == 1 else None,
        quantized=read_fp8(reader) or fp8,
    )
    reader.finish(ignored=HOUSEKEEPING_KEYS | _VISION_KEYS | _UNUSED_KEYS)
    return config


def _refuse_other_maths(reader: ConfigReader) -> None:
    reader.only("attention_bias", False)
    reader.only("hidden_act", "silu")
    reader.only("attn_output_gate", True)
    reader.only("mamba_ssm_dtype", "float32")
    reader.only("mtp_use_dedicated_embeddings", False)
    gate = reader.get_str("output_gate_type", "swish")
    if gate not in ("swish", "silu"):
        raise reader.error("output_gate_type", "'swish', which is 'silu'")


def _read_kinds(reader: ConfigReader) -> list[str]:
    """Every fourth layer is full attention, or as layer_types says."""
    count = reader.get_int("num_hidden_layers", low=1, high=MAX_LAYERS)
    interval = reader.get_int("full_attention_interval", 4, low=1)
    regular = [FULL if (i + 1) % interval == 0 else GDN for i in range(count)]
    kinds = reader.get_str_list("layer_types", regular)
    if len(kinds) != count or not set(kinds) <= {GDN, FULL}:
        raise ConfigError(
            f"{reader.where}: layer_types has {len(kinds)} entries, {sorted(set(kinds))};"
            f" expected num_hidden_layers {count} of {GDN!r} or {FULL!r}"
        )
    return kinds


def _read_gdn(reader: ConfigReader) -> GdnDims:
    dims = GdnDims(
        key_heads=reader.get_int("linear_num_key_heads", low=1, high=MAX_DIM),
        value_heads=reader.get_int("linear_num_value_heads", low=1, high=MAX_DIM),
        key_dim=reader.get_int("linear_key_head_dim", low=1, high=MAX_DIM),
        value_dim=reader.get_int("linear_value_head_dim", low=1, high=MAX_DIM),
        taps=reader.get_int("linear_conv_kernel_dim", low=2, high=64),
    )
    if dims.value_heads % dims.key_heads:
        raise reader.error("linear_num_value_heads", f"a multiple of linear_num_key_heads {dims.key_heads}")
    return dims


def _read_gqa(reader: ConfigReader) -> GqaDims:
    heads = reader.get_int("num_attention_heads", low=1, high=MAX_DIM)
    kv_heads = reader.get_int("num_key_value_heads", low=1, high=MAX_DIM)
    if heads % kv_heads:
        raise reader.error("num_key_value_heads", f"a divisor of num_attention_heads {heads}")
    head_dim = reader.get_int("head_dim", low=1, high=MAX_DIM)
    return GqaDims(heads, kv_heads, head_dim, read_rope(reader, head_dim))


def _read_feed_forward(reader: ConfigReader) -> FeedForward:
    experts = reader.get_int("num_experts", 0, high=MAX_EXPERTS)
    if not experts:
        reader.skip("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")
        return MlpDims(reader.get_int("intermediate_size", low=1, high=MAX_DIM))
    reader.only("decoder_sparse_step", 1)
    reader.only("mlp_only_layers", [])
    reader.skip("intermediate_size")  # of dense layers, of which there are none
    top_k = reader.get_int("num_experts_per_tok", low=1)
    if top_k > experts:
        raise reader.error("num_experts_per_tok", f"at most num_experts {experts}")
    return MoeDims(
        experts=experts,
        top_k=top_k,
        inner=reader.get_int("moe_intermediate_size", low=1, high=MAX_DIM),
        renormalize=reader.get_bool("norm_topk_prob", True),
        scoring="softmax",
        gated_shared=reader.get_int("shared_expert_intermediate_size", low=1, high=MAX_DIM),
    )
