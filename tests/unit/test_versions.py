"""Version ranges in pyproject.toml: bounded on both sides, without versions known not to work, the lowest listed."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from thalweg.config.extras import EXTRAS as MODULES

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
BASE = {r.name: r.specifier for r in map(Requirement, PROJECT["dependencies"])}
RANGES = BASE | {r.name: r.specifier for extra in ("serve", "hub", "trace") for r in map(Requirement, EXTRAS[extra])}


@pytest.mark.parametrize("name", RANGES)
def test_a_range_has_both_ends_and_holds_what_is_installed(name: str) -> None:
    operators = {s.operator for s in RANGES[name]}
    assert {">=", "<"} <= operators <= {">=", "<", "!="}
    assert RANGES[name].contains(version(name).partition("+")[0], prereleases=True)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("typer", "0.17.4"),  # --help ends in a traceback with the click that pip takes
        *(("typer", f"0.27.{n}") for n in range(4)),  # serve --port is called --PORT
        ("tiktoken", "0.12.0"),  # 400,000 characters of one Han character take 40 s
        ("h11", "0.15.0"),  # CVE-2025-43859
        ("uvicorn", "0.40.0"),  # a signal at start ends in a traceback
        ("duckdb", "1.2.2"),  # takes arrays only by way of pandas
    ],
)
def test_what_is_known_not_to_work_is_not_allowed(name: str, broken: str) -> None:
    assert not RANGES[name].contains(broken)


def test_the_lowest_versions_are_listed_for_make_test_lowest() -> None:
    script = [sys.executable, ROOT / "scripts" / "lowest_versions.py", "--leave-out", "torch"]
    lines = subprocess.run(script, capture_output=True, text=True, check=True).stdout.split()
    lowest = dict(line.split("==") for line in lines)
    assert RANGES.keys() - {"torch"} <= lowest.keys()
    assert "torch" not in lowest
    assert {"pytest", "hypothesis", "safetensors"} <= lowest.keys()
    assert "ruff" not in lowest  # pinned, and no part of what the tests need
    assert all(f">={lowest[name]}" in map(str, RANGES[name]) for name in RANGES.keys() - {"torch"})


def test_the_library_brings_neither_the_server_nor_what_reads_traces() -> None:
    assert not BASE.keys() & {"fastapi", "uvicorn", "pydantic", "prometheus-client", "duckdb", "huggingface_hub", "ray"}
    assert Requirement(EXTRAS["all"][0]).extras == EXTRAS.keys() - {"all", "dev", "ray"}


def test_every_module_of_an_extra_is_known_by_it() -> None:
    imported = {"prometheus-client": "prometheus_client"}
    for extra in ("serve", "hub", "trace", "ray"):
        for requirement in map(Requirement, EXTRAS[extra]):
            assert MODULES[imported.get(requirement.name, requirement.name)] == extra
