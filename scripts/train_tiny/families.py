"""The families there is a tiny model of: a package each, with `model`, `decode` and `text` beside each other."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from chat import Text

ROOT = Path(__file__).resolve().parents[2]
# The model's folder: its config.json and tokenizer are written before it is trained.
FOLDERS = {
    "kimi_linear": ROOT / "src" / "thalweg" / "bundled" / "thalweg-tiny",
    "qwen3_5": ROOT / "models" / "thalweg-tiny-gdn",
}


def part(family: str, name: str) -> ModuleType:
    """A module of the family: imported when it is needed, for documents are made without torch."""
    return importlib.import_module(f"{family}.{name}")


def load_text(family: str) -> Text:
    """The tokenizer and chat layout of the family's tiny model."""
    return part(family, "text").ModelText(FOLDERS[family])


def read_config(family: str) -> dict[str, Any]:
    return json.loads((FOLDERS[family] / "config.json").read_text(encoding="utf-8"))
