"""The prefix cache across restarts: an engine's part in writing it down, when it ends, and in reading it again."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from thalweg.assembly.info import EngineInfo
from thalweg.cache import image
from thalweg.cache.tiers import TieredTree
from thalweg.core import SaveCache
from thalweg.errors import CheckpointError, ConfigError
from thalweg.runner.cache_file import CacheIndex, file_of, image_folder, images

_log = logging.getLogger(__name__)
SAVE_SECONDS = 600.0
POLL_SECONDS = 0.02


def prepare(folder: str) -> None:
    """Make the folder, for this user alone. Raises ConfigError."""
    try:
        Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"--cache-folder is {folder!r}, which cannot be made: {e.strerror}") from None


def restore(tree: TieredTree, read: CacheIndex, info: EngineInfo) -> None:
    """Put into the tree what the ranks have read. A damaged index leaves it empty, and a line in the log."""
    try:
        num_blocks = read.num_blocks if info.num_blocks else None
        found = image.decode(read.nodes, info.block_size, num_blocks, read.num_snapshots)
    except CheckpointError as e:
        _log.warning("the prefix cache begins empty: %s", e)
        return
    count = image.restore(tree, found)
    _log.info("the prefix cache begins with %d blocks of tokens from --cache-folder", count)


def save(
    tree: TieredTree,
    info: EngineInfo,
    folder: Path,
    most_bytes: int | None,
    order: Callable[[SaveCache], Future[Any]],
) -> None:
    """Have all ranks write down what is cached; what was there before goes once they have. Never raises: what cannot
    be written is logged."""
    host = tree.host
    blocks, snapshots = host.blocks.num_blocks, host.snapshots.num_snapshots
    block, slot = info.bytes_per_token * info.block_size, info.bytes_per_snapshot
    if most_bytes is not None:
        share = most_bytes / (info.tensor_parallel_size * max(1, blocks * block + snapshots * slot))
        blocks, snapshots = (int(count * min(1.0, share)) for count in (blocks, snapshots))
    taken, sources = image.take(tree, blocks, snapshots)
    if not taken.keys:
        return
    number = time.time_ns()
    target = image_folder(folder, number)
    try:
        target.mkdir(mode=0o700)
        order(SaveCache(str(target), number, sources.blocks, sources.snapshots, image.encode(taken))).result(
            SAVE_SECONDS
        )
        deadline = time.monotonic() + SAVE_SECONDS
        while missing := [rank for rank in range(info.tensor_parallel_size) if not file_of(target, rank).exists()]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {missing[0]} has not written its file")
            time.sleep(POLL_SECONDS)
    except Exception as e:  # noqa: BLE001 -- the engine ends all the same
        _log.warning("the prefix cache could not be written to %s: %s: %s", target, type(e).__name__, e)
        shutil.rmtree(target, ignore_errors=True)
        return
    for other in images(folder):
        if other != target:
            with contextlib.suppress(OSError):
                shutil.rmtree(other)
