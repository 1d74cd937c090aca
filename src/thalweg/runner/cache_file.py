"""What one rank writes down of the prefix cache, and reads again: a safetensors file with rows of blocks, rows of
snapshots, the index that says what they are, and what they belong to."""

from __future__ import annotations

import contextlib
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from thalweg.cache.host_storage import HostStorage, Rows
from thalweg.cache.storage import CacheStorage
from thalweg.core import SaveCache
from thalweg.errors import CheckpointError
from thalweg.weights.safetensors import SafetensorsFile

FORMAT = 1
CHUNK_BYTES = 64 << 20


class About(msgspec.Struct, frozen=True):
    """What a file is of. `identity`: of the model and all that the bytes depend on; `image`: the same number in the
    files of all ranks that were written together; `crc32` of index, blocks and snapshots."""

    format: int
    identity: str
    image: int
    rank: int
    crc32: list[int]


class CacheIndex(NamedTuple):
    """What a file says is in it."""

    nodes: bytes
    num_blocks: int
    num_snapshots: int


def new_image(folder: Path, number: int) -> tuple[Path, Path]:
    """Where ranks write a new image, and what it is called once all of them have."""
    return folder / f"unfinished-{number:020d}", folder / f"image-{number:020d}"


def images(folder: Path) -> list[Path]:
    """The images of all ranks, oldest first; nothing else that lies there."""
    return _named(folder, "image")


def leftovers(folder: Path) -> list[Path]:
    """Images that were never finished."""
    return _named(folder, "unfinished")


def _named(folder: Path, kind: str) -> list[Path]:
    return sorted(path for path in folder.glob(f"{kind}-*") if re.fullmatch(rf"{kind}-\d{{20}}", path.name))


def file_of(image: Path, rank: int) -> Path:
    return image / f"rank-{rank}.safetensors"


def failure_of(image: Path, rank: int) -> Path:
    """A file that says why the rank has not written its own."""
    return image / f"rank-{rank}.failed"


def write(host: HostStorage, cache: CacheStorage, order: SaveCache, identity: str, rank: int) -> None:
    """The rank's file, which is there only once it is whole; if it cannot be, a file says why. Raises OSError."""
    path = file_of(Path(order.folder), rank)
    unfinished = path.with_suffix(".unfinished")
    try:
        _write(unfinished, host, cache, order, identity, rank)
        unfinished.rename(path)
    except Exception as e:
        with contextlib.suppress(OSError):
            unfinished.unlink()  # room for the other, if the disk is full
        failure_of(path.parent, rank).write_text(f"{type(e).__name__}: {e}")
        raise


def _write(path: Path, host: HostStorage, cache: CacheStorage, order: SaveCache, identity: str, rank: int) -> None:
    blocks, snapshots = host.blocks, host.snapshots
    slots = [s if s > 0 else -cache.saved_row(-s) for s in order.snapshots]
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with open(os.open(path, flags, 0o600), "wb") as file:
        about_bytes = 256 + len(identity)
        sizes = {
            "about": (about_bytes,),
            "index": (len(order.index),),
            "blocks": (len(order.blocks), blocks.row_bytes),
            "snapshots": (len(order.snapshots), snapshots.row_bytes),
        }
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, shape in sizes.items():
            end = at + shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[name] = {"dtype": "U8", "shape": shape, "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        begin = 8 + len(text)
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(b" " * about_bytes)  # filled in at the end
        file.write(order.index)
        sums = [zlib.crc32(order.index)]
        for rows, sources in ((blocks, order.blocks), (snapshots, slots)):
            crc = 0
            for part in _taken(rows, sources):
                crc = zlib.crc32(part, crc)
                file.write(part)
            sums.append(crc)
        file.seek(begin)
        file.write(msgspec.json.encode(About(FORMAT, identity, order.image, rank, sums)))


def read(host: HostStorage, image: Path, identity: str, rank: int) -> tuple[int, CacheIndex]:
    """Fill host memory's first places from a rank's file: the image's number, and what is in it. Raises
    CheckpointError, one line, if it is damaged or of something else."""
    path = file_of(image, rank)
    file = SafetensorsFile(path)
    if set(file.tensors) != {"about", "index", "blocks", "snapshots"}:
        raise CheckpointError(f"{path} is not a file of the prefix cache")
    try:
        about = msgspec.json.decode(file.raw("about").numpy().tobytes().strip(), type=About)
    except msgspec.DecodeError as e:
        raise CheckpointError(f"{path} does not say what it belongs to: {e}") from None
    if about.format != FORMAT:
        raise CheckpointError(f"{path} is of format {about.format}; expected {FORMAT}")
    if about.identity != identity:
        raise CheckpointError(f"{path} is of another model, version, dtype or layout")
    if about.rank != rank:
        raise CheckpointError(f"{path} is of rank {about.rank}; expected {rank}")
    index = file.raw("index").numpy().tobytes()
    if len(about.crc32) != 3 or zlib.crc32(index) != about.crc32[0]:
        raise CheckpointError(f"{path} is damaged: its index is not what was written")
    counts = []
    for name, rows, crc in zip(("blocks", "snapshots"), (host.blocks, host.snapshots), about.crc32[1:], strict=True):
        count, *width = file.tensors[name].shape
        if width != [rows.row_bytes]:
            raise CheckpointError(f"{path}: {name} have rows of {width} bytes; expected {rows.row_bytes}")
        if _fill(rows, file.raw(name)) != crc:
            raise CheckpointError(f"{path} is damaged: {name} are not what was written")
        counts.append(count)
    return about.image, CacheIndex(index, *counts)


def _taken(rows: Rows, sources: list[int]) -> Iterator[bytes]:
    most = max(1, CHUNK_BYTES // max(1, rows.row_bytes))
    for start in range(0, len(sources), most):
        yield rows.take(sources[start : start + most]).view(torch.uint8).numpy().tobytes()


def _fill(rows: Rows, data: Tensor) -> int:
    """Copy rows of bytes into places 1, 2, ..., as far as there are any: the checksum of all of them."""
    crc, target = 0, rows.rows.view(torch.uint8)[1:].flatten()
    for start in range(0, len(data), CHUNK_BYTES):
        part = data[start : start + CHUNK_BYTES]
        crc = zlib.crc32(part.numpy().data, crc)
        room = target[start : start + len(part)]
        room.copy_(part[: len(room)])
    return crc
