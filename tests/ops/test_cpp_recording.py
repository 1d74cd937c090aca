"""Recorded calls of the CPU's ops in C++: what is replayed, and what cannot be."""

from __future__ import annotations

import gc
import weakref
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
from thalweg.ops.toolchain.cpu_recording import LINE, Scratch, recording

pytestmark = needs_cpp

MIB = 1 << 20


def layers(x: Tensor, w: Tensor, norm: Tensor) -> Tensor:
    """Views, memory made on the way, floats, addresses that may be missing, and a result in place."""
    residual = rms_norm(x, norm, 1e-2)
    gate_up = norm_linear(residual, norm, 1e-5, w)
    return linear_add(silu_and_mul(gate_up)[:, :8], w[:8], residual)


@torch.inference_mode()
def test_replays_compute_anew_from_the_same_memory() -> None:
    torch.manual_seed(0)
    x, w, norm = torch.randn(3, 8), torch.randn(32, 8), torch.rand(8)
    with recording(Scratch(MIB)) as recorded:
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
    with recording(Scratch(MIB)) as recorded:
        COMPUTES[name](rms_norm(x, norm, 1e-5))
    assert recorded.why_not == f"torch runs {name} between ops in C++"
    assert len(recorded) == 0


@torch.inference_mode()
def test_views_are_no_computation() -> None:
    x, norm = torch.randn(4, 2, 8), torch.rand(8)
    with recording(Scratch(MIB)) as recorded:
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
    with recording(Scratch(MIB)) as recorded:
        x = rows(ids, w)
    ids[1] = 3
    with pytest.raises(RuntimeError, match="vocab_rows failed, call 0 of 1"):
        recorded.replay()
    ids[1] = 0
    recorded.replay()
    assert x.equal(w[ids])


@torch.inference_mode()
def test_once_it_is_refused_it_keeps_no_more_results() -> None:
    scratch, norm = Scratch(MIB), torch.rand(MIB)
    with recording(scratch) as recorded:
        y = rms_norm(torch.randn(1, 8), torch.rand(8), 1e-5).sigmoid()
        for _ in range(3):
            y = rms_norm(torch.randn(4, MIB), norm, 1e-5)
        large = weakref.ref(y)
        del y
        assert large() is None
    assert recorded.why_not == "torch runs randn between ops in C++"
    assert len(scratch) <= LINE


@torch.inference_mode()
def test_it_is_freed_with_its_last_reference() -> None:
    x, norm = torch.randn(3, 8), torch.rand(8)
    with recording(Scratch(MIB)) as recorded:
        rms_norm(x, norm, 1e-5)
    recorded.replay()
    freed = weakref.ref(recorded)
    gc.disable()
    try:
        del recorded
        assert freed() is None
    finally:
        gc.enable()


@torch.inference_mode()
def test_other_threads_are_not_recorded() -> None:
    x, norm = torch.randn(3, 8), torch.rand(8)
    with recording(Scratch(MIB)) as recorded:
        other = Thread(target=lambda: rms_norm(x, norm, 1e-5).sigmoid())
        other.start()
        other.join()
        rms_norm(x, norm, 1e-5)
    assert (len(recorded), recorded.why_not) == (1, None)


def test_a_function_without_a_form_for_replays_is_not_recorded() -> None:
    with recording(Scratch(MIB)) as recorded:
        cpu_build.function("replay", *[c_int64] * 2)(0, 0)
    assert "replay_again" in str(recorded.why_not)


@torch.inference_mode()
def test_recordings_share_the_memory_of_their_results() -> None:
    scratch, norm = Scratch(MIB), torch.rand(8)
    xs = [torch.randn(rows, 8) for rows in (3, 1, 5)]
    recordings, results = [], []
    for x in xs:
        with recording(scratch) as recorded:
            results.append(rms_norm(rms_norm(x, norm, 1e-5), norm, 1e-5))
        recordings.append(recorded)
    assert len(scratch) == 6 * LINE  # two results of the largest
    assert {y.data_ptr() % LINE for y in results} == {0}
    for i in (2, 0, 1, 0):
        recordings[i].replay()
        assert results[i].equal(rms_norm(rms_norm(xs[i], norm, 1e-5), norm, 1e-5))


@pytest.mark.parametrize("rows", [range(1, 65), range(64, 0, -1)], ids=["growing", "shrinking"])
def test_batches_of_every_size_take_what_the_largest_does(rows: range) -> None:
    widths = (40, 500, 7, 4000, 1)  # of a row's results
    scratch = Scratch(64 * sum(widths) * LINE)
    for d in rows:
        scratch.begin()
        made = [scratch.like(torch.empty(d * width * LINE, dtype=torch.uint8)) for width in widths]
        assert all(x is not None for x in made)
    assert len(scratch) == scratch.limit


def test_results_lie_apart() -> None:
    scratch = Scratch(MIB)
    for _ in range(2):
        scratch.begin()
        made = [scratch.like(torch.empty(size, dtype=torch.uint8)) for size in (MIB // 2, LINE + 1, MIB // 4, 7)]
        for i, x in enumerate(made):
            assert x is not None
            x.fill_(i)
        assert [int(x.float().mean()) for x in made if x is not None] == [0, 1, 2, 3]
        assert len(scratch) == 3 * MIB // 4 + 3 * LINE


def test_memory_serves_again_once_no_view_refers_to_it() -> None:
    scratch, of = Scratch(MIB), torch.empty(1000)
    first, second = scratch.like(of), scratch.like(of)
    assert first is not None
    assert second is not None
    at, part = first.data_ptr(), first.view(10, 100)[3:, :50]
    del first
    third = scratch.like(of)
    assert third is not None
    assert third.data_ptr() not in (at, second.data_ptr())
    del part
    fourth = scratch.like(of)
    assert fourth is not None
    assert fourth.data_ptr() == at
    assert len(scratch) == 3 * 4032


@torch.inference_mode()
def test_a_chain_of_layers_takes_the_memory_of_one() -> None:
    """And gives what it does without a recording, as often as it is replayed."""
    torch.manual_seed(0)
    w, norm = torch.randn(32, 8), torch.rand(8)
    x = torch.randn(3, 8)

    def chain(x: Tensor, depth: int) -> Tensor:
        y = x
        for _ in range(depth):
            y = layers(y, w, norm)
        return y

    sizes = []
    for depth in (2, 20):
        with recording(scratch := Scratch(MIB)) as recorded:
            y = chain(x, depth)
        sizes.append(len(scratch))
        for _ in range(2):
            x.normal_()
            recorded.replay()
            assert y.equal(chain(x, depth))
    assert sizes[0] == sizes[1]


@torch.inference_mode()
def test_more_than_the_limit_is_not_recorded() -> None:
    x, norm, scratch = torch.randn(1, 8), torch.rand(8), Scratch(limit=2 * LINE)
    with recording(scratch) as recorded:
        rms_norm(rms_norm(rms_norm(x, norm, 1e-5), norm, 1e-5), norm, 1e-5)
    assert recorded.why_not is None
    with recording(scratch) as recorded:
        _kept = [rms_norm(x, norm, 1e-5) for _ in range(3)]
    assert recorded.why_not == "its results take more than 0 MiB"
    assert len(scratch) == 2 * LINE
