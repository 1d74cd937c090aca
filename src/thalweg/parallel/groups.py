"""What torch's process groups want at their end, whoever has one."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def leave(group: Any) -> None:
    """Leave a group, whoever of the others is still in it. CUDA graphs with its collectives must be gone: NCCL waits
    for them."""
    nccl: Any = getattr(dist, "ProcessGroupNCCL", ())  # which torch for CPUs lacks
    if isinstance(group, nccl):
        group.abort()  # a shutdown would wait for the other ranks; torch warns of a group that had neither
