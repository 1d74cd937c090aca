"""Bounded reads of the small files of a model folder: no more than its limit is read of any of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from thalweg.config.unfetched import HEAD_BYTES, why_unfetched
from thalweg.errors import CheckpointError


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """The file's bytes. Raises CheckpointError when it cannot be read, is larger than max_bytes or was not fetched."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); expected a regular file") from None
    if len(data) > max_bytes:
        raise CheckpointError(f"{path}: larger than {max_bytes} bytes, the most expected of such a file")
    if reason := why_unfetched(data[:HEAD_BYTES]):
        raise CheckpointError(f"{path} {reason}")
    return data


def read_text(path: Path, max_bytes: int) -> str:
    """The file's text. Raises CheckpointError when it is not UTF-8, too large or unreadable."""
    try:
        return read_bounded(path, max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: byte {error.start} is not UTF-8; expected UTF-8 text") from None


def parse_json_object(text: str, path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError on anything else; `path` is for the message."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); expected a JSON object") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}; expected an object")
    return value


TOKENIZER_CONFIG = "tokenizer_config.json"
MAX_CONFIG_BYTES = 16 << 20


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json of a model folder, or {} when there is none. `auto_map` is never acted upon."""
    path = folder / TOKENIZER_CONFIG
    return parse_json_object(read_text(path, MAX_CONFIG_BYTES), path) if path.is_file() else {}


def configured_token_id(config: dict[str, Any], key: str, ids: dict[str, int], folder: Path) -> int | None:
    """The id that `key` (bos_token, eos_token) names in a tokenizer config, None when it names none.

    Raises CheckpointError when it names a token that `ids` does not have.
    """
    named = config.get(key)
    text = named.get("content") if isinstance(named, dict) else named
    if text is None:
        return None
    if not isinstance(text, str) or text not in ids:
        raise CheckpointError(
            f"{folder / TOKENIZER_CONFIG}: {key} is {str(text)[:80]!r}; expected a token of the vocabulary"
        )
    return ids[text]
