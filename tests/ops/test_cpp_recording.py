"""Recorded calls of the CPU's ops in C++: what is replayed, and what cannot be."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int64
from threading import Thread

import pytest
import torch
from torch import Tensor

from tests.ops.cpp_case import needs_cpp
from thalweg.ops.activation.cpp import silu_and_mul
from thalweg.ops.embedding import VocabRowsDims
from thalweg.ops.embedding import cpp as embedding
from thalweg.ops.linear.cpp import linear_add, norm_linear
from thalweg.ops.norm.cpp import rms_norm
from thalweg.ops.toolchain import cpu_build
from thalweg.ops.toolchain.cpu_recording import recording

pytestmark = needs_cpp


def layers(x: Tensor, w: Tensor, norm: Tensor) -> Tensor:
    """Views, memory made on the way, floats, addresses that may be missing, and a result in place."""
    residual = rms_norm(x, norm, 1e-2)
    gate_up = norm_linear(residual, norm, 1e-5, w)
    return linear_add(silu_and_mul(gate_up)[:, :8], w[:8], residual)


@torch.inference_mode()
def test_replays_compute_anew_from_the_same_memory() -> None:
    torch.manual_seed(0)
    x, w, norm = torch.randn(3, 8), torch.randn(32, 8), torch.rand(8)
    with recording() as recorded:
        y = layers(x, w, norm)
    assert recorded.why_not is None
    assert len(recorded) == 4
    assert y.equal(layers(x, w, norm))
    for _ in range(3):
        x.normal_()
        recorded.replay()
        assert y.equal(layers(x, w, norm))


INDEX = torch.tensor([0, 1])
COMPUTES: dict[str, Callable[[Tensor], object]] = {
    "sigmoid": lambda y: y.sigmoid(),
    "add_": lambda y: y.add_(1),
    "__setitem__": lambda y: y.__setitem__(0, y[1]),
    "contiguous": lambda y: y.t().contiguous(),  # a copy, unlike y.contiguous()
    "__getitem__": lambda y: y[INDEX],
    "embedding": lambda y: torch.nn.functional.embedding(INDEX, y),
    "tolist": lambda y: y.tolist(),
    "tensor": lambda y: torch.tensor(1),
}


@torch.inference_mode()
@pytest.mark.parametrize("name", COMPUTES)
def test_what_torch_computes_in_between_is_named_and_nothing_is_recorded(name: str) -> None:
    x, norm = torch.randn(3, 8), torch.rand(8)
    with recording() as recorded:
        COMPUTES[name](rms_norm(x, norm, 1e-5))
    assert recorded.why_not == f"torch runs {name} between ops in C++"
    assert len(recorded) == 0


@torch.inference_mode()
def test_views_are_no_computation() -> None:
    x, norm = torch.randn(4, 2, 8), torch.rand(8)
    with recording() as recorded:
        a, b = x.unflatten(0, (2, 2))[1].flatten(0, 1).split([2, 2])
        y = rms_norm(b.contiguous().view(2, 8), norm, 1e-5)
    assert recorded.why_not is None
    x.normal_()
    recorded.replay()
    assert y.equal(rms_norm(x[3], norm, 1e-5))
    assert a.data_ptr() == x[2].data_ptr()


@torch.inference_mode()
def test_a_call_that_fails_is_named() -> None:
    rows = embedding.build(VocabRowsDims(D=8, scheme="none"), torch.float32)
    ids, w = torch.tensor([1, 2]), torch.randn(3, 8)
    with recording() as recorded:
        x = rows(ids, w)
    ids[1] = 3
    with pytest.raises(RuntimeError, match="vocab_rows failed, call 0 of 1"):
        recorded.replay()
    ids[1] = 0
    recorded.replay()
    assert x.equal(w[ids])


@torch.inference_mode()
def test_other_threads_are_not_recorded() -> None:
    x, norm = torch.randn(3, 8), torch.rand(8)
    with recording() as recorded:
        other = Thread(target=lambda: rms_norm(x, norm, 1e-5).sigmoid())
        other.start()
        other.join()
        rms_norm(x, norm, 1e-5)
    assert (len(recorded), recorded.why_not) == (1, None)


def test_a_function_without_a_form_for_replays_is_not_recorded() -> None:
    with recording() as recorded:
        cpu_build.function("replay", *[c_int64] * 2)(0, 0)
    assert "replay_again" in str(recorded.why_not)
