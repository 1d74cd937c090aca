"""Ranks of a mesh as threads of one process, which meet over gloo as processes do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from thalweg.parallel.data_ranks import DataRanks, join_data_ranks

T = TypeVar("T")


def on_ranks(size: int, folder: Path, body: Callable[[DataRanks], T]) -> list[T]:
    """What `body` returns on each of `size` data-parallel ranks. Raises what the first of them raised."""
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}

    def run(rank: int) -> None:
        try:
            ranks = join_data_ranks(rank, size, str(folder / f"meet-{size}"), torch.device("cpu"), timeout_s=20)
            with torch.inference_mode():
                results[rank] = body(ranks)
        except BaseException as e:  # noqa: BLE001 -- raised below
            errors[rank] = e

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for error in errors.values():
        raise error
    assert len(results) == size, "a rank hangs"
    return [results[rank] for rank in range(size)]
