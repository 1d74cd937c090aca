"""Rules of the house that import-linter cannot say: who may touch what, read off the syntax trees."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import thalweg

ROOT = Path(thalweg.__file__).parent


@cache
def names_used() -> dict[str, set[str]]:
    """By file, dotted names that it imports or reads, e.g. "torch.distributed" and "os.environ"."""
    found: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        names = found[str(path.relative_to(ROOT))] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module)
                names.update(f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names.add(f"{node.value.id}.{node.attr}")
    return found


RULES = [
    ("torch.distributed", "parallel/"),
    ("os.environ", "config/env.py"),
    ("os.getenv", "config/env.py"),
    ("triton", "ops/"),
    ("fastapi", "server/"),
    ("llguidance", "sampling/"),
    ("huggingface_hub", "config/hub.py"),
    ("ray", "engine/processes/ray_hosts.py"),
    ("einops", "bench/kernels/rearrange.py"),  # to be measured, never to be used
    ("pickle", None),
    ("dill", None),
    ("multiprocessing", None),
    ("torch.load", None),
]


@pytest.mark.parametrize(("name", "only_in"), RULES)
def test_only_its_own_room_uses(name: str, only_in: str | tuple[str, ...] | None) -> None:
    users = {file for file, names in names_used().items() if any(n == name or n.startswith(name + ".") for n in names)}
    strangers = {u for u in users if only_in is None or not u.startswith(only_in)}
    assert not strangers
