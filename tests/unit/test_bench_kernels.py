"""`thalweg bench kernels`: what is checked before it is timed, the suites on a CPU, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import random_kimi_k2
from tests.models.random_qwen import config, nested
from thalweg.bench.ceilings import Ceilings
from thalweg.bench.kernels import measure, rearrange, timing
from thalweg.bench.kernels.case import Arguments, Candidate, Case, Setting
from thalweg.bench.kernels.feed_forward import distinct_experts
from thalweg.bench.kernels.measure import Measurement, measure_case
from thalweg.bench.kernels.model import PUBLISHED, ModelOps
from thalweg.bench.kernels.ranks import OF_EXPERTS, OPS
from thalweg.bench.kernels.suites import DECODE, PREFILL, RANKS, SUITES, choose_ops, run_suite
from thalweg.cli import main
from thalweg.config.engine import EngineConfig
from thalweg.errors import ConfigError
from thalweg.ops.delta.kda_mixer import KDA_MIXER_DECODE
from thalweg.ops.linear import NORM_LINEAR
from thalweg.ops.registry import Where
from thalweg.ops.toolchain import cpu_build

CPP = cpu_build.why_not(Where("cpu", "float32"))  # None: this machine has a compiler
CEILINGS = Ceilings(bytes_per_s=1e9, flops_per_s=1e12)


def setting(device: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any) -> Setting:
    name = str(dtype).removeprefix("torch.")
    model = ModelOps(EngineConfig(device=device, dtype=name, load_format="dummy", **options))
    return Setting(torch.device(device), dtype, model, (1, 3), 70)


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
    (m,) = measured(Candidate("a", right), num_bytes=2e6, flops=5e9, rate=2.0)
    assert (m.bound, m.floor_us) == ("flops", pytest.approx(2500))
    (m,) = measured(Candidate("a", right))
    assert (m.bound, m.floor_us) == (None, None)


def test_a_result_may_be_off_by_what_its_candidate_rounds() -> None:
    def off(x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, ids = right(x, state)
        return y * 1.03, ids

    _, exact, coarse = measured(Candidate("a", right), Candidate("b", off), Candidate("c", off, rounding=0.04))
    assert exact.wrong
    assert not coarse.wrong
    assert coarse.us is not None


def run(setting: Setting, suite: str, op: str | None = None) -> list[Measurement]:
    return list(run_suite(choose_ops(suite, op, setting.model), setting, CEILINGS))


def small_qwen(folder: Path) -> str:
    """A config.json of Qwen3.5 with experts."""
    file = folder / "config.json"
    file.write_text(json.dumps(nested(config())))
    return str(file)


def small_k2(folder: Path, **options: Any) -> str:
    """A config.json of Kimi-K2."""
    file = folder / "k2.json"
    file.write_text(json.dumps(random_kimi_k2.config(**options)))
    return str(file)


def test_seeds_run_on_a_cpu_and_nothing_in_them_is_wrong() -> None:
    results = run(setting(), "seeds")
    assert {m.op for m in results} == {"rearrange", "projections", "split_norms", "scaled_residual_add"}
    check(results)


@pytest.mark.parametrize("suite", ["decode", "prefill"])
@pytest.mark.parametrize("family", ["kimi", "qwen", "k2"])
def test_suites_run_on_a_cpu_and_nothing_in_them_is_wrong(suite: str, family: str, tmp_path: Path) -> None:
    config_file = {"kimi": lambda _: None, "qwen": small_qwen, "k2": small_k2}[family](tmp_path)
    s = setting(config_file=config_file)
    results = run(s, suite)
    found = list(dict.fromkeys(m.op for m in results))
    mixers = {
        ("kimi", "decode"): ["kda_mixer_decode", "mla_mixer_decode"],
        ("kimi", "prefill"): ["batched_projection", "kda_mixer_prefill", "mla_prefill"],
        ("qwen", "decode"): ["gdn_mixer_decode", "gqa_mixer_decode"],
        ("qwen", "prefill"): ["gdn_mixer_prefill", "gqa_prepare", "gqa_prefill"],
        ("k2", "decode"): ["split_norms", "mla_decode"],
        ("k2", "prefill"): ["split_norms", "mla_rope", "mla_prefill"],
    }[family, suite]
    dense = "silu_and_mul" if family == "qwen" else "norm_swiglu"  # the latter of layers without experts
    assert set(mixers) | {"norm_linear", "linear_add", "norm_router", "experts", dense} <= set(found)
    assert ("sample" in found) == (suite == "decode")
    check(results)
    assert {m.implementation for m in results if m.serves} <= {"cpp", "panels", "reference", "separate"}
    labels = {m.case for m in results if m.op == "experts"}
    assert any(" in fp8, " in label for label in labels)
    assert any(" in int4, " in label for label in labels)
    assert any(" in " not in label for label in labels)


def check(results: list[Measurement]) -> None:
    assert not [m for m in results if m.wrong]
    for m in results:
        assert (m.us is None) == bool(m.refusal)
        assert m.timed in ("eager", "host")
    for op in {m.op for m in results}:
        assert any(m.us and m.us.min > 0 for m in results if m.op == op)
    keys = [(m.op, m.case, m.implementation) for m in results]
    assert len(set(keys)) == len(keys)


def test_every_op_that_a_model_asks_for_has_cases(tmp_path: Path) -> None:
    known = {op.name for op, _ in (*DECODE, *PREFILL)} | set(OPS)
    configs = [small_qwen(tmp_path), small_k2(tmp_path), small_k2(tmp_path, q_rank=None)]
    divided = setting(data_parallel_size=2, enable_expert_parallel=True).model
    assert divided.names() <= known | set(OF_EXPERTS)
    for options in ({}, *({"config_file": file} for file in configs), {"tensor_parallel_size": 2}):
        model = setting(**options).model
        assert model.names() <= known
        of_suites = {name for suite in ("decode", "prefill") for name in names(suite, model)}
        assert of_suites == model.names() - set(OPS)
        assert (set(OPS) <= model.names()) == ("tensor_parallel_size" in options)


def names(suite: str, model: ModelOps) -> set[str]:
    with pytest.raises(ConfigError) as refused:
        choose_ops(suite, "no such op", model)
    return set(str(refused.value).partition(" has ")[2].split(", "))


@pytest.mark.parametrize(
    ("maker", "rest", "results"), [("linear_fp8", 0, 1), ("norm_linear_fp8", 8, 1), ("linear_add_fp8", 0, 2)]
)
def test_products_in_float8_are_those_of_the_model(maker: str, rest: int, results: int) -> None:
    from thalweg.bench.kernels import projections
    from thalweg.ops.linear.fp8 import Fp8LinearDims

    cases = list(getattr(projections, maker)(setting(), Fp8LinearDims(D=200, O=24, rest=rest)))
    assert [case.label for case in cases] == [f"200 to 24{' + 8' * bool(rest)}, batch {B}" for B in (1, 3)]
    tensors = {t.dtype: t for t in cases[0].make(0).args if isinstance(t, torch.Tensor)}
    assert tensors[torch.float8_e4m3fn].shape == (24, 200)
    weight_bytes = 24 * 200 * (1 + 4 / 128) + 4 * rest * 200
    assert cases[0].num_bytes == 4 * (200 + results * (24 + rest)) + weight_bytes
    assert all(m.us and not m.wrong for case in cases for m in measure_case(case, setting(), CEILINGS) if not m.refusal)


@pytest.mark.parametrize("prompts", [False, True])
def test_prompts_have_linears_in_float8_beside_the_model_s_own(prompts: bool) -> None:
    from thalweg.bench.kernels import projections
    from thalweg.ops.linear import LinearDims

    cases = list(projections.linear_add(replace(setting(), prompts=prompts), LinearDims(D=256, O=24)))
    found = {(case.op, case.rate) for case in cases}
    assert found == ({("linear_add", 1.0), ("linear_add_fp8", 2.0)} if prompts else {("linear_add", 1.0)})


def test_bytes_of_a_projection_are_its_tensors() -> None:
    s = setting()
    (build,) = choose_ops("decode", "linear_add", s.model)
    case = next(iter(build(s)))
    x, w, residual = case.make(0).args
    y = case.candidates[0].fn(x, w, residual)
    assert case.num_bytes == sum(t.numel() * 4 for t in (x, w, y, residual))
    assert case.flops == 2 * y.numel() * x.shape[1]
    assert torch.equal(case.make(0).args[1], w)
    assert not torch.equal(case.make(1).args[1], w)


def test_projections_are_counted_at_the_published_sizes() -> None:
    s = replace(setting(dtype=torch.bfloat16, config_file=str(PUBLISHED)), batch_sizes=(1,), context=1)
    (build,) = choose_ops("seeds", "projections", s.model)
    one, *prompts, four, _, _, _ = build(s)
    assert [case.label.rpartition(", ")[2] for case in prompts] == ["1 tokens", "2 tokens", "4 tokens"]
    # The published floors of 14.0 and 3.7 us at 4.3 TB/s.
    assert one.num_bytes / 4.3e6 == pytest.approx(14.0, abs=0.06)
    assert four.num_bytes / 4.3e6 == pytest.approx(3.7, abs=0.06)


def test_sizes_are_those_of_a_rank() -> None:
    widths = {}
    for ranks in (1, 4):
        model = setting(config_file=str(PUBLISHED), tensor_parallel_size=ranks).model
        (mixer,) = model.dims(KDA_MIXER_DECODE)
        widths[ranks] = mixer.H, {sum(dims.parts) for dims in model.dims(NORM_LINEAR)}
    assert widths[1] == (32, {12576, 6720, 163840})
    assert widths[4][0] == 8
    assert len(setting(config_file=str(PUBLISHED), num_layers=1).model.dims(NORM_LINEAR)) == 2  # no MLA layer


def test_projections_of_a_model_without_kda_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the model has no KDA layer"):
        run(setting(config_file=small_qwen(tmp_path)), "seeds", "projections")


def test_distinct_experts() -> None:
    assert distinct_experts(256, 8, 1) == pytest.approx(8)
    assert distinct_experts(256, 8, 128) == pytest.approx(256 * (1 - (31 / 32) ** 128))


def test_rearranges_are_equal_to_the_native_forms() -> None:
    pytest.importorskip("einops")
    results = run(setting(), "seeds", "rearrange")
    native = [m for m in results if m.implementation == "native"]
    assert len(native) == len(rearrange.SITES)
    assert all(m.equal_bits for m in native)


def test_without_einops_a_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rearrange, "MISSING", "einops is not installed; pip install einops")
    results = run(setting(), "seeds", "rearrange")
    assert {m.refusal for m in results if m.implementation == "einops"} == {rearrange.MISSING}
    assert all(m.us for m in results if m.implementation == "native")


def test_the_command_prints_published_figures_beside_ours(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "k.json"
    for op, published in (("split_norms", "9.5 -> 3.5 us"), ("scaled_residual_add", "6.3 -> 2.8 us")):
        line = f"bench kernels --suite seeds --op {op} --batch-size 2,4 --device cpu --output-json {file}"
        assert main(line.split()) == 0
        assert capfd.readouterr().out.count(f"published, on another machine: {published}") == 1
        assert {r["published"] for r in json.loads(file.read_text())["results"]} == {published}


def test_command_prints_and_writes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "k.json"
    line = f"bench kernels --op norm_router --batch-size 2 --device cpu --output-json {file}"
    assert main(line.split()) == 0
    out = capfd.readouterr().out
    assert "norm_router, 8 experts, batch 2" in out
    assert ("> cpp (eager)" if CPP is None else "> reference (eager)") in out
    assert "triton: needs cuda, not cpu" in out
    figures = json.loads(file.read_text())
    assert figures["engine"]["suite"] == "decode"
    by_name = {r["implementation"]: r for r in figures["results"]}
    first = by_name["reference"]
    assert first["us"]["min"] <= first["us"]["median"] <= first["us"]["max"]
    assert (by_name["triton"]["us"], by_name["triton"]["refusal"]) == (None, "needs cuda, not cpu")
    assert by_name["cpp"]["refusal"] == (CPP or "")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--suite x", "--suite is 'x'; expected seeds, decode, prefill, ranks"),
        ("--suite ranks", "--tensor-parallel-size"),
        ("--suite ranks -tp 2 --op sample", "suite 'ranks' has all_reduce_add"),
        ("--op x", "--op is 'x'; suite 'decode' has vocab_rows, linear, norm_linear"),
        ("--batch-size 0", "--batch-size is '0'"),
        ("--batch-size a", "--batch-size is 'a'"),
        ("--context 0", "--context"),
        ("--config no/such.json", "such.json"),
        ("-tp 3", "3"),
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
@pytest.mark.parametrize("suite", [suite for suite in SUITES if suite != RANKS])
def test_suites_on_a_gpu(suite: str) -> None:
    results = run(
        setting("cuda", torch.bfloat16, config_file=str(PUBLISHED), num_layers=4, tensor_parallel_size=4), suite
    )
    assert not [m for m in results if m.wrong]
    if suite == "decode":
        assert "triton" in {m.implementation for m in results if m.us and m.timed == "graph"}
    if suite == "seeds":
        fused = [m for m in results if m.op in ("split_norms", "scaled_residual_add") and m.times_faster]
        assert all(m.equal_bits for m in fused if m.implementation == "triton")
