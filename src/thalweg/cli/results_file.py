"""The file that --output-json names, which `thalweg bench compare` reads, and others of that kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from thalweg.errors import ConfigError


def check_writable(path: str | None, option: str = "--output-json") -> None:
    """Fail before a long run rather than after it."""
    if path is not None and not Path(path).expanduser().resolve().parent.is_dir():
        raise ConfigError(f"{option} is {path!r}, whose folder does not exist; expected a file in an existing one")


def write_json(path: str | None, figures: dict[str, Any]) -> None:
    """Write a command's figures where its --output-json says, if it does. Raises ConfigError."""
    write_text(path, json.dumps(figures, indent=2) + "\n", "--output-json")


def write_text(path: str | None, text: str, option: str) -> None:
    """Write what an option named a file for, if it did. Raises ConfigError."""
    if path is None:
        return
    try:
        Path(path).expanduser().write_text(text, encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"{option} is {path!r}, which cannot be written: {e.strerror}") from None
