"""Kimi-Linear's checkpoints: how they are recognised and what their tensors are called."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from thalweg.models.family import DecoderConfig
from thalweg.models.kimi_linear.config import cut, read
from thalweg.models.parts.kda import KdaDims
from thalweg.models.parts.moe import MoeDims
from thalweg.models.parts.part import Names, prefixed

_KDA = {
    **{x: f"{x}_proj.weight" for x in ("q", "k", "v", "f_a", "g_a", "f_b", "g_b")},
    **{f"{x}_conv": f"{x}_conv1d.weight" for x in "qkv"},
    "beta": "b_proj.weight",
    "A_log": "A_log",
    "dt_bias": "dt_bias",
    "out_norm": "o_norm.weight",
    "out": "o_proj.weight",
}
_MLA = {
    "q": "q_proj.weight",
    "kv_a": "kv_a_proj_with_mqa.weight",
    "kv_norm": "kv_a_layernorm.weight",
    "kv_b": "kv_b_proj.weight",
    "out": "o_proj.weight",
}
_MLP = {x: f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")}
_MOE = {
    "router": "block_sparse_moe.gate.weight",
    "bias": "block_sparse_moe.gate.e_score_correction_bias",
    "gate": "block_sparse_moe.experts.{e}.w1.weight",
    "up": "block_sparse_moe.experts.{e}.w3.weight",
    "down": "block_sparse_moe.experts.{e}.w2.weight",
    **{f"shared_{x}": f"block_sparse_moe.shared_experts.{x}_proj.weight" for x in ("gate", "up", "down")},
}


class KimiLinear:
    """The family of Kimi-Linear-48B-A3B."""

    model_types = ("kimi_linear",)
    architectures = ("KimiLinearForCausalLM",)

    def read(self, raw: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
        return read(raw, where)

    def cut(self, raw: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
        return cut(raw, num_layers)

    def fitted(self, config: DecoderConfig, tensors: Collection[str]) -> DecoderConfig:
        return config

    def layout(self, config: DecoderConfig, tensors: Collection[str] = ()) -> KimiLinearLayout:
        return KimiLinearLayout(config)


class KimiLinearLayout:
    """The published checkpoints' names; there is no other layout."""

    mtp = None

    def __init__(self, config: DecoderConfig) -> None:
        self._config = config
        self.vocab = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
        self.ignored = ("*.rotary_emb.inv_freq", *(("lm_head.weight",) if config.vocab.tied else ()))

    def mixer(self, layer: int) -> Names:
        names = _KDA if isinstance(self._config.layers[layer].mixer, KdaDims) else _MLA
        at = f"model.layers.{layer}"
        return {"norm": f"{at}.input_layernorm.weight", **prefixed(f"{at}.self_attn.", names)}

    def mlp(self, layer: int) -> Names:
        names = _MOE if isinstance(self._config.layers[layer].mlp, MoeDims) else _MLP
        at = f"model.layers.{layer}"
        return {"norm": f"{at}.post_attention_layernorm.weight", **prefixed(f"{at}.", names)}
