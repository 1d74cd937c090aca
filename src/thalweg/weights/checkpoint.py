"""A folder of safetensors files as one set of tensors: one file, shards with an index, or shards without."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from thalweg.config.bounded_json import read_object
from thalweg.errors import CheckpointError, UnsupportedError
from thalweg.weights.safetensors import SafetensorsFile, TensorInfo

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20
MAX_SHARDS = 10_000
MAX_LISTED = 20  # tensors of a kind in an error

_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
_REFUSED = {
    ".bin": "pickled PyTorch weights, which can run code",
    ".pt": "pickled PyTorch weights, which can run code",
    ".pth": "pickled PyTorch weights, which can run code",
    ".gguf": "GGUF weights, which are a model by themselves: name the file as MODEL",
}


class HeldTensor(Protocol):
    """What is known of a tensor before it is read: `dtype` as its format spells it."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class WeightFiles(Protocol):
    """The weights of a model in any format, opened and checked but not read."""

    folder: Path
    described_by: str  # what must agree with the tensors, for messages

    @property
    def count(self) -> int:
        """Tensors in the files, which may hold several of a checkpoint's in one."""

    @property
    def tensors(self) -> Mapping[str, HeldTensor]:
        """Every tensor by name, in file order."""

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor."""

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """The tensor, or its range [start, stop) along `dim`, in a dtype of torch's; not to be written."""

    def read_blocks(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """Likewise, of a tensor stored in blocks: rows [N, bytes of a row] as the file has them, uint8."""

    def release(self, name: str) -> None:
        """Let go of memory that a tensor took as it was read."""


class Checkpoint:
    """The weights in `folder`, opened and checked but not read: `read` maps only what it is asked for.

    Looks for model.safetensors, then model.safetensors.index.json, then model-N-of-M.safetensors. Raises
    CheckpointError when files are missing or damaged or disagree with the index, UnsupportedError when the
    folder holds weights in another format only.
    """

    described_by = "config.json"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, SafetensorsFile] = {}
        index = _read_index(folder) if not (folder / SINGLE).is_file() and (folder / INDEX).is_file() else None
        for name in sorted(set(index.values())) if index is not None else _find_files(folder):
            file = SafetensorsFile(folder / name)
            if index is not None:
                _check_against_index(file, {t for t, shard in index.items() if shard == name})
            for tensor in file.tensors:
                if tensor in self._file_of:
                    other = self._file_of[tensor].path.name
                    raise CheckpointError(f"{folder}: {tensor} is in {other} and in {name}; expected it once")
                self._file_of[tensor] = file

    @property
    def count(self) -> int:
        return len(self._file_of)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name, in file order."""
        return {name: file.tensors[name] for name, file in self._file_of.items()}

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._file_of[name].path

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """The tensor, or its range [start, stop) along `dim`: a view of the mapped file, not to be
        written."""
        return self._file_of[name].read(name, dim, start, stop)

    def read_blocks(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """No plan asks for it: the format has no blocks."""
        raise NotImplementedError(f"{self.path_of(name)} has no blocks")

    def release(self, name: str) -> None:
        """Nothing: the pages of a mapped file are the system's to take back."""


def _find_files(folder: Path) -> list[str]:
    """Weight files of a folder without an index."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected a model folder with {SINGLE}")
    if (folder / SINGLE).is_file():
        return [SINGLE]
    present = sorted(path.name for path in folder.iterdir() if path.is_file())
    shards = {name: match for name in present if (match := _SHARD.fullmatch(name))}
    if not shards:
        _refuse_other_formats(folder, present)
        raise CheckpointError(f"{folder}: no weights in it; expected {SINGLE}, {INDEX} or model-00001-of-N.safetensors")
    totals = {int(match[2]) for match in shards.values()}
    numbers = {int(match[1]) for match in shards.values()}
    total = max(totals)
    if len(totals) > 1 or total > MAX_SHARDS:
        raise CheckpointError(f"{folder}: shards of {sorted(totals)[:4]} in all; expected one complete set of files")
    missing = sorted(set(range(1, total + 1)) - numbers)
    if missing:
        raise CheckpointError(f"{folder}: shard {missing[0]} of {total} is missing ({len(missing)} missing in all)")
    return list(shards)


def _refuse_other_formats(folder: Path, present: Iterable[str]) -> None:
    for name in present:
        reason = _REFUSED.get(Path(name).suffix)
        if reason:
            raise UnsupportedError(f"{folder}: {name} holds {reason}; expected {SINGLE} (convert it to safetensors)")


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> shard file name. The names are plain: they cannot leave the folder."""
    path = folder / INDEX
    weight_map = read_object(folder, INDEX, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path}: weight_map is missing or malformed; expected tensor names to file names")
    shards = set(weight_map.values())
    if len(shards) > MAX_SHARDS:
        raise CheckpointError(f"{path}: names {len(shards)} files; expected at most {MAX_SHARDS}")
    for shard in sorted(shards):
        # Judged as text: a name with no separator, no drive and no dots cannot point outside.
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}\.safetensors", shard):
            raise CheckpointError(f"{path}: names {ascii(shard)[:120]}; expected the plain name of a .safetensors file")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{path}: names {shard}, which is missing from the folder")
    return weight_map


def _check_against_index(file: SafetensorsFile, expected: set[str]) -> None:
    absent, surplus = expected - set(file.tensors), set(file.tensors) - expected
    if absent or surplus:
        name = ascii(min(absent or surplus))[:120]
        said = "which the index says it holds" if absent else "which the index does not list there"
        verb = "lacks" if absent else "holds"
        count = len(absent) + len(surplus)
        raise CheckpointError(f"{file.path} {verb} {name}, {said} ({count} tensors disagree with {INDEX})")


def refuse(
    folder: Path, described_by: str, missing: Sequence[str], unexpected: Sequence[str], misshapen: Sequence[str]
) -> None:
    """Raise CheckpointError if any tensor is missing, not expected or not of the shape that is."""
    faults = [
        f"{len(names)} {kind}: {', '.join(names[:MAX_LISTED])}{' ...' if len(names) > MAX_LISTED else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if faults:
        raise CheckpointError(f"{folder}: its tensors do not fit its {described_by}; {'; '.join(faults)}")
