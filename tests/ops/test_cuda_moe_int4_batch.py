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


@pytest.mark.parametrize(("T", "k", "left_out"), [(3, 2, 0.0), (40, 2, 0.0), (90, 2, 0.7)])
def test_products_on_the_host(monkeypatch: pytest.MonkeyPatch, T: int, k: int, left_out: float) -> None:
    from thalweg.ops.moe.experts import batch_int4

    monkeypatch.setattr(batch_int4, "cuda_kernel", HostKernel)
    monkeypatch.setattr(batch_int4, "tensor_map", host_tensor_map)
    monkeypatch.setattr(batch_int4, "multiprocessors", lambda device: 2)
    E, D, I = 3, 512, 256
    case = moe_case_int4(T, D, I, E, k, torch.bfloat16, seed=T)
    ids = torch.where(torch.rand(T, k) < left_out, -1, case.ids)
    groups = groups_of(ids, E, batch_int4.TOKENS)
    live = int((ids >= 0).sum())
    pairs_P = groups.sorted_P[:live].long()
    expert_P = ids.flatten()[pairs_P]
    h, y = torch.full((T * k, I), torch.nan).bfloat16(), torch.full((T * k, D), torch.nan).bfloat16()
    batch_int4.product(ordered(case.x), groups, case.gate_up, h, gated=True, share=k)
    w = INT4_EXPERTS.widened(case.gate_up, 2, torch.bfloat16).double()
    gate, up = torch.einsum("pd,pod->po", case.x.double()[pairs_P // k], w[expert_P]).chunk(2, -1)
    assert rmse_ratio(h[:live], ordered(torch.nn.functional.silu(gate) * up)) < 0.005
    assert h[live:].isnan().all()
    batch_int4.product(h, groups, case.down, y, gated=False, share=1)
    w = INT4_EXPERTS.widened(case.down, 1, torch.bfloat16).double()
    natural = torch.empty_like(h)
    natural[:, ordered(torch.arange(I)[None])[0]] = h
    wanted = torch.einsum("pd,pod->po", natural[:live].double(), w[expert_P])
    assert rmse_ratio(y[pairs_P], wanted) < 0.005
    assert y[ids.flatten() < 0].isnan().all()


@pytest.mark.parametrize(("gated", "columns", "rows"), [(1, 7168, 2048), (0, 2048, 7168)])
def test_they_compile_for_hopper(tmp_path: Path, gated: int, columns: int, rows: int) -> None:
    from thalweg.ops.moe.experts.batch_int4 import SOURCE, STAGE_BYTES, STAGES, TOKENS

    macros = {"GATED": gated, "COLS": columns, "OUT": rows, "TOKENS": TOKENS, "STAGES": STAGES}
    compiled = compile_cuda(SOURCE, tmp_path, **macros)
    assert compiled.spilled_bytes == 0
    assert not compiled.serialized
    assert STAGES * STAGE_BYTES + compiled.static_shared_bytes <= 227 * 1024
