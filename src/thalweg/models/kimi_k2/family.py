"""Checkpoints of DeepSeek-V3's architecture: how they are recognised and what their tensors are called."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from thalweg.models.family import DecoderConfig, cut_layers
from thalweg.models.kimi_k2.config import read
from thalweg.models.parts.mla import MlaDims
from thalweg.models.parts.moe import MoeDims
from thalweg.models.parts.part import Names, prefixed

_KV = {
    "kv_a": "kv_a_proj_with_mqa.weight",
    "kv_norm": "kv_a_layernorm.weight",
    "kv_b": "kv_b_proj.weight",
    "out": "o_proj.weight",
}
_MLA = _KV | {"q": "q_proj.weight"}
_MLA_LOW_RANK = _KV | {"q_a": "q_a_proj.weight", "q_norm": "q_a_layernorm.weight", "q_b": "q_b_proj.weight"}
_MLP = {x: f"{x}_proj.weight" for x in ("gate", "up", "down")}
_MOE = {
    "router": "gate.weight",
    "bias": "gate.e_score_correction_bias",
    **{x: f"experts.{{e}}.{x}_proj.weight" for x in ("gate", "up", "down")},
    **{f"shared_{x}": f"shared_experts.{x}_proj.weight" for x in ("gate", "up", "down")},
}
_BESIDE_VISION = "language_model."  # before all names of a text model beside a vision model
_VISION = ("vision_tower.*", "mm_projector.*", "multi_modal_projector.*")


class KimiK2:
    """Kimi-K2 and K2.5, DeepSeek-V3 and R1, and what shares their layout. Vision tensors are skipped."""

    model_types = ("kimi_k2", "kimi_k25", "deepseek_v3")
    architectures = ("DeepseekV3ForCausalLM", "KimiK25ForConditionalGeneration")

    def read(self, raw: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
        return read(raw, where)

    def cut(self, raw: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
        return cut_layers(raw, num_layers)

    def fitted(self, config: DecoderConfig, tensors: Collection[str]) -> DecoderConfig:
        return config

    def layout(self, config: DecoderConfig, tensors: Collection[str] = ()) -> KimiK2Layout:
        beside_vision = f"{_BESIDE_VISION}model.embed_tokens.weight" in tensors
        return KimiK2Layout(config, _BESIDE_VISION if beside_vision else "")


class KimiK2Layout:
    """The published names, after `prefix`.

    Not read: the layer that drafts tokens, which has the number after the last one's (DeepSeek-V3's 61), the shapes
    beside int4 weights, which config.json gives already, and frequencies.
    """

    mtp = None

    def __init__(self, config: DecoderConfig, prefix: str) -> None:
        self._config, self._prefix = config, prefix
        head = f"{prefix}lm_head.weight"
        model = f"{prefix}model."
        self.vocab: Names = {"embed": f"{model}embed_tokens.weight", "norm": f"{model}norm.weight", "head": head}
        self.ignored = (
            f"{self._at(len(config.layers))}*",
            "*.rotary_emb.inv_freq",
            "*.weight_shape",
            *(_VISION if prefix else ()),
            *((head,) if config.vocab.tied else ()),
        )

    def mixer(self, layer: int) -> Names:
        at = self._at(layer)
        mixer = self._config.layers[layer].mixer
        names = _MLA if isinstance(mixer, MlaDims) and mixer.q_rank is None else _MLA_LOW_RANK
        return {"norm": f"{at}input_layernorm.weight", **prefixed(f"{at}self_attn.", names)}

    def mlp(self, layer: int) -> Names:
        at = self._at(layer)
        names = _MOE if isinstance(self._config.layers[layer].mlp, MoeDims) else _MLP
        return {"norm": f"{at}post_attention_layernorm.weight", **prefixed(f"{at}mlp.", names)}

    def _at(self, layer: int) -> str:
        return f"{self._prefix}model.layers.{layer}."
