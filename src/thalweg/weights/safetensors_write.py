"""Writes a checkpoint as safetensors files: one, or shards with an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from thalweg.weights.checkpoint import INDEX, SINGLE
from thalweg.weights.safetensors import PLAIN_DTYPES

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class NewWeight:
    """A tensor to write; `content` gives its numbers when their turn comes, in any dtype."""

    name: str
    dtype: str  # as the format spells it
    shape: tuple[int, ...]
    content: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * PLAIN_DTYPES[self.dtype].itemsize


def write_checkpoint(folder: Path, weights: Sequence[NewWeight], shard_bytes: int = SHARD_BYTES) -> None:
    """model.safetensors, or as many shards as hold `shard_bytes` each with model.safetensors.index.json."""
    shards: list[list[NewWeight]] = [[]]
    size = 0
    for weight in weights:
        if shards[-1] and size + weight.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(weight)
        size += weight.nbytes
    if len(shards) == 1:
        _write(folder / SINGLE, shards[0])
        return
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write(folder / name, shard)
        index |= {weight.name: name for weight in shard}
    total = {"total_size": sum(weight.nbytes for weight in weights)}
    (folder / INDEX).write_text(json.dumps({"metadata": total, "weight_map": index}, indent=2))


def _write(path: Path, weights: Sequence[NewWeight]) -> None:
    header: dict[str, Mapping[str, object]] = {"__metadata__": {"format": "pt"}}
    at = 0
    for weight in weights:
        offsets = [at, at + weight.nbytes]
        header[weight.name] = {"dtype": weight.dtype, "shape": list(weight.shape), "data_offsets": offsets}
        at += weight.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in weights:
            values = weight.content().to(PLAIN_DTYPES[weight.dtype]).reshape(weight.shape).contiguous()
            file.write(values.view(-1).view(torch.uint8).numpy().data)
