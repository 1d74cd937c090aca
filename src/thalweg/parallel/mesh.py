"""The ranks a model is sharded over, and the collectives its layers need. The only importer of torch.distributed.

One host: ranks meet through a file, and talk over gloo (CPU) or NCCL (CUDA).
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from thalweg.errors import EngineDeadError


class Mesh:
    """Tensor parallelism over `tp_size` ranks; this process is `tp_rank`. With one rank every method is free."""

    def __init__(self, tp_rank: int = 0, tp_size: int = 1, group: dist.ProcessGroup | None = None) -> None:
        self.tp_rank = tp_rank
        self.tp_size = tp_size
        self._group = group

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self._group is not None:
            self._run(lambda: dist.all_reduce(x, group=self._group))
        return x

    def all_gather_last(self, x: Tensor) -> Tensor:
        """Concatenate the ranks' x [..., n] along the last dimension, in rank order: [..., tp_size * n]."""
        if self._group is None:
            return x
        parts = [torch.empty_like(x) for _ in range(self.tp_size)]
        x = x.contiguous()
        self._run(lambda: dist.all_gather(parts, x, group=self._group))
        return torch.cat(parts, dim=-1)

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x on every rank, in place."""
        if self._group is not None:
            self._run(lambda: dist.broadcast(x, src=0, group=self._group))
        return x

    def minimum(self, value: int, device: torch.device) -> int:
        """The least of the ranks' values."""
        if self._group is None:
            return value
        x = torch.tensor(value, dtype=torch.int64, device=device)
        self._run(lambda: dist.all_reduce(x, op=dist.ReduceOp.MIN, group=self._group))
        return int(x)

    def close(self) -> None:
        if self._group is not None:
            dist.destroy_process_group()
            self._group = None

    def _run(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as e:
            reason = str(e).splitlines()[0]
            raise EngineDeadError(f"rank {self.tp_rank} lost another rank of {self.tp_size}: {reason}") from e


def join_mesh(tp_rank: int, tp_size: int, rendezvous_file: str, device: torch.device, timeout_s: float = 600.0) -> Mesh:
    """Meet the other ranks at `rendezvous_file` (a path on this host, not yet existing) and return the mesh."""
    if tp_size == 1:
        return Mesh()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        init_method=f"file://{rendezvous_file}",
        rank=tp_rank,
        world_size=tp_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if backend == "nccl" else None,
    )
    return Mesh(tp_rank, tp_size, dist.group.WORLD)
