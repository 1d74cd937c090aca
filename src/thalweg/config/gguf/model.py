"""A GGUF model: one file, or the parts of one that was split."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from thalweg.config.gguf.file import GgufFile, GgufTensor
from thalweg.errors import CheckpointError, ConfigError

SUFFIX = ".gguf"
MAX_PARTS = 1_000
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_BESIDE_MODELS = ("mmproj", "mtp-")  # files of a vision encoder or a drafting layer


class GgufModel:
    """Metadata of the first part, and the tensors of all. Raises what GgufFile does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [GgufFile(part) for part in parts_of(path)]
        self.metadata: Mapping[str, Any] = self.files[0].metadata
        self._file_of: dict[str, GgufFile] = {}
        for number, file in enumerate(self.files):
            self._check_part(file, number)
            for name in file.tensors:
                if name in self._file_of:
                    raise CheckpointError(f"{file.path} holds {ascii(name)[:120]}, and an earlier part does, too")
                self._file_of[name] = file
        expected = self.metadata.get("split.tensors.count")
        if len(self.files) > 1 and expected is not None and expected != len(self._file_of):
            raise CheckpointError(f"{path}: its parts have {len(self._file_of)} tensors; expected {expected!r:.40}")

    @property
    def architecture(self) -> str:
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str):
            raise CheckpointError(f"{self.path}: general.architecture is {name!r:.40}; expected the name of one")
        return name

    @property
    def tensors(self) -> dict[str, GgufTensor]:
        """Every tensor by name, in the order of the files."""
        return {name: file.tensors[name] for name, file in self._file_of.items()}

    def file_of(self, name: str) -> GgufFile:
        return self._file_of[name]

    def _check_part(self, file: GgufFile, number: int) -> None:
        said = file.metadata.get("split.count", 0), file.metadata.get("split.no", 0)
        count = len(self.files)
        if said != ((count, number) if count > 1 else (said[0], 0)) or (count == 1 and said[0] not in (0, 1)):
            raise CheckpointError(
                f"{file.path} says that it is part {said[1]!r:.20} of {said[0]!r:.20}, counted from 0;"
                f" expected {number} of {count}, as its name says"
            )


@lru_cache(maxsize=2)
def _opened(path: Path, stamp: tuple[int, int, int]) -> GgufModel:
    return GgufModel(path)


def open_gguf(path: Path) -> GgufModel:
    """The model at `path`, parsed once while the file stays as it is."""
    try:
        stat = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    return _opened(path, (stat.st_ino, stat.st_size, stat.st_mtime_ns))


def is_gguf(path: Path) -> bool:
    return path.suffix == SUFFIX and not path.is_dir()


def parts_of(path: Path) -> list[Path]:
    """All files of the model of which `path` is one. Raises CheckpointError if some are missing."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    stem, total = match[1], int(match[3])
    if not 0 < int(match[2]) <= total <= MAX_PARTS:
        raise CheckpointError(f"{path}: part {int(match[2])} of {total}; expected 1 to {MAX_PARTS} parts")
    parts = [path.with_name(f"{stem}-{n:05}-of-{total:05}{SUFFIX}") for n in range(1, total + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise CheckpointError(f"{path}: {missing[0]} is missing ({len(missing)} of {total} parts); expected it beside")
    return parts


def model_name(path: Path) -> str:
    """What a model is called after its file."""
    match = _PART.fullmatch(path.name)
    return match[1] if match else path.stem


def gguf_in(folder: Path) -> Path | None:
    """The only GGUF model of a folder, None if it has none. Raises ConfigError naming them if there are several."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        if not path.name.startswith(_BESIDE_MODELS):
            found.setdefault(model_name(path), path)
    if len(found) > 1:
        names = ", ".join(path.name for path in list(found.values())[:5]) + (" ..." if len(found) > 5 else "")
        raise ConfigError(f"MODEL is {str(folder)!r}, which holds several GGUF models; expected one of them: {names}")
    return next(iter(found.values()), None)
