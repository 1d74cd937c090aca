"""Experts in int4 for batches: on the host, and compiled for Hopper. On a GPU: test_gpu_moe_int4."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ops.compile_cuda import compile_cuda
from tests.ops.moe_case import moe_case_int4, rmse_ratio
from tests.ops.run_on_host import HostKernel, host_tensor_map
from tests.ops.test_cuda_moe_int4 import ordered
from thalweg.ops.moe.experts.sort import Groups
from thalweg.quant import INT4_EXPERTS

pytest.importorskip("triton")


def groups_of(ids: torch.Tensor, E: int, rows: int) -> Groups:
    """As sort_pairs has them, blocks full but for an expert's last."""
    expert_P = ids.flatten()
    live = int((expert_P >= 0).sum())
    sorted_P = torch.where(expert_P < 0, E, expert_P).argsort(stable=True).int()
    sorted_P[live:] = -1
    blocks, first = [], 0
    for e in range(E):
        count = int((expert_P == e).sum())
        for at in range(0, count, rows):
            blocks.append((e, first + at, min(rows, count - at)))
        first += count
    most = len(blocks) + 2
    behind = [(0, 0, 0), (0, 0, 0), (0, 0, len(blocks))]
    return Groups(sorted_P, torch.tensor(blocks + behind, dtype=torch.int32)[:most], rows)


ROWS = [100, 300, 1000, 2000]  # of batches, each of which cuts tiles in its own way


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("T", "left_out"), [(60, 0.3), pytest.param(90, 0.0, marks=pytest.mark.slow)])
def test_products_on_the_host(monkeypatch: pytest.MonkeyPatch, T: int, left_out: float, rows: int) -> None:
    from thalweg.ops.moe.experts import batch_int4

    monkeypatch.setattr(batch_int4, "cuda_kernel", HostKernel)
    monkeypatch.setattr(batch_int4, "tensor_map", host_tensor_map)
    monkeypatch.setattr(batch_int4, "multiprocessors", lambda device: 2)
    k, cut = 2, batch_int4.cut_for(rows)
    E, D, I = 3, 512, 256
    case = moe_case_int4(T, D, I, E, k, torch.bfloat16, seed=T)
    for _, scales in (case.gate_up, case.down):  # of sizes that the way of widening words has to bear
        scales[0, 0], scales[0, 1], scales[0, 2] = 0, 2.0**-90, 2.0**-3
    ids = torch.where(torch.rand(T, k, generator=torch.Generator().manual_seed(T)) < left_out, -1, case.ids)
    groups = groups_of(ids, E, cut.tokens)
    live = int((ids >= 0).sum())
    pairs_P = groups.sorted_P[:live].long()
    expert_P = ids.flatten()[pairs_P]
    h, y = torch.full((T * k, I), torch.nan).bfloat16(), torch.full((T * k, D), torch.nan).bfloat16()
    batch_int4.product(ordered(case.x), groups, case.gate_up, h, cut, gated=True, share=k)
    w = INT4_EXPERTS.widened(case.gate_up, 2, torch.bfloat16).double()
    gate, up = torch.einsum("pd,pod->po", case.x.double()[pairs_P // k], w[expert_P]).chunk(2, -1)
    assert rmse_ratio(h[:live], ordered(torch.nn.functional.silu(gate) * up)) < 0.005
    assert h[live:].isnan().all()
    batch_int4.product(h, groups, case.down, y, cut, gated=False, share=1)
    w = INT4_EXPERTS.widened(case.down, 1, torch.bfloat16).double()
    natural = torch.empty_like(h)
    natural[:, ordered(torch.arange(I)[None])[0]] = h
    wanted = torch.einsum("pd,pod->po", natural[:live].double(), w[expert_P])
    assert rmse_ratio(y[pairs_P], wanted) < 0.005
    assert y[ids.flatten() < 0].isnan().all()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("gated", "columns", "width"), [(1, 7168, 2048), (0, 2048, 7168)])
def test_they_compile_for_hopper(tmp_path: Path, gated: int, columns: int, width: int, rows: int) -> None:
    from thalweg.ops.moe.experts.batch_int4 import SOURCE, cut_for

    cut = cut_for(rows)
    macros = {"GATED": gated, "COLS": columns, "OUT": width, "TOKENS": cut.tokens, "FEW": cut.few}
    compiled = compile_cuda(SOURCE, tmp_path, **macros, STAGES=cut.stages)
    assert compiled.spilled_bytes == 0
    assert not compiled.serialized
    assert cut.shared_bytes + compiled.static_shared_bytes <= 227 * 1024
