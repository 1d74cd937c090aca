"""`thalweg bench kernels`: what is checked before it is timed, the suites on a CPU, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from thalweg.bench.ceilings import Ceilings
from thalweg.bench.kernels import measure, rearrange, timing
from thalweg.bench.kernels.case import Arguments, Candidate, Case, Setting
from thalweg.bench.kernels.measure import Measurement, measure_case
from thalweg.bench.kernels.shape import Shape, distinct_experts
from thalweg.bench.kernels.suites import SUITES, choose_ops, run_suite
from thalweg.cli import main
from thalweg.errors import ConfigError

CEILINGS = Ceilings(bytes_per_s=1e9, flops_per_s=1e12)


def setting(device: str = "cpu", dtype: torch.dtype = torch.float32, scale: int = 32) -> Setting:
    return Setting(torch.device(device), dtype, Shape().divided(scale), (1, 3), 70)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BUDGET_S", 0.0)
    monkeypatch.setattr(timing, "FEWEST", 1)
    monkeypatch.setattr(timing, "HOST_CALLS", 2)


def measured(*candidates: Candidate, **options: Any) -> list[Measurement]:
    """Of candidates that take (x [4], state [4]) and may change the state."""
    case = Case(
        "toy",
        "4",
        candidates,
        lambda copy: Arguments(torch.arange(4.0), torch.ones(4)),
        changed=lambda a: (a.args[1],),
        **options,
    )
    return list(measure_case(case, setting(), CEILINGS))


def right(x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    state.mul_(2)
    return x + 1, x.long()


def wrong_result(x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    state.mul_(2)
    return x + 1.01, x.long()


def wrong_state(x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x + 1, x.long()


def wrong_integers(x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return right(x, state)[0], x.long().flip(0)


def wrong_shape(x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return right(x, state)[0][None], x.long()


def not_a_number(x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    state.fill_(torch.nan)
    return x + 1, x.long()


def nearly_right(x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y, ids = right(x, state)
    return y * (1 + 1e-6), ids


@pytest.mark.parametrize("fn", [wrong_result, wrong_state, wrong_integers, wrong_shape, not_a_number])
def test_a_wrong_candidate_is_not_timed(fn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []
    monkeypatch.setattr(measure, "_time", lambda candidate, *_: timed.append(candidate.name) or timing.Spread(1, 1, 1))
    first, bad = measured(Candidate("right", right), Candidate("bad", fn))
    assert first.us is not None
    assert first.error is None
    assert bad.us is None
    assert ("integers" if fn is wrong_integers else "error") in bad.wrong
    assert timed == ["right"]


def test_equal_bits_are_those_of_the_named_candidate() -> None:
    candidates = Candidate("a", right), Candidate("b", nearly_right), Candidate("c", nearly_right)
    assert [m.equal_bits for m in measured(*candidates)] == [None, False, False]
    assert [m.equal_bits for m in measured(*candidates, same_bits_as="b")] == [None, None, True]
    assert all(m.us and not m.wrong for m in measured(*candidates))
    assert measured(*candidates)[1].error == pytest.approx(1e-6, rel=0.1)


def test_what_refuses_is_not_run_and_the_next_one_is_held_against() -> None:
    def fail(*_: Any) -> None:
        raise AssertionError

    refused, first, second = measured(Candidate("no", fail, "not here"), Candidate("a", right), Candidate("b", right))
    assert (refused.refusal, refused.us) == ("not here", None)
    assert first.equal_bits is None
    assert second.equal_bits


def test_floor_is_the_longer_of_traffic_and_arithmetic() -> None:
    (m,) = measured(Candidate("a", right), num_bytes=2e6, flops=1e9)
    assert (m.bound, m.floor_us) == ("bytes", pytest.approx(2000))
    (m,) = measured(Candidate("a", right), num_bytes=2e6, flops=5e9)
    assert (m.bound, m.floor_us) == ("flops", pytest.approx(5000))
    (m,) = measured(Candidate("a", right))
    assert (m.bound, m.floor_us) == (None, None)


@pytest.mark.parametrize("suite", SUITES)
def test_suites_run_on_a_cpu_and_nothing_in_them_is_wrong(suite: str) -> None:
    results = list(run_suite(choose_ops(suite, None), setting(), CEILINGS))
    assert list(dict.fromkeys(m.op for m in results)) == list(SUITES[suite])
    assert not [m for m in results if m.wrong]
    for m in results:
        assert (m.us is None) == bool(m.refusal)
        assert m.timed in ("eager", "host")
    for op in SUITES[suite]:
        assert any(m.us and m.us.min > 0 for m in results if m.op == op)


def test_bytes_of_a_projection_are_its_tensors() -> None:
    s = setting()
    case = next(iter(SUITES["decode"]["linear"](s)))
    x, w = case.make(0).args
    y = case.candidates[0].fn(x, w)
    assert case.num_bytes == sum(t.numel() * 4 for t in (x, w, y))
    assert case.flops == 2 * y.numel() * x.shape[1]
    assert torch.equal(case.make(0).args[1], w)
    assert not torch.equal(case.make(1).args[1], w)


def test_projections_are_counted_at_the_real_shape() -> None:
    s = Setting(torch.device("cpu"), torch.bfloat16, Shape(), (1,), 1)
    one, *prompts, four, _, _, _ = SUITES["seeds"]["projections"](s)
    assert [case.label.rpartition(", ")[2] for case in prompts] == ["1 tokens", "2 tokens", "4 tokens"]
    # The published floors of 14.0 and 3.7 us at 4.3 TB/s.
    assert one.num_bytes / 4.3e6 == pytest.approx(14.0, abs=0.06)
    assert four.num_bytes / 4.3e6 == pytest.approx(3.7, abs=0.06)


def test_distinct_experts() -> None:
    assert distinct_experts(256, 8, 1) == pytest.approx(8)
    assert distinct_experts(256, 8, 128) == pytest.approx(256 * (1 - (31 / 32) ** 128))


def test_shapes_are_divided() -> None:
    assert (Shape().kda_projection, Shape().mla_projection) == (12576, 6720)
    small = Shape().divided(32)
    assert (small.width, small.heads, small.experts, small.head_dim) == (72, 1, 8, 128)
    with pytest.raises(ConfigError, match="--scale is 3"):
        Shape().divided(3)


def test_rearranges_are_equal_to_the_native_forms() -> None:
    pytest.importorskip("einops")
    results = list(run_suite(choose_ops("seeds", "rearrange"), setting(), CEILINGS))
    native = [m for m in results if m.implementation == "native"]
    assert len(native) == len(rearrange.SITES)
    assert all(m.equal_bits for m in native)


def test_without_einops_a_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rearrange, "MISSING", "einops is not installed; pip install einops")
    results = list(run_suite(choose_ops("seeds", "rearrange"), setting(), CEILINGS))
    assert {m.refusal for m in results if m.implementation == "einops"} == {rearrange.MISSING}
    assert all(m.us for m in results if m.implementation == "native")


def test_command_prints_and_writes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "k.json"
    line = f"bench kernels --op rms_norm --batch-size 2 --device cpu --scale 32 --output-json {file}"
    assert main(line.split()) == 0
    out = capfd.readouterr().out
    assert "rms_norm, 72 wide, batch 2" in out
    assert "triton: needs cuda, not cpu" in out
    figures = json.loads(file.read_text())
    assert figures["engine"]["suite"] == "decode"
    first, second = figures["results"]
    assert first["implementation"] == "reference"
    assert first["us"]["min"] <= first["us"]["median"] <= first["us"]["max"]
    assert (second["us"], second["refusal"]) == (None, "needs cuda, not cpu")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--suite x", "--suite is 'x'; expected seeds, decode, prefill"),
        ("--op x", "--op is 'x'; suite 'decode' has linear"),
        ("--batch-size 0", "--batch-size is '0'"),
        ("--batch-size a", "--batch-size is 'a'"),
        ("--context 0", "--context"),
        ("--scale 3", "--scale is 3"),
        ("--dtype int4", "--dtype"),
        ("--device toaster", "--device"),
        ("--output-json no/such/folder/f.json", "--output-json"),
    ],
)
def test_a_mistake_is_one_line(options: str, named: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", *options.split()]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert named in err


@pytest.mark.gpu
@pytest.mark.parametrize("suite", SUITES)
def test_suites_on_a_gpu(suite: str) -> None:
    results = list(run_suite(choose_ops(suite, None), setting("cuda", torch.bfloat16, 8), CEILINGS))
    assert not [m for m in results if m.wrong]
    if suite == "decode":
        assert "triton" in {m.implementation for m in results if m.us and m.timed == "graph"}
    if suite == "seeds":
        fused = [m for m in results if m.op in ("split_norms", "scaled_residual_add") and m.times_faster]
        assert all(m.equal_bits for m in fused if m.implementation == "triton")
