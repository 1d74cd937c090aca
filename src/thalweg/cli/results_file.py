"""The file that --output-json names, which `thalweg bench compare` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from thalweg.errors import ConfigError


def check_writable(path: str | None) -> None:
    """Fail before a long run rather than after it."""
    if path is not None and not Path(path).expanduser().resolve().parent.is_dir():
        raise ConfigError(f"--output-json is {path!r}, whose folder does not exist; expected a file in an existing one")


def write_json(path: str | None, figures: dict[str, Any]) -> None:
    """Write a command's figures where its --output-json says, if it does. Raises ConfigError."""
    if path is None:
        return
    try:
        Path(path).expanduser().write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"--output-json is {path!r}, which cannot be written: {e.strerror}") from None
