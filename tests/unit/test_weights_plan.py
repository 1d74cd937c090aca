"""The plan as data, loading by it, dummy weights by it: on a small plan that uses every feature."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from thalweg.errors import CheckpointError, ConfigError, UnsupportedError
from thalweg.parallel.shards import Shards
from thalweg.weights import dummy
from thalweg.weights.checkpoint import Checkpoint
from thalweg.weights.load import bytes_to_load, check, load
from thalweg.weights.plan import Source, Target, concat, local_elements, placed, split, whole
from thalweg.weights.progress import progress_bar

V, D, H, K, E, WIDTH = 7, 4, 4, 3, 2, 6


def small_plan(rank: int = 0, size: int = 1) -> list[Target]:
    shards = Shards(rank, size)
    rows, (start, stop) = shards.padded(V)
    heads, channels, width = shards.even(H, "heads"), shards.even(H, "heads", K), shards.even(WIDTH, "width")
    local_I = width[1] - width[0]
    experts = tuple(placed(f"e{e}", (WIDTH, D), (e, (0, local_I)), 0, width) for e in range(E))
    return [
        Target("embed", (rows, D), (placed("emb", (V, D), ((0, stop - start),), 0, (start, stop)),)),
        whole("norm", "n", (D,), init="ones"),
        concat(
            "qk",
            [Source("q", (H * K, D), 0, channels), Source("k", (H * K, D), 0, channels), Source("g", (3, D))],
        ),
        split("a", "A", (1, 1, H, 1), 2, heads, local=(shards.count(H, "heads"),), dtype="float32", init="a_log"),
        split("out", "o", (D, H * K), 1, channels),
        Target("experts", (E, local_I, D), experts),
    ]


def small_tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {s.name: s.shape for t in small_plan() for s in t.sources}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def empty(plan: list[Target], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Parameters full of NaN, so that what is left unfilled shows."""
    dtypes = {"model": dtype, "float32": torch.float32}
    return {t.name: torch.full(t.shape, float("nan"), dtype=dtypes[t.dtype]) for t in plan}


def saved(folder: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    return Checkpoint(folder)


def test_load_renames_merges_stacks_and_reshapes(tmp_path: Path) -> None:
    tensors, plan = small_tensors(), small_plan()
    params = empty(plan)
    seen: list[int] = []
    checkpoint = saved(tmp_path, tensors)
    load(plan, checkpoint, params.__getitem__, progress=seen.append)
    assert torch.equal(params["embed"], tensors["emb"])
    assert torch.equal(params["qk"], torch.cat([tensors["q"], tensors["k"], tensors["g"]]))
    assert torch.equal(params["a"], tensors["A"].flatten())
    assert torch.equal(params["experts"], torch.stack([tensors["e0"], tensors["e1"]]))
    assert sum(seen) == bytes_to_load(plan, checkpoint) == sum(t.numel() * 4 for t in tensors.values())
    assert local_elements(plan) == {"model": sum(t.numel() for t in tensors.values()) - H, "float32": H}


@pytest.mark.parametrize("size", [2])
def test_shards_reassemble_to_the_whole(tmp_path: Path, size: int) -> None:
    tensors = small_tensors()
    checkpoint = saved(tmp_path, tensors)
    ranks = []
    for rank in range(size):
        plan = small_plan(rank, size)
        params = empty(plan)
        load(plan, checkpoint, params.__getitem__)
        assert not any(p.isnan().any() for p in params.values())
        ranks.append(params)
    embed = torch.cat([r["embed"] for r in ranks])
    assert torch.equal(embed[:V], tensors["emb"])
    assert not embed[V:].any()
    assert embed.shape[0] == 8
    assert torch.equal(torch.cat([r["out"] for r in ranks], 1), tensors["o"])
    assert torch.equal(torch.cat([r["a"] for r in ranks]), tensors["A"].flatten())
    assert torch.equal(torch.cat([r["experts"] for r in ranks], 1), torch.stack([tensors["e0"], tensors["e1"]]))
    local = H * K // size
    assert torch.equal(torch.cat([r["qk"][:local] for r in ranks]), tensors["q"])
    assert all(torch.equal(r["qk"][-3:], tensors["g"]) for r in ranks)


def test_values_are_cast_to_the_parameters_dtype(tmp_path: Path) -> None:
    tensors, plan = small_tensors(torch.bfloat16), small_plan()
    params = empty(plan, torch.float16)
    load(plan, saved(tmp_path, tensors), params.__getitem__)
    assert params["out"].dtype == torch.float16
    assert torch.equal(params["out"], tensors["o"].half())
    assert torch.equal(params["a"], tensors["A"].float().flatten())


def test_one_tensor_may_fill_two_parameters(tmp_path: Path) -> None:
    plan = [whole("x", "t", (2, 3)), split("y", "t", (2, 3), 1, (1, 3))]
    params = empty(plan)
    value = torch.randn(2, 3)
    load(plan, saved(tmp_path, {"t": value}), params.__getitem__)
    assert torch.equal(params["x"], value)
    assert torch.equal(params["y"], value[:, 1:])


def test_misfits_are_all_named_and_nothing_is_copied(tmp_path: Path) -> None:
    tensors = small_tensors()
    del tensors["q"]
    tensors["o"] = tensors["o"].T
    tensors["rotary_emb.inv_freq"] = torch.ones(2)
    tensors["surprise"] = torch.ones(2)
    checkpoint, params = saved(tmp_path, tensors), empty(small_plan())
    with pytest.raises(CheckpointError) as caught:
        load(small_plan(), checkpoint, params.__getitem__, ignore=["*rotary_emb.inv_freq"])
    message = str(caught.value)
    assert "1 missing: q;" in message
    assert "1 unexpected: surprise;" in message
    assert "1 misshapen: o [12, 4], not [4, 12]" in message
    assert "\n" not in message
    assert all(p.isnan().all() for p in params.values())


def test_long_lists_of_misfits_are_cut(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, {f"x{i}": torch.ones(1) for i in range(100)})
    with pytest.raises(CheckpointError, match=r"6 missing: .*100 unexpected: (x\d+, ){19}x\d+ \.\.\.") as caught:
        check(small_plan()[1:4] + small_plan()[4:5], checkpoint)
    assert len(str(caught.value)) < 1000


def test_quantized_weights_and_wrong_parameters_are_refused(tmp_path: Path) -> None:
    tensors = small_tensors()
    plan = small_plan()
    with pytest.raises(UnsupportedError, match="o is I8"):
        check(plan, saved(tmp_path, {**tensors, "o": torch.ones(D, H * K, dtype=torch.int8)}))
    checkpoint = saved(tmp_path, tensors)
    params = {**empty(plan), "out": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"parameter out is \[1\]; the plan fills \[4, 12\]"):
        load(plan, checkpoint, params.__getitem__)
    with pytest.raises(CheckpointError, match=r"parameter a is torch.bfloat16; the plan says float32"):
        load(plan, checkpoint, {n: p.bfloat16() for n, p in empty(plan).items()}.__getitem__)
    with pytest.raises(ConfigError, match="the weight plan fills norm twice"):
        check([*plan, plan[1]], checkpoint)


def test_what_does_not_divide_names_the_option_and_the_dimension() -> None:
    with pytest.raises(ConfigError, match=r"--tensor-parallel-size is 3; it must divide heads, which is 4"):
        small_plan(0, 3)
    with pytest.raises(ConfigError, match="rank is 2; expected 0 to 1"):
        Shards(2, 2)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(total=st.integers(1, 200), size=st.integers(1, 16))
def test_padded_shards_cover_every_row_once(total: int, size: int) -> None:
    seen: list[int] = []
    for rank in range(size):
        rows, (start, stop) = Shards(rank, size).padded(total)
        assert 0 <= stop - start <= rows == -(-total // size)
        seen += range(start, stop)
    assert seen == list(range(total))


def test_dummy_weights_are_deterministic_and_the_same_for_any_number_of_ranks() -> None:
    def filled(rank: int = 0, size: int = 1, seed: int = 1) -> dict[str, Tensor]:
        plan = small_plan(rank, size)
        params = empty(plan)
        dummy.fill(plan, params.__getitem__, seed)
        assert not any(p.isnan().any() for p in params.values())
        return params

    one, again, other = filled(), filled(), filled(seed=2)
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert not torch.equal(one["out"], other["out"])
    ranks = [filled(r, 2) for r in range(2)]
    assert torch.equal(torch.cat([r["out"] for r in ranks], 1), one["out"])
    assert torch.equal(torch.cat([r["embed"] for r in ranks])[:V], one["embed"])
    assert not torch.equal(one["experts"][0], one["experts"][1])


def test_dummy_distributions() -> None:
    plan = [
        whole("w", "w", (200, 300)),
        whole("n", "n", (50,), init="ones"),
        whole("z", "z", (50,), init="zeros"),
        whole("a", "a", (4000,), init="a_log"),
        whole("dt", "dt", (4000,), init="dt_bias"),
    ]
    params = empty(plan)
    seen: list[int] = []
    dummy.fill(plan, params.__getitem__, 0, seen.append)
    assert sum(seen) == sum(p.numel() * 4 for p in params.values())
    assert abs(params["w"].std() - 0.02) < 5e-4
    assert abs(params["w"].mean()) < 5e-4
    assert torch.equal(params["n"], torch.ones(50))
    assert torch.equal(params["z"], torch.zeros(50))
    decay, step = params["a"].exp(), torch.nn.functional.softplus(params["dt"])
    assert 1 - 1e-4 < decay.min() < 1.5 < 15.5 < decay.max() < 16 + 1e-4
    assert 1e-3 - 1e-6 < step.min() < 1.2e-3 < 0.09 < step.max() < 0.1 + 1e-4


def test_the_progress_bar_shows_bytes_on_stderr_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    for show in (None, True):  # a test's stderr is no terminal
        with progress_bar("Loading weights", 3 << 20, show=show) as advance:
            advance(3 << 20)
        out, err = capsys.readouterr()
        assert out == ""
        assert ("Loading weights" in err and "3.0/3.0 MiB" in err) == bool(show)
