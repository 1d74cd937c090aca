"""The Qwen families' checkpoints: how they are recognised and what their tensors are called."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from thalweg.models.family import DecoderConfig, MtpNames, cut_layers
from thalweg.models.parts.gdn import GdnDims
from thalweg.models.parts.moe import MoeDims
from thalweg.models.parts.part import Names, prefixed
from thalweg.models.qwen.config import read

HEAD = "lm_head.weight"

_GDN_COMMON = {
    "conv": "conv1d.weight",
    "A_log": "A_log",
    "dt_bias": "dt_bias",
    "out_norm": "norm.weight",
    "out": "out_proj.weight",
}
_GDN_PACKED = {x: f"in_proj_{x}.weight" for x in ("qkvz", "ba")}
_GDN_PLAIN = {x: f"in_proj_{x}.weight" for x in ("qkv", "z", "b", "a")}
_GQA = {
    **{x: f"{x}_proj.weight" for x in ("q", "k", "v")},
    **{x: f"{x}.weight" for x in ("q_norm", "k_norm")},
    "out": "o_proj.weight",
}
_MLP = {x: f"{x}_proj.weight" for x in ("gate", "up", "down")}
_MOE = {
    "router": "gate.weight",
    **{f"shared_{x}": f"shared_expert.{x}_proj.weight" for x in ("gate", "up", "down")},
    "shared_scale": "shared_expert_gate.weight",
}
_EACH = {x: f"experts.{{e}}.{x}_proj.weight" for x in ("gate", "up", "down")}
_STACKED = {"stacked_gate_up": "experts.gate_up_proj", "stacked_down": "experts.down_proj"}
_MTP_LAYER = "mtp.layers.0."
_MTP = {
    "fc": "mtp.fc.weight",
    "embedding_norm": "mtp.pre_fc_norm_embedding.weight",
    "hidden_norm": "mtp.pre_fc_norm_hidden.weight",
    "norm": "mtp.norm.weight",
}


class Qwen:
    """What Qwen3-Next and Qwen3.5 share: all but the published layout."""

    stacked = True  # published bf16 checkpoints keep all experts of a layer in one tensor
    prefix = "model.language_model."

    def read(self, raw: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
        return read(raw, where)

    def cut(self, raw: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
        return cut_layers(raw, num_layers)

    def fitted(self, config: DecoderConfig, tensors: Collection[str]) -> DecoderConfig:
        """Both levels of config.json may speak of tied embeddings; a checkpoint without a head has them."""
        if not tensors or HEAD in tensors:
            return config
        return replace(config, vocab=replace(config.vocab, tied=True))

    def layout(self, config: DecoderConfig, tensors: Collection[str] = ()) -> QwenLayout:
        """Either prefix occurs, and experts stacked or each by itself."""
        prefix, packed, stacked = self.prefix, self.packed, self.stacked and config.quantized is None
        if tensors:
            prefix = next((p for p in (self.prefix, "model.") if f"{p}embed_tokens.weight" in tensors), self.prefix)
            packed = any(name.endswith("in_proj_qkvz.weight") for name in tensors)
            stacked = any(name.endswith("experts.gate_up_proj") and name.startswith(prefix) for name in tensors)
        mtp_stacked = f"{_MTP_LAYER}mlp.experts.gate_up_proj" in tensors  # in published checkpoints they are not
        return QwenLayout(config, prefix, packed=packed, stacked=stacked, mtp_stacked=mtp_stacked)

    packed = False


class Qwen35(Qwen):
    """Qwen3.5, 3.6 and 3.8, dense and MoE. Vision tensors are skipped."""

    model_types = ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")
    architectures = (
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5ForCausalLM",
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5MoeForCausalLM",
    )


class Qwen3Next(Qwen):
    """Qwen3-Next: inputs of Gated DeltaNet packed key head by key head, each expert by itself."""

    model_types = ("qwen3_next",)
    architectures = ("Qwen3NextForCausalLM",)
    prefix, packed, stacked = "model.", True, False


class QwenLayout:
    """Names below `prefix`; the inputs of Gated DeltaNet packed per key head or not, the experts stacked or not."""

    def __init__(self, config: DecoderConfig, prefix: str, *, packed: bool, stacked: bool, mtp_stacked: bool) -> None:
        self._config, self._prefix = config, prefix
        self._gdn = _GDN_COMMON | (_GDN_PACKED if packed else _GDN_PLAIN)
        self._moe = _MOE | (_STACKED if stacked else _EACH)
        self.vocab: Names = {"embed": f"{prefix}embed_tokens.weight", "norm": f"{prefix}norm.weight", "head": HEAD}
        # Text does not need the vision model.
        self.ignored = ("model.visual.*", "visual.*", *((HEAD,) if config.vocab.tied else ()))
        self._mtp_moe = _MOE | (_STACKED if mtp_stacked else _EACH)

    @property
    def mtp(self) -> MtpNames:
        mlp = self._mtp_moe if isinstance(self._config.layers[0].mlp, MoeDims) else _MLP
        return MtpNames(_MTP, _attention(_MTP_LAYER), _feed_forward(_MTP_LAYER, mlp), "mtp.*")

    def mixer(self, layer: int) -> Names:
        at = f"{self._prefix}layers.{layer}."
        if isinstance(self._config.layers[layer].mixer, GdnDims):
            return {"norm": f"{at}input_layernorm.weight", **prefixed(f"{at}linear_attn.", self._gdn)}
        return _attention(at)

    def mlp(self, layer: int) -> Names:
        is_moe = isinstance(self._config.layers[layer].mlp, MoeDims)
        return _feed_forward(f"{self._prefix}layers.{layer}.", self._moe if is_moe else _MLP)


def _attention(at: str) -> Names:
    return {"norm": f"{at}input_layernorm.weight", **prefixed(f"{at}self_attn.", _GQA)}


def _feed_forward(at: str, names: Names) -> Names:
    return {"norm": f"{at}post_attention_layernorm.weight", **prefixed(f"{at}mlp.", names)}
