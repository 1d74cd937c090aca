"""Times ops that ranks run together, for `thalweg bench kernels --suite ranks`: as many calls on each rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from thalweg.ops.all_gather import ALL_GATHER, AllGatherDims
from thalweg.ops.all_reduce import ALL_REDUCE_ADD, MANY_TOKENS, AllReduceAddDims
from thalweg.ops.embedding import EMBEDDING
from thalweg.ops.linear import LINEAR_REDUCE_ADD, LinearReduceDims
from thalweg.ops.moe.exchange import EXPERT_COMBINE, EXPERT_DISPATCH, ExpertCombineDims, ExpertDispatchDims
from thalweg.ops.registry import Op, Where, implementations
from thalweg.parallel.mesh import Mesh
from thalweg.recorder.orders import MeasureExchange
from thalweg.runner.capture import captured
from thalweg.runner.step import ModelRunner

CALLS, REPEATS = 20, 11
COPIES = 16  # of a weight: the cache holds none by the time its turn comes again
Call = Callable[[Any, int], Tensor]  # of a function and the number of the call


@torch.inference_mode()
def exchange_us(runner: ModelRunner, order: MeasureExchange) -> list[float] | str:
    """Microseconds of a call, in a CUDA graph of many if there are such, by repeat; or why the implementation cannot
    serve. All ranks call this together."""
    mesh, device, dtype = runner.mesh, runner.slots.device, order.dtype
    found = next(i for i in implementations(order.op) if i.name == order.implementation)
    dims = dims_of_exchange(found.op, order.sizes, mesh)
    where = Where(device.type, dtype)
    reason = found.supports(where, dims)
    if reason is None and order.rows not in found.tokens(dims):
        reason = f"serves {found.tokens(dims)} tokens, not {order.rows}"
    if found.name == "cuda_many" and (mesh.peers is None or len(mesh.peers.areas) <= MANY_TOKENS):
        reason = reason or "needs an area of many tokens, which only two tensor-parallel ranks have"
    if reason is not None:
        return reason
    function, call = found.build(where, dims), _call(found.op, order, mesh, device)

    def calls() -> None:
        for i in range(CALLS):
            call(function, i)

    calls()
    run = captured(calls, None)[0] if device.type == "cuda" and found.capturable else calls
    return [_seconds(run, mesh, device) * 1e6 / CALLS for _ in range(REPEATS)][2:]


def dims_of_exchange(op: Op[Any, Any], sizes: Mapping[str, int], mesh: Mesh) -> Any:
    """`sizes`, by the names of the op's dims, with what the mesh says."""
    kinds: dict[str, Callable[..., Any]] = {
        ALL_REDUCE_ADD.name: AllReduceAddDims,
        EMBEDDING.name: AllReduceAddDims,
        ALL_GATHER.name: AllGatherDims,
        LINEAR_REDUCE_ADD.name: LinearReduceDims,
        EXPERT_DISPATCH.name: ExpertDispatchDims,
        EXPERT_COMBINE.name: ExpertCombineDims,
    }
    return kinds[op.name](**sizes, ranks=mesh.tp_size, mapped=mesh.mapped)


def _call(op: Op[Any, Any], order: MeasureExchange, mesh: Mesh, device: torch.device) -> Call:
    dtype, rows, sizes = getattr(torch, order.dtype), order.rows, order.sizes

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    if op.name == ALL_REDUCE_ADD.name:
        residual, x = draw(rows, sizes["D"]), draw(rows, sizes["D"])
        return lambda function, _: function(residual, x, mesh)
    if op.name == EMBEDDING.name:
        w, ids = draw(4096, sizes["D"]), torch.arange(rows, device=device) * 61 % (4096 * mesh.tp_size)
        return lambda function, _: function(ids, w, mesh)
    if op.name == ALL_GATHER.name:
        part = draw(rows, sizes["row_bytes"] // dtype.itemsize)
        return lambda function, _: function(part, mesh)
    if op.name == EXPERT_DISPATCH.name:
        ranks, k, here = mesh.as_data_ranks(), sizes["K"] + sizes["S"], sizes["here"]
        x, each = draw(rows, sizes["D"]), torch.rand(rows, k, device=device)
        slots = torch.rand(rows, here * ranks.size, device=device).topk(k).indices
        live = torch.ones(rows, dtype=torch.int64, device=device)
        return lambda function, _: function(live, x, each, slots, ranks, here=here, shared=sizes["S"]).x_AD
    if op.name == EXPERT_COMBINE.name:
        ranks, k = mesh.as_data_ranks(), sizes["parts"]
        live, residual = torch.ones(rows, dtype=torch.int64, device=device), draw(rows, sizes["D"])
        each = torch.rand(rows * ranks.size, k, device=device)
        parts = torch.randn(rows * ranks.size * k, sizes["D"], device=device)
        return lambda function, _: function(live, residual, parts, ranks, weights_Ak=each)
    weights = [draw(sizes["O"], sizes["D"]) for _ in range(COPIES)]
    residual, x = draw(rows, sizes["O"]), draw(rows, sizes["D"])
    return lambda function, i: function(x, weights[i % COPIES], residual, mesh)


def _seconds(run: Callable[[], None], mesh: Mesh, device: torch.device) -> float:
    mesh.all_reduce(torch.zeros(1, device=device))  # so that all ranks begin together
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    torch.cuda.synchronize(device)
    began_at, ended_at = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began_at.record()
    run()
    ended_at.record()
    ended_at.synchronize()
    return float(began_at.elapsed_time(ended_at)) / 1e3
