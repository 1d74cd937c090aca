"""Kernels of Gated DeltaNet and gated attention on the device, in the shapes of published models and odd ones."""

from __future__ import annotations

import pytest
import torch

from tests.ops import gdn_case, gqa_case
from tests.ops.gdn_case import GdnShape
from tests.ops.gqa_case import GqaCase, GqaShape, assert_near

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
    from thalweg.ops.delta.gdn import GDN_MIXER_DECODE, GdnDims
    from thalweg.ops.registry import Resolver, Where

    dims = GdnDims(G=shape.G, H=shape.H, K=shape.K, V=shape.V, W=shape.W)
    op = Resolver().resolve(GDN_MIXER_DECODE, Where("cuda", str(dtype).removeprefix("torch.")), dims)
    gdn_case.DecodeCase(shape, 5, dtype=dtype, device="cuda").check(op, tolerance, padding=3)


@pytest.mark.parametrize("shape", GQA_SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_gqa_decode(shape: GqaShape, dtype: torch.dtype, tolerance: float) -> None:
    from thalweg.ops.attention.gqa import triton

    case = GqaCase(shape, CONTEXTS, [1] * len(CONTEXTS), dtype, "cuda")
    q = case.check_prepare(triton.gqa_prepare, tolerance)
    assert_near(case.decode(triton.gqa_decode, q), case.truth()[1], tolerance)


@pytest.mark.parametrize("shape", GQA_SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_gqa_prefill(shape: GqaShape, dtype: torch.dtype, tolerance: float) -> None:
    from thalweg.ops.attention.gqa import library, triton

    case = GqaCase(shape, [0, 5, 0, 130, 64], [1, 100, 0, 1, 64], dtype, "cuda")
    q = case.check_prepare(triton.gqa_prepare, tolerance)
    assert_near(case.prefill(library.gqa_prefill, q), case.truth()[1], tolerance)


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
