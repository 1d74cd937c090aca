"""Rules of the house that import-linter cannot say: who may touch what, read off the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import thalweg

ROOT = Path(thalweg.__file__).parent


def names_used(path: Path) -> Iterator[str]:
    """Dotted names that a file imports or reads, e.g. "torch.distributed" and "os.environ"."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


RULES = [
    ("torch.distributed", "parallel/"),
    ("os.environ", "config/env.py"),
    ("os.getenv", "config/env.py"),
    ("triton", "ops/"),
    ("fastapi", "server/"),
    ("llguidance", "sampling/"),
    ("huggingface_hub", "config/hub.py"),
    ("ray", "engine/processes/ray_hosts.py"),
    ("einops", ("ops/heads/einops.py", "bench/kernels/rearrange.py")),  # to be measured, never to be used unasked
    ("pickle", None),
    ("dill", None),
    ("multiprocessing", None),
    ("torch.load", None),
]


@pytest.mark.parametrize(("name", "only_in"), RULES)
def test_only_its_own_room_uses(name: str, only_in: str | tuple[str, ...] | None) -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if any(used == name or used.startswith(name + ".") for used in names_used(path))
    }
    strangers = {u for u in users if only_in is None or not u.startswith(only_in)}
    assert not strangers
