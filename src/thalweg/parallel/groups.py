"""What torch's process groups want at their beginning and end, whoever has one."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from thalweg.config import env
from thalweg.errors import EngineDeadError, RankLostError


def file_store(path: str, size: int) -> tuple[Any, BinaryIO]:
    """A store in a file where `size` processes of one host meet, and the file, to be kept open as long as the group.

    The store opens its file for every look. If that is gone with its folder, torch tries for minutes, at first without
    letting another thread run, not even one that would end the process. So the store gets the name of the open file,
    which leads to it whatever became of its folder. Raises OSError if the folder is gone already.

    The store looks once more when it goes, and ends the process if the number of a closed file has become a socket's.
    """
    file = Path(path).open("ab")  # noqa: SIM115 -- whoever has the group closes it
    name = f"/proc/self/fd/{file.fileno()}"
    where = name if Path(name).exists() else path
    return dist.FileStore(where, size), file  # type: ignore[attr-defined]  # public, but not in __all__


def tcp_store(url: str, timeout: timedelta, listener: socket.socket | None) -> tuple[Any, str]:
    """A store at tcp://ADDRESS:PORT, where processes of several hosts meet, and the address by which this host is seen
    from there. Whoever has the `listener` is the store from then on."""
    place = urlsplit(url)
    assert place.hostname is not None
    assert place.port is not None
    with socket.socket(socket.AF_INET6 if ":" in place.hostname else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((place.hostname, place.port))  # sends no packet
        own = str(probe.getsockname()[0])
    fd = None if listener is None else listener.detach()
    store: Any = dist.TCPStore(  # type: ignore[attr-defined]  # public, but not in __all__
        place.hostname, place.port, None, fd is not None, timeout, wait_for_workers=False, master_listen_fd=fd
    )
    return store, own


@contextmanager
def together(rank: str, size: int) -> Iterator[None]:
    """Around what needs every rank of a group, of which `rank`, in words, is this one. Raises RankLostError if torch
    misses one: its words without the places in its source and its advice; and EngineDeadError if this rank's own
    memory or device is what fails. Errors of CUDA that torch tells itself go on as they are."""
    try:
        yield
    except (RankLostError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError as e:
        text = str(e)
        first, said, last = text.partition("Last error:\n")  # NCCL's, behind what torch says of it
        reason = (last if said and last else first).strip().partition("\n")[0]
        reason = re.sub(r"\[[^]]+:\d+\] (\. )?|\. This is typically.*|\.$", "", reason)
        if re.search("cuda (error|failure)|allocate memory", text, re.IGNORECASE):
            advice = "; lower --gpu-memory-utilization" if "out of memory" in text else ""
            raise EngineDeadError(f"{rank} of {size} cannot exchange with the others: {reason}{advice}") from e
        raise RankLostError(f"{rank} lost another rank of {size}: {reason}") from e


def nccl_group(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """torch is not to end the process if NCCL misses a rank: whoever watches the ranks says why, and `leave` ends what
    waits for it. Nor is it to keep where each collective was called from: a thread of torch's own would look that up in
    Python to say it, while Python may be ending."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    with env.unless_set(TORCH_NCCL_ASYNC_ERROR_HANDLING="0", TORCH_FR_BUFFER_SIZE="0"):
        return dist.ProcessGroupNCCL(store, rank, size, options)


def leave(group: Any) -> None:
    """Leave a group, whoever of the others is still in it; from any thread. Collectives under way end, and what they
    give is undefined. NCCL waits until CUDA graphs with its collectives are gone."""
    nccl: Any = getattr(dist, "ProcessGroupNCCL", ())  # which torch for CPUs lacks
    if isinstance(group, nccl):
        group.abort()  # a shutdown would wait for the other ranks; torch warns of a group that had neither
