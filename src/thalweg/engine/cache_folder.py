"""The prefix cache across restarts: an engine's part in writing it down, when it ends, and in reading it again."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from thalweg.assembly.info import EngineInfo
from thalweg.cache import image as cache_image
from thalweg.cache.tiers import TieredTree
from thalweg.core import SaveCache
from thalweg.errors import CheckpointError, ConfigError
from thalweg.runner.cache_file import CacheIndex, failure_of, file_of, images, leftovers, new_image

_log = logging.getLogger(__name__)
SAVE_SECONDS = 600.0
POLL_SECONDS = 0.02


def take(folder: str) -> Callable[[], None]:
    """Make the folder, for this user alone, and clear it of what an engine was writing when it was killed. It is this
    engine's until what is returned is called, or the process ends. Raises ConfigError, also if it is another engine's.
    """
    path, process = Path(folder), os.getpid()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.fdopen(os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600), "r+b")
    except OSError as e:
        raise ConfigError(f"--cache-folder is {folder!r}, which cannot be made or written to: {e.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        lock.close()
        used = isinstance(e, BlockingIOError)
        reason = "which another engine uses; expected one of its own" if used else f"which cannot be locked: {e}"
        raise ConfigError(f"--cache-folder is {folder!r}, {reason}") from None
    for leftover in leftovers(path):
        shutil.rmtree(leftover, ignore_errors=True)

    def give_back() -> None:
        # Processes that were forked meanwhile have the lock too: closing the file leaves it to them, and they must not
        # take it from the engine, which lives in this process alone.
        if not lock.closed and os.getpid() == process:
            fcntl.flock(lock, fcntl.LOCK_UN)
        lock.close()

    return give_back


def restore(tree: TieredTree, read: CacheIndex, info: EngineInfo) -> None:
    """Put into the tree what the ranks have read. A damaged index leaves it empty, and a line in the log."""
    try:
        num_blocks = read.num_blocks if info.num_blocks else None
        found = cache_image.decode(read.nodes, info.block_size, num_blocks, read.num_snapshots)
    except CheckpointError as e:
        _log.warning("the prefix cache begins empty: %s", e)
        return
    count = cache_image.restore(tree, found)
    _log.info("the prefix cache begins with %d blocks of tokens from --cache-folder", count)


def save(
    tree: TieredTree,
    info: EngineInfo,
    folder: Path,
    most_bytes: int | None,
    order: Callable[[SaveCache], Future[Any]],
    check: Callable[[], object],
) -> None:
    """Have all ranks write down what is cached; what was there before goes once they have. `check` raises if one of
    them has died. Never raises: what cannot be written is logged."""
    host = tree.host
    blocks, snapshots = host.blocks.num_blocks, host.snapshots.num_snapshots
    block, slot = info.bytes_per_token * info.block_size, info.bytes_per_snapshot
    if most_bytes is not None:
        share = most_bytes / (info.tensor_parallel_size * max(1, blocks * block + snapshots * slot))
        blocks, snapshots = (int(count * min(1.0, share)) for count in (blocks, snapshots))
    taken, sources = cache_image.take(tree, blocks, snapshots)
    if not taken.keys:
        return
    number = time.time_ns()
    target, image = new_image(folder, number)
    try:
        target.mkdir(mode=0o700)
        order(SaveCache(str(target), number, sources.blocks, sources.snapshots, cache_image.encode(taken))).result(
            SAVE_SECONDS
        )
        _wait(target, info.tensor_parallel_size, check)
        target.rename(image)
    except Exception as e:  # noqa: BLE001 -- the engine ends all the same
        _log.warning("the prefix cache could not be written to %s: %s: %s", folder, type(e).__name__, e)
        shutil.rmtree(target, ignore_errors=True)
        return
    for other in images(folder):
        if other != image:
            with contextlib.suppress(OSError):
                shutil.rmtree(other)


def _wait(target: Path, num_ranks: int, check: Callable[[], object]) -> None:
    """Until every rank has written its file. Raises if one cannot, has died, or takes longer than SAVE_SECONDS."""
    deadline = time.monotonic() + SAVE_SECONDS
    while missing := [rank for rank in range(num_ranks) if not file_of(target, rank).exists()]:
        for rank in missing:
            if (failure := failure_of(target, rank)).exists():
                raise OSError(f"rank {rank}: {failure.read_text()}")
        check()
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank {missing[0]} has not written its file")
        time.sleep(POLL_SECONDS)
