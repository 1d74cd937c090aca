"""Configs of the Qwen families: published ones, later keys, longer contexts, and what is refused in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.models import random_kimi_k2
from tests.models import random_qwen as random
from tests.models.plans import read
from thalweg.config.hf import without_keys
from thalweg.errors import ConfigError, ThalwegError
from thalweg.models import family_of
from thalweg.models.family import DecoderConfig
from thalweg.models.parts.gdn import GdnDims
from thalweg.models.parts.gqa import GqaDims
from thalweg.models.parts.moe import MoeDims
from thalweg.models.parts.quantized import Fp8Checkpoint
from thalweg.models.parts.rope import RopeDims, Yarn

FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head"],
}
PUBLISHED = {
    "qwen3_5_9b": (32, 4096, 16, 4, 32),
    "qwen3_5_35b_a3b": (40, 2048, 16, 2, 32),
    "qwen3_next_80b_a3b": (48, 2048, 16, 2, 32),
}
ROPE = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
FLAT = {"rope_theta": 1e7, "partial_rotary_factor": 0.25}


def test_modules_are_kept_out_of_float8_by_whole_names() -> None:
    checkpoint = Fp8Checkpoint(frozenset({"a.mlp", "a.b.in_proj"}))
    kept = ["a.mlp.up_proj.weight", "a.mlp.weight", "a.b.in_proj.weight"]
    stored = ["a.mlp_up.weight", "a.b.in_proj_qkv.weight", "b.a.mlp.up_proj.weight", "a.up_proj.weight"]
    assert [checkpoint.lists(name) for name in (*kept, *stored)] == [False] * 3 + [True] * 4


def test_published_shapes(shared_dir: Path) -> None:
    raws = {name: json.loads((shared_dir / f"configs/{name}.json").read_text()) for name in PUBLISHED}
    for name, raw in raws.items():
        c, (layers, width, heads, kv_heads, value_heads) = read(raw), PUBLISHED[name]
        full = [i for i, layer in enumerate(c.layers) if isinstance(layer.mixer, GqaDims)]
        assert full == list(range(3, layers, 4))
        assert (len(c.layers), c.width, c.context_len) == (layers, width, 262_144)
        assert c.layers[0].mixer == GdnDims(16, value_heads, 128, 128, 4)
        assert c.layers[3].mixer == GqaDims(heads, kv_heads, 256, RopeDims(64, 1e7))
        assert c.shifted_norms
    mlp = read(raws["qwen3_next_80b_a3b"]).layers[0].mlp
    assert mlp == MoeDims(512, 10, 512, scoring="softmax", gated_shared=512)


def test_a_config_of_a_million_tokens() -> None:
    sections = {"mrope_section": [11, 11, 10], "mrope_interleaved": True}
    stretched = {**ROPE, **sections, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262_144}
    c = read(random.config(head_dim=256, rope_parameters=stretched, max_position_embeddings=1_010_000))
    assert isinstance(c.layers[3].mixer, GqaDims)
    assert c.layers[3].mixer.rope == RopeDims(64, 1e7, Yarn(4.0, 262_144))
    assert c.context_len == 1_010_000
    older = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262_144}
    next_ = {**random.as_next(random.config(head_dim=256)), "rope_scaling": older}
    assert read(next_).layers == c.layers


@pytest.mark.parametrize("gate", ["swish", "silu"])
def test_keys_of_later_versions(gate: str) -> None:
    later = dict(output_gate_type=gate, partial_rotary_factor=0.25, mlp_only_layers=[], pad_token_id=1)
    assert read(random.config(**later)) == read(random.config())
    nested = random.nested(random.config(**later))
    outer: dict[str, Any] = {"language_model_only": False, "vision_config": {"model_type": "qwen3_5_vision"}}
    assert read({**nested, **outer}) == read(random.config())


def quantized(**changes: Any) -> dict[str, Any]:
    return {"quantization_config": {**FP8, **changes}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen4_exp"}, "model_type is 'qwen4_exp'; expected one of"),
        (
            {"rope_parameters": {**ROPE, "rope_type": "longrope"}},
            "rope_type is 'longrope'; expected 'default' or 'yarn'",
        ),
        ({"rope_parameters": {**ROPE, "rope_type": "yarn"}}, "rope_parameters: factor is missing"),
        ({"rope_parameters": {**ROPE, "mystery": 1}}, "rope_parameters: unknown key mystery"),
        ({"rope_parameters": {**ROPE, "partial_rotary_factor": 0.05}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e7}}, "partial_rotary_factor is missing"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "rope_theta is missing"),
        ({"rope_parameters": None}, "is missing"),
        ({"rope_parameters": None, **FLAT, "rope_scaling": {"type": "yarn"}}, "rope_scaling: factor is missing"),
        (
            {"rope_parameters": None, **FLAT, "rope_scaling": {"type": "linear"}},
            "rope_scaling: type is 'linear'; expected",
        ),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        (quantized(quant_method="gptq"), "quant_method is 'gptq'"),
        (quantized(quant_method="awq"), "quant_method is 'awq'"),
        (quantized(quant_method="compressed-tensors"), "quant_method is 'compressed-tensors'"),
        (quantized(weight_block_size=[1, 128]), "weight_block_size is [1, 128]; expected [128, 128]"),
        (quantized(activation_scheme="static"), "activation_scheme is 'static'"),
        (quantized(fmt="e5m2"), "fmt is 'e5m2'"),
        ({"attention_bias": True}, "attention_bias is true; only false"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ({"attn_output_gate": False}, "attn_output_gate is false; only true"),
        ({"output_gate_type": "sigmoid"}, "output_gate_type is 'sigmoid'; expected 'swish'"),
        ({"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype is 'bfloat16'; only 'float32'"),
        ({"layer_types": ["linear_attention"] * 3}, "layer_types has 3 entries"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types has 4 entries, ['sliding_attention']"),
        ({"linear_num_value_heads": 5}, "linear_num_value_heads is 5; expected a multiple of linear_num_key_heads 2"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; expected a divisor of num_attention_heads 4"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok is 7; expected at most num_experts 6"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers is [0]; only []"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2; only 1"),
        ({"head_dim": None}, "head_dim is missing"),
        ({"eos_token_id": 131}, "eos_token_id is 131; expected ids below vocab_size 131"),
        ({"mystery": 1}, "unknown key mystery"),
    ],
)
@pytest.mark.parametrize("form", ["flat", "nested"])
def test_what_is_not_supported_or_contradicts_itself_is_one_line(
    changes: dict[str, Any], message: str, form: str
) -> None:
    raw = random.config(**changes)
    if form == "nested":
        if "model_type" in changes:
            return
        raw = random.nested(raw)
    with pytest.raises(ThalwegError) as caught:
        read(raw)
    text = str(caught.value)
    assert text.startswith("config.json: ")
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize("nested", [random.nested(random.config()), random_kimi_k2.nested(random_kimi_k2.config())])
def test_the_option_that_an_unknown_key_is_told_with_passes_it_over(nested: dict[str, Any]) -> None:
    raw = nested | {"text_config": nested["text_config"] | {"window": 4096}}
    with pytest.raises(ConfigError, match="text_config: unknown key window,") as caught:
        read(raw)
    [key] = re.findall(r"--ignore-config-key (\S+) ignores", str(caught.value))
    assert read(without_keys(raw, [key])) == read(nested)


def test_a_text_model_is_an_object_and_a_shorter_one_keeps_its_kinds() -> None:
    with pytest.raises(ConfigError, match="text_config is 3"):
        read({**random.nested(random.config()), "text_config": 3})
    c = random.nested(random.config(layers=8, layer_types=[*["linear_attention"] * 7, "full_attention"]))
    cut: DecoderConfig = read(family_of(c).cut(c, 5))
    assert [type(layer.mixer) for layer in cut.layers] == [GdnDims] * 5
    with pytest.raises(ConfigError, match="--num-layers is 9; expected at most 8"):
        family_of(c).cut(c, 9)
