"""Reading JSON a stranger may have written: bounded in size and depth, no key twice, errors of one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from thalweg.config.unfetched import HEAD_BYTES, why_unfetched
from thalweg.errors import CheckpointError

MAX_FILE_BYTES = 8 << 20
MAX_DEPTH = 32


def read_object(folder: Path, name: str, *, max_bytes: int = MAX_FILE_BYTES) -> dict[str, Any]:
    """The JSON object in folder/name. Raises CheckpointError when it is unreadable, too big or no object."""
    path = folder / name
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such folder; expected a model folder with {name}")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected a model folder with {name}")
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {name} in it; expected a model folder with {name}")
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > max_bytes:
        raise CheckpointError(f"{path} is larger than {max_bytes} bytes; expected a small JSON file")
    if reason := why_unfetched(data[:HEAD_BYTES]):
        raise CheckpointError(f"{path} {reason}")
    return parse_object(data, str(path))


def parse_object(data: bytes, where: str, *, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """The JSON object in `data`. Raises CheckpointError, which begins with `where`, for anything else."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise CheckpointError(f"{where}: nested too deeply; expected at most {max_depth} levels") from None
    except ValueError as error:  # bad UTF-8, bad JSON, an integer of thousands of digits, a key given twice
        reason = str(error).splitlines()[0][:160]
        raise CheckpointError(f"{where} is not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds a JSON {type(value).__name__}; expected an object")
    if _deeper_than(value, max_depth):
        raise CheckpointError(f"{where}: nested too deeply; expected at most {max_depth} levels")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {ascii(twice)[:80]} is given twice")
    return found


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True
