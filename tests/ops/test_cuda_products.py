"""Products of many rows in CUDA C++: on the host, compiled for Hopper, cut into blocks. On a GPU: test_gpu_products."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.compile_cuda import compile_cuda
from tests.ops.compile_sm90 import compile_sm90
from tests.ops.fp8_linear_case import draw
from tests.ops.interpreted import run_interpreted
from tests.ops.moe_case import check_sort, moe_case, rmse_ratio
from tests.ops.run_on_host import HostKernel, host_tensor_map
from thalweg.ops.moe.experts import MAX_SORTED_EXPERTS, sort
from thalweg.ops.products import cuda
from thalweg.quant.blocks import BLOCK

KINDS = [  # (gated, dense, fp8, add)
    (1, 0, 0, 0),
    (0, 0, 0, 0),
    (1, 0, 1, 0),
    (0, 0, 1, 0),
    (0, 1, 1, 0),
    (0, 1, 1, 1),
]


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "cuda_kernel", HostKernel)
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 2)
    monkeypatch.setattr(cuda, "tensor_map", host_tensor_map)


@pytest.mark.parametrize(("gated", "dense", "fp8", "add"), KINDS)
def test_they_compile_for_hopper(tmp_path: Path, gated: int, dense: int, fp8: int, add: int) -> None:
    units = cuda.UNITS[1 if fp8 else 2]
    macros = dict(GATED=gated, DENSE=dense, FP8=fp8, ADD=add, UNITS=units, CLUSTER=1 + gated)
    macros |= dict(EARLY=int(not dense and not fp8))
    compiled = compile_cuda(cuda.SOURCE, tmp_path, **macros)
    assert compiled.spilled_bytes == 0
    assert compiled.registers == 168  # of which the warpgroup that copies gives 128 to the two that multiply
    assert cuda.shared_bytes(units, bool(gated), bool(dense), bool(fp8)) <= 227 * 1024


def scaled(x: Tensor, scales: Tensor, rows: int) -> Tensor:
    """Float8 and scales of blocks of rows x 128, or of whole rows [T], in float64."""
    if scales.ndim == 1:
        return x.double() * scales.double()[:, None]
    return x.double() * scales.double().repeat_interleave(rows, -2).repeat_interleave(BLOCK, -1)


@pytest.mark.parametrize(("fp8", "steps"), [(False, 1), (False, 2), (False, 3), (False, 6), (True, 1), (True, 5)])
@pytest.mark.parametrize("gated", [False, True])
def test_grouped_products_on_the_host(on_host: None, gated: bool, fp8: bool, steps: int) -> None:
    """Blocks of one unit of rows and of three, with rows to spare, of two experts and none; more steps than stages and
    fewer."""
    torch.manual_seed(0)
    E, P, D, O, share = 3, 44, steps * (128 if fp8 else 64), 512, 2 if gated else 1
    blocks = [[2, 0, 37], [0, 37, 1], [0, 38, 6], [0, 0, 0]]
    x, w = torch.randn(P // share, D), torch.randn(E, O, D) * D**-0.5
    scales: Any = None
    if fp8:
        x, w = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
        scales = 0.5 + torch.rand(len(x)), 0.5 + torch.rand(E, O // BLOCK, D // BLOCK)
        wide_x, wide_w = scaled(x, scales[0], 1), scaled(w, scales[1], BLOCK)
    else:
        x, w = x.bfloat16(), w.bfloat16()
        wide_x, wide_w = x.double(), w.double()
    sorted_P = torch.randperm(P).int()
    out = torch.full((P, O // 2 if gated else O), torch.nan, dtype=torch.bfloat16)
    weights = (w, scales[1]) if fp8 else (w,)
    table = torch.tensor([*blocks, [0, 0, 3]], dtype=torch.int32)  # counters behind them, and how many have pairs
    cuda.grouped(x, weights, sorted_P, table[:-1], out, scales[0] if fp8 else None, gated=gated, share=share)
    assert table[-1].tolist() == [0, 0, 3]  # as they were, for the next launch
    for expert, first, count in blocks:
        pairs = sorted_P[first : first + count].long()
        if gated:
            gate, up = (wide_x[pairs // share] @ wide_w[expert].T).chunk(2, -1)
            want, got = F.silu(gate) * up, out[first : first + count]
        else:
            want, got = wide_x[first : first + count] @ wide_w[expert].T, out[pairs]
        assert not count or rmse_ratio(got, want) < 0.003


def test_a_launch_that_begins_early_on_the_host(on_host: None) -> None:
    """Every tile of gate and up is counted, of several for the same rows too, and the launch behind waits for all."""
    torch.manual_seed(0)
    E, P, D, I = 3, 44, 6 * 64, 192
    blocks = [[2, 0, 37], [0, 37, 1], [0, 38, 6], [0, 0, 0]]
    x = torch.randn(P, D, dtype=torch.bfloat16)
    gate_up, down = (torch.randn(E, *sizes, dtype=torch.bfloat16) * 0.05 for sizes in ((2 * I, D), (D, I)))
    sorted_P = torch.randperm(P).int()
    table = torch.tensor([*blocks, [0, 0, 3], [0, 0, 0], [0, 0, 0]], dtype=torch.int32)
    h, y = torch.empty(P, I, dtype=torch.bfloat16), torch.empty(P, D, dtype=torch.bfloat16)
    for rows, weights, out in ((x, gate_up, h), (h, down, y)):
        cuda.grouped(rows, (weights,), sorted_P, table[:4], out, gated=out is h, share=1, early=True)
    assert table[4:].flatten().tolist() == [0, 0, 3, 2, 2, 2, 0, 0, 0]
    for expert, first, count in blocks[:3]:
        pairs = sorted_P[first : first + count].long()
        gate, up = (x[pairs].double() @ gate_up[expert].double().T).chunk(2, -1)
        want = (F.silu(gate) * up).bfloat16().double() @ down[expert].double().T
        assert rmse_ratio(y[pairs], want) < 0.006


@pytest.mark.parametrize("add", [False, True])
def test_dense_products_on_the_host(on_host: None, add: bool) -> None:
    """Rows and columns to spare, an output with a stride of its own, which holds what is added."""
    T, D, O = 21, 256, 264
    case = draw(T, D, O, torch.bfloat16)
    x = case.x_TD.to(torch.float8_e4m3fn)
    scales = 0.5 + torch.rand(T)
    out = torch.full((T, O + 8), torch.nan, dtype=torch.bfloat16)
    residual = case.residual_TO * 30 if add else None
    w_scales = F.pad(case.scale_OB.T, (0, -O % 256), value=torch.nan).contiguous()
    if residual is not None:
        out[:, :O] = residual
    cuda.dense(x, case.q_OD, scales, w_scales, out[:, :O], add=add)
    want = scaled(x, scales, 1) @ scaled(case.q_OD, case.scale_OB, 1).T
    assert rmse_ratio(out[:, :O], want if residual is None else want + residual.double()) < 0.003
    assert out[:, O:].isnan().all()


def test_dense_products_read_nothing_behind_the_scales(on_host: None) -> None:
    """Behind the last tile there is none: the scales end where a page does that may not be read."""
    T, D, O, page = 21, 256, 256, mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    behind = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + page
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(behind), page, 0) == 0
    case = draw(T, D, O, torch.bfloat16)
    w_scales = torch.frombuffer(memory, dtype=torch.float32, count=2 * O, offset=page - 8 * O).view(2, O)
    w_scales.copy_(case.scale_OB.T)
    x, x_scales = case.x_TD.to(torch.float8_e4m3fn), torch.ones(T)
    out = torch.empty(T, O, dtype=torch.bfloat16)
    child = os.fork()
    if child == 0:
        cuda.dense(x, case.q_OD, x_scales, w_scales, out)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_constants_are_those_of_the_source() -> None:
    source = cuda.SOURCE.read_text() + cuda.SOURCE.with_name("tiles.cuh").read_text()
    assert f"STAGES = LATER ? 3 : 4, STEP_BYTES = {cuda.STEP_BYTES}, UNIT = {cuda.UNIT}," in source
    assert f"BOX = {cuda.BOX_ROWS} * STEP_BYTES" in source
    assert f"PART = GATED ? {cuda.PART // 2} : {cuda.PART};" in source
    assert f"COPIERS = 128, MULTIPLIERS = {cuda.THREADS - 128};" in source
    assert f"TOLD = {cuda.TOLD};" in source


def test_rows_of_dense_products_fill_multiprocessors_evenly() -> None:
    for T in (1, 16, 257, 1000, 8192):
        for O in (8, 2304, 12672):
            blocks = cuda.dense_blocks(T, O, 9, 132)
            units = -(-T // 16)
            assert -(-units // 9) <= blocks <= units
    assert cuda.dense_blocks(1024, 2304, 9, 132) == 13  # 9 x 13 tiles at once, not 9 x 8


def check_quantized_rows() -> None:
    from thalweg.ops.products.triton import quantize_rows

    # Halves of powers of two below 448 scales: exact, which the interpreter's conversion is for nothing else.
    x = torch.randint(-8, 9, (5, 392)).float()[:, :384]
    x[:, ::BLOCK] = 448.0
    x[1], x[2] = x[1] * 2.0**60, 0.0
    of_weights = torch.rand(40, 3)
    q, scales_T, weights_BO = quantize_rows(x.bfloat16(), of_weights)
    assert torch.equal(scales_T[[0, 3, 4]], torch.ones(3))
    assert torch.equal(weights_BO[:, :40].T, of_weights)
    torch.testing.assert_close(scaled(q, scales_T[:5], 1), x.double(), rtol=1e-6, atol=0)
    again, of_rows, none = quantize_rows(x.bfloat16()[:, :256])
    assert torch.equal(again.view(torch.uint8), q.view(torch.uint8)[:, :256])
    assert torch.equal(of_rows[:5], scales_T[:5])
    assert none.numel() == 0


def test_quantized_rows() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_quantized_rows)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("of_weights", [False, True])
def test_quantizing_compiles_for_hopper_without_spills(normed: bool, of_weights: bool) -> None:
    """With a norm and scales of weights, as linears ask for it, and without, as experts do."""
    pytest.importorskip("triton")
    from thalweg.ops.products.triton import quantize_rows_kernel

    types = {"x_ptr": "*bf16", "q_ptr": "*fp8e4nv", "x_scales_ptr": "*fp32", "w_scales_ptr": "*fp32", "eps": "fp32"}
    types |= dict.fromkeys(("T", "O", "x_stride", "w_scales_stride"), "i32")
    constants = {"D": 1536, "BLOCK_D": 2048, "BLOCK_T": 2, "BLOCKS": 12, "ROWS": 32, "PDL": True}
    for name, dtype, given in (("norm_ptr", "*bf16", normed), ("scales_ptr", "*fp32", of_weights)):
        (types if given else constants)[name] = dtype if given else None  # type: ignore[index]
    assert compile_sm90(quantize_rows_kernel, types, constants, 8).spilled_bytes == 0


def check_even_blocks() -> None:
    from thalweg.ops.moe.experts.triton.grouping import sort_pairs

    ids = torch.rand(500, 7).topk(2).indices
    ids[:, 1][ids[:, 1] == 3] = 4  # an expert of few
    ids = torch.cat([ids, torch.full((500, 1), 7)], 1)
    groups = sort_pairs(ids, 8, 1, 160, 16)
    counts: dict[int, list[int]] = {}
    end = 0
    for expert, first, count in groups.blocks_N3.tolist():
        assert first == end or not count
        end += count
        counts.setdefault(expert, []).extend([count] if count else [])
        assert (ids.flatten()[groups.sorted_P[first : first + count].long()] == expert).all()
    assert end == ids.numel()
    assert counts[7] == [128, 128, 128, 116]
    assert all(sum(c) == int((ids == expert).sum()) for expert, c in counts.items() if c)
    for c in filter(None, counts.values()):
        assert len(c) == -(-sum(c) // 160)
        assert all(count == c[0] and count % 16 == 0 for count in c[:-1])
        assert c[-1] <= c[0]
    assert groups.blocks_N3[-1, 2] == 0


def test_blocks_of_an_expert_are_about_equally_high() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_even_blocks)


def sort_on_host() -> None:
    """The host has no clusters, and no patience for many threads."""
    sort.cuda_kernel = HostKernel  # type: ignore[assignment, misc]
    sort.BLOCKS, sort.WARPS = 1, 4


@pytest.mark.parametrize(("T", "E", "k", "shared"), [(500, 7, 2, 1), (70, 200, 3, 1), (1, 5, 2, 0), (33, 140, 1, 0)])
def test_sort(T: int, E: int, k: int, shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda_kernel", "BLOCKS", "WARPS"):
        monkeypatch.setattr(sort, name, getattr(sort, name))  # and back
    sort_on_host()
    check_sort(moe_case(T, 8, 8, E, k, shared, torch.float32).ids, E + shared, 160)


@pytest.mark.parametrize("experts", [257, 513])
def test_the_sort_compiles_for_hopper_without_spills(experts: int, tmp_path: Path) -> None:
    compiled = compile_cuda(sort.SOURCE, tmp_path, E=experts, BLOCKS=sort.BLOCKS, WARPS=sort.WARPS)
    assert compiled.spilled_bytes == 0
    assert compiled.registers <= 64  # of a block of 1024 threads
    most = sort.shared_bytes(MAX_SORTED_EXPERTS, 32 * -(-16384 * 16 // (32 * sort.BLOCKS * sort.WARPS)))
    assert most <= 227 * 1024


def check_forms_in_clusters() -> None:
    from thalweg.ops.moe.experts import matrix

    sort_on_host()

    asked: list[tuple[bool, int, int]] = []

    def grouped(*args: Any, gated: bool, share: int, cluster: int, early: bool) -> None:
        assert not early  # so few steps are none
        asked.append((gated, cluster, int(args[3][:, 2].max())))
        args[4].zero_()

    matrix.grouped = grouped

    def forms(T: int) -> list[tuple[bool, int, int]]:
        asked.clear()
        case = moe_case(T, 64, 64, 2, 1, 0, torch.bfloat16)
        case.ids[:] = torch.arange(T)[:, None] % 2
        case.run(matrix.experts)
        return list(asked)

    assert forms(320) == [(True, 1, 160), (False, 1, 160)]
    assert forms(322) == [(True, 2, 161), (False, 2, 161)]
    matrix.rehearsing = lambda: True
    assert [(gated, cluster) for gated, cluster, _ in forms(320)] == [(True, 1), (False, 1), (True, 2), (False, 2)]


def test_experts_form_clusters_where_they_have_more_rows_than_a_tile_and_both_forms_are_rehearsed() -> None:
    pytest.importorskip("triton")
    run_interpreted(check_forms_in_clusters)
