"""Who serves an op, who refuses and why."""

from __future__ import annotations

import pytest

import thalweg.ops
from thalweg.errors import ConfigError
from thalweg.ops import registry
from thalweg.ops.registry import OpContext, Resolver, implementations, register

CPU = OpContext("cpu", "float32", {"K": 64})
GPU = OpContext("cuda", "bfloat16", {"K": 128})

OPS = {
    "batched_projection",
    "conv1d_decode",
    "conv1d_prefill",
    "experts",
    "experts_add",
    "gated_rms_norm",
    "kda_decode",
    "kda_gate",
    "kda_prefill",
    "mla_decode",
    "mla_prefill",
    "linear_add",
    "mla_write",
    "norm_linear",
    "norm_router",
    "rms_norm",
    "route",
    "silu_and_mul",
}


def reference(x: int) -> int:
    return x


def kernel(x: int) -> int:
    return x + 1


def only_cuda(context: OpContext) -> str | None:
    return None if context.device == "cuda" else f"needs cuda, not {context.device}"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of one op whose kernel serves cuda alone."""
    monkeypatch.setattr(registry, "_implementations", {})
    register("toy", "reference", reference)
    register("toy", "kernel", kernel, supports=only_cuda, priority=10)


def test_every_op_has_a_reference_that_serves_anywhere() -> None:
    assert thalweg.ops.Resolver is Resolver
    assert set(registry._implementations) >= OPS
    resolver = Resolver({"*": "reference"})
    for op in registry._implementations:
        assert resolver.resolve(op, OpContext("meta", "float16")) is implementations(op)[-1].fn
    assert {c.chosen for c in resolver.explain()} == {"reference"}


@pytest.mark.usefixtures("toy")
def test_the_best_that_agrees_serves_and_explain_says_why() -> None:
    resolver = Resolver()
    assert resolver.resolve("toy", CPU)(1) == 1
    assert resolver.resolve("toy", GPU)(1) == 2
    on_cpu, on_gpu = resolver.explain()
    assert (on_cpu.op, on_cpu.context, on_cpu.chosen) == ("toy", CPU, "reference")
    assert on_cpu.refused == (("kernel", "needs cuda, not cpu"),)
    assert on_gpu.chosen == "kernel"
    assert on_gpu.refused == (("reference", "'kernel' comes first"),)


@pytest.mark.usefixtures("toy")
def test_the_same_question_is_remembered_once() -> None:
    resolver = Resolver()
    resolver.resolve("toy", CPU)
    resolver.resolve("toy", OpContext("cpu", "float32", {"K": 64}))
    resolver.resolve("toy", OpContext("cpu", "float32", {"K": 128}))
    assert [c.context.dims["K"] for c in resolver.explain()] == [64, 128]


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("key", ["toy", "*"])
def test_preference_overrides_priority(key: str) -> None:
    resolver = Resolver({key: "reference"})
    assert resolver.resolve("toy", GPU)(1) == 1
    assert resolver.explain()[0].refused == (("kernel", "'reference' was asked for"),)


@pytest.mark.usefixtures("toy")
def test_an_op_of_its_own_comes_before_the_star() -> None:
    assert Resolver({"*": "reference", "toy": "kernel"}).resolve("toy", GPU)(1) == 2


@pytest.mark.usefixtures("toy")
def test_a_preferred_kernel_that_cannot_serve_is_an_error_not_a_fallback() -> None:
    with pytest.raises(ConfigError, match=r"op 'toy'.*cpu, float32.*kernel: needs cuda, not cpu.*op_preference"):
        Resolver({"toy": "kernel"}).resolve("toy", CPU)


@pytest.mark.usefixtures("toy")
def test_preferences_for_what_does_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match="'tritn' for op 'toy'; expected kernel or reference"):
        Resolver({"toy": "tritn"})
    with pytest.raises(ConfigError, match=r"'tritn' for op '\*'; expected kernel or reference"):
        Resolver({"*": "tritn"})
    with pytest.raises(ConfigError, match="unknown op 'tyo'; known: toy"):
        Resolver({"tyo": "kernel"})


@pytest.mark.usefixtures("toy")
def test_unknown_ops_and_double_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown op 'nope'; known: toy"):
        Resolver().resolve("nope", CPU)
    with pytest.raises(ConfigError, match="already has an implementation named 'kernel'"):
        register("toy", "kernel", kernel)


@pytest.mark.usefixtures("toy")
def test_errors_are_one_line() -> None:
    with pytest.raises(ConfigError) as error:
        Resolver({"toy": "kernel"}).resolve("toy", CPU)
    assert "\n" not in str(error.value)
