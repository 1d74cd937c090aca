"""Weight plans of the Qwen families: every layout, shares of 1 to 8 ranks, and what they cannot share."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import random_qwen as random
from tests.models.plans import read
from thalweg.errors import CheckpointError, ConfigError
from thalweg.models import family_of
from thalweg.models.family import weight_plan
from thalweg.parallel.shards import Shards
from thalweg.quant.scheme import tensor_index
from thalweg.weights.checkpoint import Checkpoint
from thalweg.weights.load import check, load
from thalweg.weights.plan import Source, Target, checkpoint_shapes

# Everything divides by 8 but the 4 key heads and 2 KV heads, which ranks beyond their number replicate.
SHARED_BY_8: dict[str, Any] = dict(key_heads=4, value_heads=8, key_dim=6, value_dim=10, heads=8, kv_heads=2,
                                   experts=3, inner=16, shared=24, vocab=77)  # fmt: skip
LAYOUTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Qwen3.5": (random.nested, dict(stacked=True)),
    "Qwen3.5, each expert": (random.nested, {}),
    "Qwen3-Next": (random.as_next, dict(prefix="model.", packed=True)),
}
RANKS = [1, 2, 4, 8]


def plan_of(raw: dict[str, Any], tensors: Any = (), rank: int = 0, size: int = 1) -> list[Target]:
    family = family_of(raw)
    return weight_plan(family, family.fitted(read(raw), tensors), Shards(rank, size), tensors=tensors)


def count(places: list[tuple[tuple[int, ...], Source]], shape: tuple[int, ...]) -> Tensor:
    """How often each element of a tensor is filled."""
    filled = torch.zeros(shape, dtype=torch.int32)
    for local_shape, source in places:
        place = filled[tensor_index(source.into)]
        assert place.numel() == prod(local_shape)
        filled[tensor_index(source.into)] += 1
    return filled


@pytest.mark.parametrize("size", RANKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dense", [0, 40])
@pytest.mark.parametrize("tied", [False, True])
def test_every_element_is_filled_once(layout: str, size: int, dense: int, tied: bool) -> None:
    of_text, how = LAYOUTS[layout]
    c = random.config(**SHARED_BY_8, dense=dense, tie_word_embeddings=tied)
    tensors = random.published(c, random.weights(c), **how)
    for rank in range(size):
        plan = plan_of(of_text(c), tensors, rank, size)
        assert checkpoint_shapes(plan) == {name: tuple(t.shape) for name, t in tensors.items()}
        for target in plan:
            filled = count([(s.local_shape, s) for s in target.sources], target.shape)
            real = None
            if target.name in ("embed.weight", "lm_head.weight"):
                rows = -(-77 // size)
                real = max(0, min(77 - rank * rows, rows))
                assert not filled[real:].any()
            assert bool((filled[:real] == 1).all()), target.name


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("form", ["nested", "Qwen3-Next"])
def test_every_scale_of_fp8_is_filled_once(form: str, size: int) -> None:
    of_text, how = (random.nested, {}) if form == "nested" else LAYOUTS[form]
    c = random.config(**{**SHARED_BY_8, "hidden": 144, "value_dim": 64, "inner": 256, "shared": 256, "head_dim": 64})
    tensors, quantization = random.in_fp8(random.published(c, random.weights(c), **how))
    for rank in range(size):
        plan = plan_of(of_text({**c, "quantization_config": quantization}), tensors, rank, size)
        assert set(checkpoint_shapes(plan)) == set(tensors)
        for target in (t for t in plan if t.scales):
            weight, scale = target.parameters
            assert bool((count([(s.local_shape, s) for s in target.sources], weight.shape) == 1).all())
            places = [(scale.shape[:0] + tuple(held(s)), s) for s in target.scales]
            assert bool((count(places, scale.shape) == 1).all()), target.name


def held(scales: Source) -> tuple[int, ...]:
    """The shape of scales as they are stored here: a row of theirs stands for `repeat` of ours."""
    rows, cols = scales.local_shape
    if scales.repeat > 1 and (scales.shard is None or scales.shard_dim != 0):
        (first, last) = scales.into[0]  # type: ignore[misc]
        rows = last - first
    return rows, cols


def filled(raw: dict[str, Any], folder: Path, rank: int, size: int) -> dict[str, Tensor]:
    checkpoint = Checkpoint(folder)
    plan = plan_of(raw, checkpoint.tensors, rank, size)
    params = {t.name: torch.full(t.shape, torch.nan) for t in plan}
    load(plan, checkpoint, params.__getitem__, ignore=["mtp.*"])
    return params


def merged(name: str, ranks: list[dict[str, Tensor]], c: dict[str, Any]) -> Tensor:
    """The whole parameter, from what its dimensions mean. Of heads that ranks share, one of them is taken."""
    parts = [r[name] for r in ranks]
    n = len(parts)

    def rows(*of: tuple[int, int], dim: int = 0) -> Tensor:
        """(rows on each rank, ranks that hold the same) of pieces one below the other."""
        cut = [part.split([size for size, _ in of], dim) for part in parts]
        for i, (_, same) in enumerate(of):
            assert all(torch.equal(cut[r][i], cut[r - r % same][i]) for r in range(n))
        return torch.cat(
            [torch.cat([cut[r][i] for r in range(0, n, same)], dim) for i, (_, same) in enumerate(of)], dim
        )

    G, H, K, V = (c[f"linear_{x}"] for x in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim"))
    kv, dims = c["num_key_value_heads"], c["head_dim"]
    keys, values = (max(1, G // n) * K, max(1, n // G)), (H // n * V, 1)
    kind = name.split(".", 2)[-1] if name.startswith("layers.") else name
    if kind in ("embed.weight", "lm_head.weight"):
        return torch.cat(parts)[: c["vocab_size"]]
    if kind == "attn.in_proj.weight" and name.startswith("layers.3."):
        shared = (max(1, kv // n) * dims, max(1, n // kv))
        return rows((c["num_attention_heads"] // n * 2 * dims, 1), shared, shared)
    if kind == "attn.in_proj.weight":
        return rows(keys, keys, values, values, (H // n, 1), (H // n, 1))
    if kind == "attn.conv.weight":
        return rows(keys, keys, values)
    if kind == "mlp.gate_up.weight":
        return rows((c["intermediate_size"] // n, 1), (c["intermediate_size"] // n, 1))
    if kind == "mlp.experts.gate_up":
        return rows((c["moe_intermediate_size"] // n, 1), (c["moe_intermediate_size"] // n, 1), dim=1)
    if kind == "mlp.shared.in_proj.weight":
        half = (c["shared_expert_intermediate_size"] // n, 1)
        return rows(half, half, (1, n))
    if kind in ("attn.out_proj.weight", "mlp.down.weight", "mlp.shared.down.weight", "mlp.experts.down"):
        return torch.cat(parts, -1)
    if kind in ("attn.A_log", "attn.dt_bias"):
        return torch.cat(parts)
    assert all(torch.equal(part, parts[0]) for part in parts), f"{name} is not replicated"
    return parts[0]


@pytest.mark.parametrize("dense", [0, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_reassemble_to_the_whole(tmp_path: Path, layout: str, dense: int) -> None:
    of_text, how = LAYOUTS[layout]
    c = random.config(**SHARED_BY_8, dense=dense)
    raw, folder = of_text(c), tmp_path / "model"
    random.write(folder, raw, random.published(c, random.weights(c), **how))
    whole = filled(raw, folder, 0, 1)
    for size in RANKS[1:]:
        ranks = [filled(raw, folder, rank, size) for rank in range(size)]
        for name, value in whole.items():
            assert torch.equal(merged(name, ranks, c), value), (name, size)


def test_every_layout_lands_in_the_same_place(tmp_path: Path) -> None:
    c = random.config(**SHARED_BY_8)
    w = random.weights(c)
    found = []
    for i, (of_text, how) in enumerate(LAYOUTS.values()):
        random.write(tmp_path / str(i), of_text(c), random.published(c, w, **how))
        found.append(filled(of_text(c), tmp_path / str(i), 0, 1))
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())
    one, a = found[0], "model.layers.1.linear_attn."
    in_proj = [w[f"{a}in_proj_{x}.weight"] for x in ("qkv", "z", "b", "a")]
    assert torch.equal(one["layers.1.attn.in_proj.weight"], torch.cat(in_proj))
    assert torch.equal(one["layers.1.attn.conv.weight"], w[a + "conv1d.weight"][:, 0])
    assert torch.equal(one["layers.1.attn.out_norm.weight"], w[a + "norm.weight"])  # the only norm stored as it is
    for ours, theirs in (
        ("layers.1.attn.in_proj.norm", "layers.1.input_layernorm"),
        ("layers.1.mlp.router.norm", "layers.1.post_attention_layernorm"),
        ("layers.3.attn.q_norm", "layers.3.self_attn.q_norm"),
        ("layers.3.attn.k_norm", "layers.3.self_attn.k_norm"),
        ("lm_head.norm", "norm"),
    ):
        assert torch.equal(one[f"{ours}.weight"], w[f"model.{theirs}.weight"] + 1)
    m = "model.layers.2.mlp."
    gate_up = [w[f"{m}experts.1.{x}_proj.weight"] for x in ("gate", "up")]
    assert torch.equal(one["layers.2.mlp.experts.gate_up"][1], torch.cat(gate_up))
    shared = [w[f"{m}shared_expert.{x}_proj.weight"] for x in ("gate", "up")] + [w[m + "shared_expert_gate.weight"]]
    assert torch.equal(one["layers.2.mlp.shared.in_proj.weight"], torch.cat(shared))


def test_a_shared_expert_as_wide_as_the_others_stands_behind_them(tmp_path: Path) -> None:
    """Its gate is the last row of the router's weight. One that is stored otherwise is an MLP of its own."""
    c = random.config(inner=24, shared=24)
    w = random.weights(c)
    random.write(tmp_path / "model", c, random.published(c, w, prefix="model.", stacked=True))
    one, m = filled(c, tmp_path / "model", 0, 1), "model.layers.2.mlp."
    assert not [name for name in one if ".shared." in name]
    assert one["layers.2.mlp.experts.gate_up"].shape == (7, 48, 32)
    shared = [w[f"{m}shared_expert.{x}_proj.weight"] for x in ("gate", "up")]
    assert torch.equal(one["layers.2.mlp.experts.gate_up"][6], torch.cat(shared))
    assert torch.equal(one["layers.2.mlp.experts.down"][6], w[f"{m}shared_expert.down_proj.weight"])
    router = torch.cat([w[f"{m}gate.weight"], w[f"{m}shared_expert_gate.weight"]])
    assert torch.equal(one["layers.2.mlp.router.weight"], router)
    halves = [filled(c, tmp_path / "model", rank, 2)["layers.2.mlp.experts.down"] for rank in range(2)]
    assert torch.equal(torch.cat(halves, dim=2), one["layers.2.mlp.experts.down"])

    kept = [f"model.language_model.layers.1.mlp.shared_expert.{x}_proj" for x in ("gate", "up", "down")]
    c = random.config(inner=24, shared=24, quantization_config={**FP8, "modules_to_not_convert": kept})
    plan = {t.name: t for t in plan_of(c)}
    for n, experts in enumerate((7, 6, 7)):
        assert plan[f"layers.{n}.mlp.experts.down"].shape[0] == experts
        assert plan[f"layers.{n}.mlp.router.weight"].shape[0] == experts
        assert (f"layers.{n}.mlp.shared.down.weight" in plan) == (experts == 6)


def test_norms_lose_nothing_where_one_is_added() -> None:
    """In bfloat16 1 + w would keep 8 bits of w; the weight stays in float32."""
    plan = {t.name: t for t in plan_of(random.config())}
    shifted = [t for t in plan.values() if t.add]
    assert {t.dtype for t in shifted} == {"float32"}
    assert {"lm_head.norm.weight", "layers.3.attn.q_norm.weight"} <= {t.name for t in shifted}
    assert plan["layers.0.attn.out_norm.weight"].add == 0


def test_a_checkpoint_without_a_head_has_tied_embeddings(tmp_path: Path) -> None:
    """Whatever config.json says at either level."""
    c = random.config(dense=40)
    tensors = random.published(c, {k: v for k, v in random.weights(c).items() if k != "lm_head.weight"})
    random.write(tmp_path, c, tensors)
    plan = plan_of(c, tensors)
    assert "lm_head.weight" not in {t.name for t in plan}
    check(plan, Checkpoint(tmp_path), ["mtp.*"])
    for raw in (
        random.config(tie_word_embeddings=True),
        {**random.nested(random.config()), "tie_word_embeddings": True},
    ):
        assert read(raw).vocab.tied


def test_vision_and_mtp_tensors_are_ignored_and_others_are_not(tmp_path: Path) -> None:
    c = random.config(dense=40)
    tensors = random.beside_the_text(random.published(c, random.weights(c)))
    family = family_of(c)
    layout = family.layout(read(c), tensors)
    assert layout.mtp is not None
    ignored = [*layout.ignored, layout.mtp.pattern]
    random.write(tmp_path / "a", c, tensors)
    check(plan_of(c, tensors), Checkpoint(tmp_path / "a"), ignored)
    random.write(tmp_path / "b", c, {**tensors, "model.language_model.layers.0.more.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"1 unexpected: model\.language_model\.layers\.0\.more\.weight"):
        check(plan_of(c, tensors), Checkpoint(tmp_path / "b"), ignored)


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        (dict(value_heads=6), 4, "linear_num_value_heads, which is 6"),
        (dict(key_heads=3, value_heads=6), 2, "linear_num_key_heads, which is 3"),
        (dict(heads=6), 4, "num_attention_heads, which is 6"),
        (dict(heads=6, kv_heads=3), 2, "num_key_value_heads, which is 3"),
        (dict(inner=25), 2, "moe_intermediate_size, which is 25"),
        (dict(shared=41), 2, "shared_expert_intermediate_size, which is 41"),
        (dict(dense=41), 2, "intermediate_size, which is 41"),
    ],
)
def test_what_ranks_cannot_share_is_named(changes: dict[str, Any], size: int, message: str) -> None:
    c = random.config(**changes)
    plan_of(c)
    with pytest.raises(ConfigError, match=f"--tensor-parallel-size is {size}; it must divide") as caught:
        plan_of(c, rank=size - 1, size=size)
    assert message in str(caught.value)


def test_ranks_that_cut_a_block_of_fp8_are_refused() -> None:
    c = random.config(heads=8, head_dim=40, quantization_config=FP8)
    with pytest.raises(ConfigError, match=r"cuts \S+o_proj.weight at 240, within a block of 128"):
        plan_of(c, rank=3, size=4)


FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["model.language_model.layers.1.mlp", "lm_head"],
}


def test_without_tensors_the_config_says_what_is_in_float8() -> None:
    """Experts are not stacked there, and the list keeps a whole layer's in bfloat16."""
    plan = {t.name: t for t in plan_of(random.config(quantization_config=FP8))}
    in_fp8 = {name for name, t in plan.items() if t.scales}
    expected = {f"layers.{n}.attn.{x}.weight" for n in range(4) for x in ("in_proj", "out_proj")}
    for n in (0, 2, 3):
        expected |= {f"layers.{n}.mlp.{x}" for x in ("experts.gate_up", "experts.down")}
        expected |= {f"layers.{n}.mlp.shared.{x}.weight" for x in ("in_proj", "down")}
    assert in_fp8 == expected
    assert plan["layers.0.attn.in_proj.rest.weight"].shape == (8, 32)  # b and a
    assert plan["layers.0.mlp.shared.in_proj.rest.weight"].shape == (1, 32)
