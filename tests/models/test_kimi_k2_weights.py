"""Configs and weight plans of DeepSeek-V3's architecture: published ones, shares of ranks, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import random_kimi_k2 as random
from tests.models.plans import read
from tests.models.test_qwen_weights import count
from thalweg import LLM
from thalweg.assembly.inspect import describe
from thalweg.config.engine import EngineConfig
from thalweg.errors import CheckpointError, ConfigError, ThalwegError, UnsupportedError
from thalweg.models import family_of
from thalweg.models.family import step_costs, weight_plan
from thalweg.models.parts.mla import MlaDims
from thalweg.models.parts.mlp import MlpDims
from thalweg.models.parts.moe import MoeDims
from thalweg.models.parts.part import Step
from thalweg.parallel.shards import Shards
from thalweg.quant import scheme_named
from thalweg.weights.checkpoint import Checkpoint
from thalweg.weights.dummy import fill
from thalweg.weights.load import bytes_to_load, check, load
from thalweg.weights.plan import Target, checkpoint_shapes, local_bytes

DEEPSEEK: dict[str, Any] = dict(
    model_type="deepseek_v3", layers=61, hidden=7168, heads=128, q_rank=1536, rank=512, nope=128, rope=64, value=128,
    experts=256, top_k=8, inner=2048, groups=8, top_groups=4, dense=3, dense_inner=18432, vocab=129280,
    num_nextn_predict_layers=1, rope_theta=10000, routed_scaling_factor=2.5, quantization_config=random.FP8,
    rope_scaling={"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
                  "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
)  # fmt: skip


def plan_of(raw: dict[str, Any], tensors: Any = (), rank: int = 0, size: int = 1) -> list[Target]:
    return weight_plan(family_of(raw), read(raw), Shards(rank, size), tensors=tensors)


@pytest.mark.parametrize(
    ("name", "eps", "context", "factor", "beta_fast", "stored"),
    [
        ("kimi_k2_instruct", 1e-6, 131_072, 32.0, 1.0, "fp8"),
        ("kimi_k2_5_text_int4", 1e-5, 262_144, 64.0, 32.0, "int4"),
    ],
)
def test_published_configs(
    shared_dir: Path, name: str, eps: float, context: int, factor: float, beta_fast: float, stored: str
) -> None:
    file = shared_dir / f"configs/{name}.json"
    c = read(json.loads(file.read_text()))
    assert (c.width, len(c.layers), c.vocab_size, c.eps, c.context_len) == (7168, 61, 163_840, eps, context)
    mla = c.layers[0].mixer
    assert isinstance(mla, MlaDims)
    assert (mla.heads, mla.rank, mla.nope, mla.rope, mla.value, mla.q_rank) == (64, 512, 128, 64, 128, 1536)
    assert mla.rotation is not None
    assert mla.rotation.yarn is not None
    assert (mla.rotation.theta, mla.rotation.scale) == (50_000, 1.0)
    assert (mla.rotation.yarn.factor, mla.rotation.yarn.beta_fast) == (factor, beta_fast)
    assert mla.scale == pytest.approx(192**-0.5 * (0.1 * math.log(factor) + 1) ** 2)
    assert c.layers[0].mlp == MlpDims(18_432)
    assert {layer.mlp for layer in c.layers[1:]} == {MoeDims(384, 8, 2048, shared=1, scale=2.827)}
    assert {layer.mixer for layer in c.layers} == {mla}
    assert c.quantized is not None
    assert c.quantized.name == stored
    found = describe(EngineConfig(device="cpu", load_format="dummy", config_file=str(file)))
    assert found.parameters == 1_026_408_232_448
    assert round(found.active_parameters / 1e9, 1) == 31.7


def test_deepseek_v3() -> None:
    raw = random.config(**DEEPSEEK)
    c = read(raw)
    moe = MoeDims(256, 8, 2048, shared=1, scale=2.5, groups=8, top_groups=4)
    assert [type(layer.mlp) for layer in c.layers] == [MlpDims] * 3 + [MoeDims] * 58
    assert c.layers[3].mlp == moe
    assert sum(math.prod(t.shape) for t in plan_of(raw)) == 671_026_419_200


def empty(plan: list[Target]) -> dict[str, Tensor]:
    """Parameters of a model in float32."""
    dtypes = {s.dtype: getattr(torch, s.dtype, torch.float32) for t in plan for s in t.parameters}
    return {t.name + s.suffix: torch.empty(s.shape, dtype=dtypes[s.dtype]) for t in plan for s in t.parameters}


def formats(c: dict[str, Any]) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    w = random.weights(c)
    return {
        "none": (c, w),
        "fp8": ({**c, "quantization_config": random.FP8}, random.in_fp8(w)[0]),
        "int4": ({**c, "quantization_config": random.INT4}, random.in_int4(w)[0]),
    }


def without_shapes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("_shape")}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("stored", ["none", "fp8", "int4"])
def test_every_element_is_filled_once(stored: str, size: int) -> None:
    c = random.config(heads=4, inner=128, shared=2, dense_inner=96, vocab=128)
    raw, tensors = formats(c)[stored]
    for rank in range(size):
        plan = plan_of(raw, tensors, rank, size)
        assert set(checkpoint_shapes(plan)) == set(without_shapes(tensors))
        for target in plan:
            words = target.parameters[0].shape
            if target.name.endswith("kv_b_proj.weight"):
                words = (math.prod(words[:2]), words[2])
            assert bool((count([(s.local_shape, s) for s in target.sources], words) == 1).all()), target.name
            if target.scales and target.scales[0].repeat == 1:
                places = [(s.local_shape, s) for s in target.scales]
                assert bool((count(places, target.parameters[1].shape) == 1).all()), target.name


@pytest.mark.parametrize("stored", ["none", "fp8", "int4"])
def test_ranks_hold_shares_of_the_whole(tmp_path: Path, stored: str) -> None:
    c = random.config(heads=4, inner=128, shared=2, vocab=128)
    raw, tensors = formats(c)[stored]
    random.write(tmp_path, raw, tensors)
    checkpoint, done = Checkpoint(tmp_path), []

    def filled(rank: int, size: int) -> dict[str, Tensor]:
        plan = plan_of(raw, tensors, rank, size)
        params = empty(plan)
        done.clear()
        ignored = family_of(raw).layout(read(raw), tensors).ignored
        load(plan, checkpoint, params.__getitem__, ignore=ignored, progress=done.append)
        assert sum(done) == bytes_to_load(plan, checkpoint)
        return params

    whole, halves = filled(0, 1), [filled(rank, 2) for rank in range(2)]
    kv_b, half = whole["layers.1.attn.kv_b_proj.weight"], c["num_attention_heads"] // 2
    assert torch.equal(torch.cat([p["layers.1.attn.kv_b_proj.weight"] for p in halves]), kv_b)
    assert kv_b.dtype == torch.float32
    assert torch.equal(halves[0]["layers.1.attn.in_proj.weight"], whole["layers.1.attn.in_proj.weight"])
    for name in ("layers.1.mlp.experts.down", "layers.1.attn.out_proj.weight"):
        assert torch.equal(torch.cat([p[name] for p in halves], -1), whole[name])
    q_b = whole["layers.1.attn.q_b_proj.weight"].unflatten(0, (c["num_attention_heads"], -1))
    assert torch.equal(halves[1]["layers.1.attn.q_b_proj.weight"].unflatten(0, (half, -1)), q_b[half:])
    gate_up = [p["layers.1.mlp.experts.gate_up"].unflatten(1, (2, -1)) for p in halves]
    assert torch.equal(torch.cat(gate_up, 2).flatten(1, 2), whole["layers.1.mlp.experts.gate_up"])
    if stored == "int4":
        assert whole["layers.1.mlp.experts.down"].dtype == torch.int32
        e = f"model.layers.1.mlp.experts.{c['n_routed_experts'] - 1}.down_proj.weight"
        assert torch.equal(whole["layers.1.mlp.experts.down"][-1], tensors[f"{e}_packed"])
        assert torch.equal(whole["layers.1.mlp.experts.down_scale"][-1], tensors[f"{e}_scale"].float())


@pytest.mark.parametrize("stored", ["none", "fp8", "int4"])
def test_without_tensors_the_config_says_what_is_quantized(stored: str) -> None:
    raw, tensors = formats(random.config())[stored]
    assert [(t.name, t.scheme.name) for t in plan_of(raw)] == [(t.name, t.scheme.name) for t in plan_of(raw, tensors)]
    assert set(checkpoint_shapes(plan_of(raw))) == set(without_shapes(tensors))


def test_the_ignore_list_is_honoured_with_prefix_and_without() -> None:
    first = "model.layers.1.mlp.experts"
    for entry in (f"re:{first}.*", f"re:language_model\\.{first}.*"):
        listed = {**random.INT4, "ignore": [*random.INT4["ignore"], entry]}
        plan = {t.name: t.scheme.name for t in plan_of(random.config(quantization_config=listed))}
        assert (plan["layers.1.mlp.experts.down"], plan["layers.2.mlp.experts.down"]) == ("none", "int4")
    only = {**random.INT4, "ignore": []}
    with pytest.raises(UnsupportedError, match=r"q_a_proj.weight is stored in int4; expected that of routed experts"):
        plan_of(random.config(quantization_config=only))


def test_costs_count_each_format() -> None:
    def experts(raw: dict[str, Any]) -> float:
        costs = step_costs(read(raw), Step(1))
        return sum(cost.bytes for cost in costs if cost.what == "experts")

    c = random.config(hidden=128, inner=128)
    expert = 3 * 128 * 128
    plain, fp8, int4 = (experts(raw) for raw, _ in formats(c).values())
    assert plain == pytest.approx(2 * (2 + 1) * expert * 2)  # two layers of 2 routed experts and a shared one
    assert fp8 == pytest.approx(2 * (2 + 1) * expert * (1 + 4 / 128**2))
    assert int4 == pytest.approx(2 * (2 * (0.5 + 2 / 32) + 1 * 2) * expert)


@pytest.mark.parametrize("stored", ["fp8", "int4"])
def test_dummy_weights_have_the_spread_of_others(tmp_path: Path, stored: str) -> None:
    raw, _ = formats(random.config(hidden=256, inner=256))[stored]
    params = empty(plan_of(raw))
    fill(plan_of(raw), params.__getitem__, seed=0, progress=(done := []).append)
    assert sum(done) == local_bytes(plan_of(raw), 4) == sum(p.numel() * p.element_size() for p in params.values())
    down = [params[f"layers.1.mlp.experts.down{suffix}"][3] for suffix in ("", "_scale")]
    for matrix in (scheme_named(stored).widened(down, 1, torch.float32), params["layers.1.attn.kv_b_proj.weight"]):
        assert 0.019 < float(matrix.std()) < 0.021
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with LLM(str(tmp_path), load_format="dummy", dtype="float32") as llm:
        assert bool(llm.prompt_logits(list(range(3, 40))).isfinite().all())
        assert llm.info.quantization == stored


def int4(**changes: Any) -> dict[str, Any]:
    weights = {**random.INT4["config_groups"]["group_0"]["weights"], **changes}
    group = {**random.INT4["config_groups"]["group_0"], "weights": weights}
    return {"quantization_config": {**random.INT4, "config_groups": {"group_0": group}}}


def other(**changes: Any) -> dict[str, Any]:
    return {"quantization_config": {**random.INT4, **changes}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_interleave": False}, "rope_interleave is false; only true"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type is 'linear'; expected 'default' or 'yarn'"),
        ({"rope_scaling": {**random.YARN, "mystery": 1}}, "rope_scaling: unknown key mystery"),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"rope": 7}, "qk_rope_head_dim is 7; expected an even number"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'; only 'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy'; only 'noaux_tc'"),
        ({"groups": 3}, "n_group is 3; expected a divisor of n_routed_experts 8"),
        ({"groups": 4, "top_groups": 5}, "topk_group is 5; expected at most n_group 4"),
        ({"groups": 4, "top_groups": 1, "top_k": 3}, "num_experts_per_tok is 3; expected at most 2"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2; expected an integer from 0 to 1"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2; expected 4"),
        ({"eos_token_id": 131}, "eos_token_id is 131; expected ids below vocab_size 131"),
        ({"attention_bias": True}, "attention_bias is true; only false"),
        ({"mystery": 1}, "unknown key mystery"),
        (other(quant_method="gptq"), "quant_method is 'gptq'"),
        (other(quant_method="awq"), "quant_method is 'awq'"),
        (other(format="float-quantized"), "format is 'float-quantized'; only 'pack-quantized'"),
        (other(config_groups={}), "config_groups is {}; expected one group"),
        (other(config_groups={"group_0": {}, "group_1": {"weights": {}, "x": 1}}), "unknown key group_1"),
        (other(ignore=["re:("]), "ignore has 're:(', no regular expression"),
        (int4(num_bits=8), "num_bits is 8; only 4"),
        (int4(group_size=128), "group_size is 128; only 32"),
        (int4(symmetric=False), "symmetric is false; only true"),
        (int4(actorder="group"), "actorder is 'group'; only null"),
        (int4(strategy="channel"), "strategy is 'channel'; only 'group'"),
        (int4(type="float"), "type is 'float'; only 'int'"),
    ],
)
@pytest.mark.parametrize("form", ["flat", "nested"])
def test_what_is_not_supported_or_contradicts_itself_is_one_line(
    changes: dict[str, Any], message: str, form: str
) -> None:
    raw = random.config(**changes)
    with pytest.raises(ThalwegError) as caught:
        read(raw if form == "flat" else random.nested(raw))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_quantization_beside_the_text_model_counts(tmp_path: Path) -> None:
    inside = read(random.nested(random.config(quantization_config=random.INT4)))
    assert read({**random.nested(random.config()), "quantization_config": random.INT4}) == inside
    assert inside.quantized is not None


def test_cut_to_some_layers() -> None:
    for raw in (random.config(), random.nested(random.config())):
        family = family_of(raw)
        assert len(family.read(family.cut(raw, 2)).layers) == 2
        with pytest.raises(ConfigError, match="--num-layers is 4; expected at most 3"):
            family.cut(raw, 4)


def test_only_the_layer_behind_the_last_is_skipped(tmp_path: Path) -> None:
    c = random.config()
    w, more = random.weights(c), {"model.layers.3.eh_proj.weight": torch.zeros(2)}
    ignored = family_of(c).layout(read(c), w).ignored
    check(plan_of(c, w), Checkpoint(random.write(tmp_path / "a", c, {**w, **more})), ignored)
    for name in ("model.layers.4.eh_proj.weight", "model.layers.30.x", "vision_tower.x", "model.layers.2.more.weight"):
        folder = random.write(tmp_path / name, c, {**w, name: torch.zeros(2)})
        with pytest.raises(CheckpointError, match=f"1 unexpected: {name}"):
            check(plan_of(c, w), Checkpoint(folder), ignored)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(heads=6), "num_attention_heads, which is 6"),
        (dict(inner=34, hidden=64), "moe_intermediate_size, which is 34"),
        (
            dict(inner=160, quantization_config=random.INT4),
            r"cuts \S+down_proj.weight at 40 and 80, within a group of 32",
        ),
        (dict(inner=16, quantization_config=random.INT4), r"cuts \S+down_proj.weight at 4 and 8, within a group of 32"),
    ],
)
def test_what_ranks_cannot_share_is_named(changes: dict[str, Any], message: str) -> None:
    c = random.config(**changes)
    plan_of(c)
    with pytest.raises(ConfigError, match=f"--tensor-parallel-size .*{message}"):
        plan_of(c, rank=1, size=4)


def test_words_that_columns_do_not_fill_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"down_proj.weight has 12 columns; expected a multiple of 8 for int4"):
        plan_of(random.config(inner=12, quantization_config=random.INT4))


@pytest.mark.parametrize(("stored", "wanted"), [("fp8", "F8_E4M3"), ("int4", "I32")])
def test_a_quantized_tensor_of_another_dtype_is_refused(tmp_path: Path, stored: str, wanted: str) -> None:
    raw, tensors = formats(random.config())[stored]
    suffix = {"fp8": "", "int4": "_packed"}[stored]
    name = f"model.layers.1.mlp.experts.0.down_proj.weight{suffix}"
    folder = random.write(tmp_path, raw, {**tensors, name: tensors[name].float()})
    with pytest.raises(UnsupportedError, match=f"{name} is F32; expected {wanted}, with its scales"):
        check(plan_of(raw, tensors), Checkpoint(folder), ["*.weight_shape"])


def test_quantization_on_top_of_a_quantized_checkpoint_is_refused() -> None:
    c = random.config(quantization_config=random.INT4)
    with pytest.raises(ConfigError, match="--quantization is 'fp8', and this checkpoint is stored in int4 already"):
        weight_plan(family_of(c), read(c), scheme=scheme_named("fp8"))
