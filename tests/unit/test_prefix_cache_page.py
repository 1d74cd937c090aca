"""The page of the prefix cache names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHORT = {
    "model": "tests/models/test_prefix_cache.py",
    "scenario": "tests/scheduler/test_prefix_scenarios.py",
    "property": "tests/scheduler/test_prefix_properties.py",
}


def test_every_test_that_it_names_is_there() -> None:
    named = re.findall(r"([\w/.]+)::(test_\w+)", (ROOT / "docs" / "prefix-cache.md").read_text())
    assert len(named) > 30
    for file, test in named:
        path = ROOT / SHORT.get(file, file)
        assert f"def {test}(" in path.read_text(), f"{path.name} has no {test}"
