"""Who serves an op for how many tokens, who refuses and why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

from tests.fixtures.gguf_files import converted
from tests.models import random_checkpoint, random_kimi_k2, random_qwen
from thalweg.assembly.info import OpChoice
from thalweg.assembly.inspect import describe
from thalweg.config.engine import EngineConfig
from thalweg.errors import ConfigError
from thalweg.ops import registry
from thalweg.ops.registry import Op, Resolver, Tokens, Where, implementations, ops, register

CPU, GPU = Where("cpu", "float32"), Where("cuda", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyDims:
    K: int


Toy = Callable[[Tensor], str]
TOY: Op[ToyDims, Toy] = Op("toy", ToyDims)
DIMS = ToyDims(K=64)


def named(name: str) -> Callable[[Where, ToyDims], Toy]:
    return lambda where, dims: lambda x: f"{name} {len(x)}"


def only_cuda(where: Where, dims: ToyDims) -> str | None:
    return None if where.device == "cuda" else f"needs cuda, not {where.device}"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of one op: kernels for a GPU, one of them for few tokens, and a form that serves if asked for."""
    monkeypatch.setattr(registry, "_implementations", {})
    register(TOY, "reference", named("reference"), capturable=False)
    register(TOY, "kernel", named("kernel"), supports=only_cuda, priority=10)
    few = lambda dims: Tokens(last=dims.K // 4)  # noqa: E731
    register(TOY, "few", named("few"), supports=only_cuda, tokens=few, priority=20)
    register(TOY, "separate", named("separate"), priority=-10)


def who(function: Toy, *tokens: int) -> list[str]:
    return [function(torch.zeros(n)) for n in tokens]


def table(resolver: Resolver) -> dict[str, str]:
    """Of the choice that was made last."""
    return {str(span.tokens): span.name for span in resolver.explain()[-1].table}


def test_every_op_has_a_reference_that_serves_anywhere() -> None:
    for op in ops():
        (reference,) = (i for i in implementations(op) if i.priority == 0)
        assert reference.name == "reference"
        assert reference.supports(Where("meta", "float16"), None) is None
        assert reference.tokens(None) == Tokens()


def random_gguf(folder: Path) -> Path:
    """A model whose weights are in blocks."""
    c = random_qwen.config()
    random_checkpoint.write(folder / "random", c, random_qwen.published(c, random_qwen.weights(c), prefix="model."))
    return converted(folder / "random.gguf", "q8_0", str(folder / "random"))


def dims_classes() -> list[type]:
    """Of all ops, and of ops within them."""
    modules = [m for name, m in sys.modules.items() if name.startswith("thalweg.ops.")]
    found = {c for m in modules for c in vars(m).values() if isinstance(c, type) and c.__name__.endswith("Dims")}
    return sorted(found, key=lambda c: c.__name__)


def test_every_dimension_can_be_told_by_an_engine_process() -> None:
    told = get_args(get_args(get_type_hints(OpChoice)["dims"])[1])
    found = [(c, name, kind) for c in dims_classes() for name, kind in get_type_hints(c).items()]
    assert len(found) > len(ops())
    for dims, name, kind in found:
        kinds = set(map(type, get_args(kind))) if get_origin(kind) is Literal else {kind}
        assert kinds <= set(told) or is_dataclass(kind), f"{dims.__name__}.{name} is {kind}"


def test_every_op_is_resolved_by_a_layer_of_some_family(tmp_path: Path) -> None:
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "qwen.json").write_text(json.dumps(random_qwen.config()))
    (tmp_path / "kimi_k2.json").write_text(json.dumps(random_kimi_k2.config()))
    int4 = random_kimi_k2.config(quantization_config=random_kimi_k2.INT4)
    (tmp_path / "kimi_k2_int4.json").write_text(json.dumps(int4))
    (tmp_path / "qwen_fp8.json").write_text(json.dumps(random_qwen.config(quantization_config=fp8)))
    options: list[dict[str, Any]] = [
        {},
        {"tensor_parallel_size": 2},
        {"data_parallel_size": 2, "enable_expert_parallel": True},
        {"quantization": "fp8"},
        {"load_format": "dummy", "config_file": str(tmp_path / "qwen.json")},
        {"load_format": "dummy", "config_file": str(tmp_path / "qwen_fp8.json")},
        {"load_format": "dummy", "config_file": str(tmp_path / "kimi_k2.json")},
        {"load_format": "dummy", "config_file": str(tmp_path / "kimi_k2_int4.json")},
        {"model": str(random_gguf(tmp_path))},
    ]
    resolved = {choice.op for o in options for choice in describe(EngineConfig(device="cpu", **o)).ops}
    # One is in the experts' sum and apart with --op, one by itself in an MTP layer alone, the others asked for on GPUs.
    on_gpus = {"routed_experts", "gathered_experts", "gdn_decode_add", "sample_over_ranks"}
    elsewhere = {"scaled_residual_add", "rms_norm"} | on_gpus
    assert resolved == set(ops()) - elsewhere


@pytest.mark.usefixtures("toy")
def test_the_best_that_agrees_serves_its_tokens_and_explain_says_why() -> None:
    resolver = Resolver()
    assert who(resolver.resolve(TOY, CPU, DIMS), 0, 1, 99) == ["reference 0", "reference 1", "reference 99"]
    on_gpu = resolver.resolve(TOY, GPU, DIMS)
    assert who(on_gpu, 0, 1, 16, 17, 9999) == ["few 0", "few 1", "few 16", "kernel 17", "kernel 9999"]
    cpu, gpu = resolver.explain()
    assert (cpu.op, cpu.where, cpu.dims) == ("toy", CPU, DIMS)
    assert cpu.refused == (
        ("few", "needs cuda, not cpu"),
        ("kernel", "needs cuda, not cpu"),
        ("separate", "serves only if --op asks for it"),
    )
    assert [(s.tokens, s.name, s.capturable) for s in cpu.table] == [(Tokens(), "reference", False)]
    assert [(str(s.tokens), s.name, s.capturable) for s in gpu.table] == [
        ("1-16", "few", True),
        ("17-", "kernel", True),
    ]
    assert gpu.refused == (
        ("reference", "'few', 'kernel' come first"),
        ("separate", "serves only if --op asks for it"),
    )


@pytest.mark.usefixtures("toy")
def test_what_serves_any_number_is_returned_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(x: Tensor) -> str:
        return "itself"

    register(TOY, "best", lambda where, dims: function, priority=30)
    assert Resolver().resolve(TOY, CPU, DIMS) is function


@pytest.mark.usefixtures("toy")
def test_arguments_of_a_table_go_through_as_they_are() -> None:
    seen: list[Any] = []

    def build(where: Where, dims: ToyDims) -> Any:
        return lambda *args, **named: seen.append((args, named))

    register(TOY, "some", build, tokens=Tokens(3, 5), priority=30)
    x: Any = torch.zeros(4)
    function: Any = Resolver().resolve(TOY, GPU, DIMS)
    function(x, 1, a=2)
    assert seen == [((x, 1), {"a": 2})]


@pytest.mark.usefixtures("toy")
def test_ranges_in_the_middle_and_touching_ones_of_one_implementation() -> None:
    register(TOY, "middle", named("middle"), tokens=Tokens(10, 20), priority=30)
    resolver = Resolver()
    resolver.resolve(TOY, GPU, DIMS)
    assert table(resolver) == {"1-9": "few", "10-20": "middle", "21-": "kernel"}
    resolver.resolve(TOY, CPU, DIMS)
    assert table(resolver) == {"1-9": "reference", "10-20": "middle", "21-": "reference"}
    resolver.resolve(TOY, GPU, ToyDims(K=4))  # few serves one token
    assert table(resolver) == {"1": "few", "2-9": "kernel", "10-20": "middle", "21-": "kernel"}


@pytest.mark.usefixtures("toy")
def test_the_same_question_is_remembered_once() -> None:
    resolver = Resolver()
    for K in (64, 64, 128):
        resolver.resolve(TOY, CPU, ToyDims(K=K))
    assert [c.dims.K for c in resolver.explain()] == [64, 128]


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("key", ["toy", "*"])
def test_preference_overrides_priority(key: str) -> None:
    resolver = Resolver({key: "reference"})
    assert who(resolver.resolve(TOY, GPU, DIMS), 1, 99) == ["reference 1", "reference 99"]
    assert resolver.explain()[0].refused[:2] == (
        ("few", "'reference' was asked for"),
        ("kernel", "'reference' was asked for"),
    )
    assert who(Resolver({key: "separate"}).resolve(TOY, CPU, DIMS), 1) == ["separate 1"]


@pytest.mark.usefixtures("toy")
def test_a_preference_for_what_serves_few_tokens_leaves_the_others_as_usual() -> None:
    register(TOY, "most", named("most"), supports=only_cuda, priority=30)
    resolver = Resolver({"toy": "few"})
    resolver.resolve(TOY, GPU, DIMS)
    assert table(resolver) == {"1-16": "few", "17-": "most"}


@pytest.mark.usefixtures("toy")
def test_what_rounds_activations_serves_only_if_that_is_allowed() -> None:
    register(TOY, "rounds", named("rounds"), priority=40, rounding=0.01)
    assert who(Resolver().resolve(TOY, CPU, DIMS), 1) == ["rounds 1"]
    exact = Resolver(quantize_activations=False)
    assert who(exact.resolve(TOY, CPU, DIMS), 1) == ["reference 1"]
    assert "--no-quantize-activations is set" in dict(exact.explain()[0].refused)["rounds"]
    with pytest.raises(ConfigError, match=r"cannot be served by 'rounds'.*--no-quantize-activations"):
        Resolver({"toy": "rounds"}, quantize_activations=False).resolve(TOY, CPU, DIMS)


@pytest.mark.usefixtures("toy")
def test_an_op_of_its_own_comes_before_the_star() -> None:
    assert who(Resolver({"*": "reference", "toy": "kernel"}).resolve(TOY, GPU, DIMS), 1) == ["kernel 1"]


@pytest.mark.usefixtures("toy")
def test_a_preferred_kernel_that_cannot_serve_is_an_error_not_a_fallback() -> None:
    expected = r"op 'toy' cannot be served by 'kernel' for cpu, float32, \{'K': 64\} \(kernel: needs cuda, not cpu\)"
    with pytest.raises(ConfigError, match=expected + "; change --op") as error:
        Resolver({"toy": "kernel"}).resolve(TOY, CPU, DIMS)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("toy")
def test_preferences_for_what_does_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match="'tritn' for op 'toy'; expected few or kernel or reference or separate"):
        Resolver({"toy": "tritn"})
    with pytest.raises(ConfigError, match=r"'tritn' for op '\*'; expected few or"):
        Resolver({"*": "tritn"})
    with pytest.raises(ConfigError, match="unknown op 'tyo'; known: toy"):
        Resolver({"tyo": "kernel"})


@pytest.mark.usefixtures("toy")
def test_unknown_ops_double_names_and_gaps_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown op 'nope'; known: toy"):
        implementations("nope")
    with pytest.raises(ConfigError, match="already has an implementation named 'kernel'"):
        register(TOY, "kernel", named("kernel"))
    gap: Op[ToyDims, Toy] = Op("gap", ToyDims)
    register(gap, "few", named("few"), tokens=Tokens(last=4))
    with pytest.raises(ConfigError, match="op 'gap' has no implementation"):
        Resolver().resolve(gap, CPU, DIMS)


def test_dims_of_another_op_and_misspelt_or_missing_ones_are_type_errors() -> None:
    from thalweg.ops.norm import RMS_NORM, RmsNormDims

    with pytest.raises(TypeError, match="op 'rms_norm' takes RmsNormDims, not ToyDims"):
        Resolver().resolve(RMS_NORM, CPU, DIMS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="d"):
        RmsNormDims(d=64)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="D"):
        RmsNormDims()  # type: ignore[call-arg]


WRONG = """
from torch import Tensor
from thalweg.ops.delta.kda_mixer import KDA_MIXER_PREFILL
from thalweg.ops.norm import RMS_NORM, RmsNormDims
from thalweg.ops.registry import Resolver, Where, register

where, x = Where("cpu", "float32"), Tensor()
Resolver().resolve(RMS_NORM, where, RmsNormDims(D=4))(x, x, 1e-5)
Resolver().resolve(RMS_NORM, where, RmsNormDims(d=4))
Resolver().resolve(RMS_NORM, where, RmsNormDims())
Resolver().resolve(KDA_MIXER_PREFILL, where, RmsNormDims(D=4))
Resolver().resolve(RMS_NORM, where, RmsNormDims(D=4))(x, 1e-5)

def other(x: Tensor) -> Tensor:
    return x

register(RMS_NORM, "other", lambda where, dims: other)
"""


@pytest.mark.slow
def test_mypy_finds_wrong_dims_wrong_calls_and_wrong_implementations(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    file = tmp_path / "wrong.py"
    file.write_text(WRONG)
    root, options = Path(__file__).parents[2], ["--config-file", "pyproject.toml", "--output", "json"]
    command, env = [sys.executable, "-m", "mypy", *options, str(file)], {**os.environ, "MYPYPATH": "src"}
    found = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=280, check=False)
    errors = [json.loads(line) for line in found.stdout.splitlines()]
    assert {error["line"] for error in errors} == {9, 10, 11, 12, 17}, found.stdout + found.stderr
