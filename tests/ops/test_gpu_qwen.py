"""Kernels of Gated DeltaNet and gated attention on the device, in the shapes of published models and odd ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import gdn_case, gqa_case
from tests.ops.gdn_case import GdnShape
from tests.ops.gqa_case import GqaCase, GqaShape, assert_near
from tests.ops.prefill_case import check_in_graphs
from thalweg.ops.delta.gdn import GDN_MIXER_DECODE, GdnDims, GdnMixerDecode
from thalweg.ops.host_tables import StepSequences
from thalweg.ops.registry import Resolver, Where

pytestmark = pytest.mark.gpu

GDN_SHAPES = [GdnShape(2, 4, 128, 128), GdnShape(2, 6, 128, 128), GdnShape(2, 6, 16, 24)]
GQA_SHAPES = [GqaShape(16, 2, 256, 64, 64), GqaShape(6, 1, 256, 64, 64), GqaShape(4, 4, 32, 8, 16)]
DTYPES = [(torch.bfloat16, 2**-6), (torch.float32, 5e-5)]
CONTEXTS = [0, 1, 62, 63, 64, 300, 1000]


@pytest.mark.parametrize("shape", GDN_SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.005), (torch.float32, 1e-5)])
def test_gdn_prefill(shape: GdnShape, dtype: torch.dtype, tolerance: float) -> None:
    from thalweg.ops.delta.gdn.reference import prefill_by
    from thalweg.ops.delta.kda.triton.prefill import kda_prefill

    case = gdn_case.PrefillCase(shape, (0, 1, 15, 64, 200, 0), dtype, "cuda")
    case.check(case.run(prefill_by(kda_prefill)), tolerance)


@pytest.mark.parametrize("shape", GDN_SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float32, 1e-5)])
def test_gdn_decode(shape: GdnShape, dtype: torch.dtype, tolerance: float) -> None:
    """What is chosen there, with rows that share the sink."""
    dims = GdnDims(G=shape.G, H=shape.H, K=shape.K, V=shape.V, W=shape.W)
    op = Resolver().resolve(GDN_MIXER_DECODE, Where("cuda", str(dtype).removeprefix("torch.")), dims)
    gdn_case.DecodeCase(shape, 5, dtype=dtype, device="cuda").check(op, tolerance, padding=3)


def gdn_mixer(shape: GdnShape) -> GdnMixerDecode:
    dims = GdnDims(G=shape.G, H=shape.H, K=shape.K, V=shape.V, W=shape.W)
    return Resolver({"gdn_mixer_decode": "cuda"}).resolve(GDN_MIXER_DECODE, Where("cuda", "bfloat16"), dims)


# Value heads per key head, which are a cluster: as published (2, 3, 4) and others. Batches: 9 is two passes of a block
# where it has so many, 70 and 130 are many.
@pytest.mark.parametrize("B", [1, 2, 3, 8, 9, 32, 70, 130])
@pytest.mark.parametrize(("G", "H"), [(16, 32), (16, 48), (16, 64), (2, 4), (1, 8), (4, 4)])
def test_gdn_mixer_by_batch_and_heads(G: int, H: int, B: int) -> None:
    shape = GdnShape(G, H, 128, 128)
    gdn_case.DecodeCase(shape, B, steps=2, dtype=torch.bfloat16, device="cuda").check(gdn_mixer(shape), 0.005)


@pytest.mark.parametrize("B", [1, 5])
def test_gdn_mixer_with_states_in_bfloat16(B: int) -> None:
    shape = GdnShape(2, 4, 128, 128)
    case = gdn_case.DecodeCase(shape, B, steps=1, dtype=torch.bfloat16, device="cuda", state_dtype=torch.bfloat16)
    case.check(gdn_mixer(shape), 0.005)


@pytest.mark.parametrize("B", [1, 9, 40])
def test_gdn_mixer_in_a_graph_under_load(B: int) -> None:
    """Layers that overlap their neighbours, replayed: each sees what its own last call left, all blocks of a cluster
    the same window."""
    shape = GdnShape(16, 32, 128, 128)
    op = gdn_mixer(shape)
    layers = [gdn_case.DecodeCase(shape, B, steps=1, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
    before = [(c.conv_state.clone(), c.state.clone()) for c in layers]
    eager = [[c.run(op) for c in layers] for _ in range(6)]
    after = [(c.conv_state.clone(), c.state.clone()) for c in layers]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [c.run(op) for c in layers]
    for _ in range(10):
        for c, (conv, state) in zip(layers, before, strict=True):
            c.conv_state.copy_(conv)
            c.state.copy_(state)
        for expected in eager:
            for out in outputs:
                out.fill_(torch.nan)
            graph.replay()
            assert all(torch.equal(o, e) for o, e in zip(outputs, expected, strict=True))
        for c, (conv, state) in zip(layers, after, strict=True):
            assert torch.equal(c.conv_state, conv)
            assert torch.equal(c.state, state)


@pytest.mark.parametrize("shape", GQA_SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_gqa_decode(shape: GqaShape, dtype: torch.dtype, tolerance: float) -> None:
    from thalweg.ops.attention.gqa import triton

    case = GqaCase(shape, CONTEXTS, [1] * len(CONTEXTS), dtype, "cuda")
    q = case.check_prepare(triton.gqa_prepare, tolerance)
    assert_near(case.decode(triton.gqa_decode, q), case.truth()[1], tolerance)


MIXER_SHAPES = [*GQA_SHAPES[:2], GqaShape(16, 4, 256, 64, 64), GqaShape(4, 2, 256, 128, 16)]


@pytest.mark.parametrize("shape", MIXER_SHAPES, ids=str)
@pytest.mark.parametrize("form", [None, (1, 1, 1), (1, 2, 1), (2, 2, 1), (16, 1, 1), (1, 1, 8), (2, 1, 5)], ids=str)
def test_gqa_mixer(shape: GqaShape, form: tuple[int, int, int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one block, in clusters of any size, over several, and as the device would have it; with rows that share the
    sink."""
    from thalweg.ops.attention.gqa import cuda

    if form is not None:
        monkeypatch.setattr(cuda, "form_for", lambda *_: form)
    case = GqaCase(shape, [*CONTEXTS, 2000], [1] * (len(CONTEXTS) + 1), torch.bfloat16, "cuda")
    case.check_mix(cuda.gqa_mixer_decode, 2**-6, padding=3)


@pytest.mark.parametrize("form", [None, (8, 1, 3), (2, 1, 4)], ids=str)
def test_gqa_mixer_of_a_long_context(form: tuple[int, int, int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Again and again: the clusters of a launch count from zero, and which of them is last changes no bit."""
    from thalweg.ops.attention.gqa import cuda

    if form is not None:
        monkeypatch.setattr(cuda, "form_for", lambda *_: form)
    case = GqaCase(GqaShape(8, 1, 256, 64, 64), [6000, 30], [1, 1], torch.bfloat16, "cuda")
    case.check_mix(cuda.gqa_mixer_decode, 2**-6)
    first = case.mix(cuda.gqa_mixer_decode)
    for _ in range(20):
        assert case.mix(cuda.gqa_mixer_decode).equal(first)


@pytest.mark.parametrize("B", [1, 3, 9, 32, 130])
@pytest.mark.parametrize(("H", "G"), [(16, 2), (24, 4)])
def test_gqa_mixer_by_batch(B: int, H: int, G: int) -> None:
    from thalweg.ops.attention.gqa import cuda

    case = GqaCase(GqaShape(H, G, 256, 64, 64), [(37 * b) % 150 for b in range(B)], [1] * B, torch.bfloat16, "cuda")
    case.check_mix(cuda.gqa_mixer_decode, 2**-6)


@pytest.mark.parametrize("shape", GQA_SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_gqa_prefill(shape: GqaShape, dtype: torch.dtype, tolerance: float) -> None:
    from thalweg.ops.attention.gqa import library, triton

    case = GqaCase(shape, [0, 5, 0, 130, 64], [1, 100, 0, 1, 64], dtype, "cuda")
    q = case.check_prepare(triton.gqa_prepare, tolerance)
    assert_near(case.prefill(library.gqa_prefill, q), case.truth()[1], tolerance)


@pytest.mark.parametrize("shape", [*GQA_SHAPES[:2], GqaShape(8, 2, 256, 64, 16)], ids=str)
@pytest.mark.parametrize(("cached", "new"), [([0, 5, 0, 130, 64], [1, 100, 0, 1, 64]), ([700, 0], [300, 129])])
def test_gqa_prefill_in_cuda(shape: GqaShape, cached: list[int], new: list[int]) -> None:
    from thalweg.ops.attention import prompt_cuda
    from thalweg.ops.attention.gqa import triton

    case = GqaCase(shape, cached, new, torch.bfloat16, "cuda")
    q = case.check_prepare(triton.gqa_prepare, 2**-6)
    assert_near(case.prefill(prompt_cuda.gqa_prefill, q), case.truth()[1], 2**-6)


def test_gqa_prefill_behind_a_long_prefix_in_captured_steps() -> None:
    from thalweg.ops.attention import prompt_cuda
    from thalweg.ops.attention.gqa import triton

    case = GqaCase(GqaShape(16, 4, 256, 64, 64), [9000, 0], [164, 92], torch.bfloat16, "cuda")
    q = case.prepare(triton.gqa_prepare)

    def run(offsets: Any, starts: Any, boundaries: Any) -> list[Tensor]:
        return [prompt_cuda.gqa_prefill(q, case.proj, **case.blocks, starts=starts, offsets=offsets)]

    steps = [StepSequences(case.offsets, [start, 0], []) for start in (9000, 6000, 8000)]
    check_in_graphs(run, steps, context=16384, device="cuda")


@pytest.mark.parametrize("first", [30_000, 1_000_000])
def test_positions_far_out(first: int) -> None:
    from thalweg.ops.attention.gqa import triton

    case = GqaCase(gqa_case.GqaShape(4, 2, 256, 64, 64), [0], [9], device="cuda", first_position=first)
    case.check_prepare(triton.gqa_prepare, 1e-4)


def test_a_captured_decode_follows_its_inputs() -> None:
    """One graph serves any contexts: their lengths are read on the device."""
    from thalweg.ops.attention.gqa import triton

    shape = GQA_SHAPES[0]
    cases = [GqaCase(shape, contexts, [1, 1], device="cuda") for contexts in ([900, 3], [5, 640])]
    static = GqaCase(shape, [900, 640], [1, 1], device="cuda")
    q, lens = torch.zeros_like(static.prepare(triton.gqa_prepare)), torch.ones(2, dtype=torch.int32, device="cuda")
    tables, proj = torch.zeros_like(static.tables), torch.zeros_like(static.proj)
    keys, values = torch.zeros_like(static.keys), torch.zeros_like(static.values)
    blocks = dict(keys_MSGK=keys, values_MSGK=values, block_tables_BN=tables, context_lens_B=lens)
    triton.gqa_decode(q, proj, **blocks)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton.gqa_decode(q, proj, **blocks)
    for case in cases:
        q.copy_(case.prepare(triton.gqa_prepare))
        proj.copy_(case.proj)
        keys[: len(case.keys)], values[: len(case.values)] = case.keys, case.values
        tables[:, : case.tables.shape[1]] = case.tables
        lens.copy_(torch.tensor([n + 1 for n in case.cached]))
        graph.replay()
        assert_near(out, case.truth()[1], 5e-5)
