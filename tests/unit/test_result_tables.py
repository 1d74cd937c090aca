"""Tables of benchmarks in pages are what `thalweg bench compare --markdown` makes of the files in bench/results."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from thalweg.cli import main

ROOT = Path(__file__).resolve().parents[2]
GENERATED = re.compile(r"<!-- thalweg (bench compare [^\n]*) -->\n((?:\|[^\n]*\n)+)")
PAGES = ("README.md", "docs/performance.md")
TABLES = [
    pytest.param(command, table, id=f"{page}-{n}")
    for page in PAGES
    for n, (command, table) in enumerate(GENERATED.findall((ROOT / page).read_text()))
]


@pytest.mark.parametrize(("command", "table"), TABLES)
def test_a_page_has_what_its_command_prints(
    command: str, table: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out == table


def test_every_results_file_is_used_by_a_page() -> None:
    used = set(re.findall(r"bench/results/([\w.]+\.json)", "".join((ROOT / page).read_text() for page in PAGES)))
    assert used == {file.name for file in (ROOT / "bench" / "results").glob("*.json")}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text(json.dumps({"results": rows}))
    return str(path)


def spread(name: str, median: float) -> dict[str, float]:
    return {f"median_{name}": median, f"min_{name}": median - 1, f"max_{name}": median + 1}


def test_two_files_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "old.json", [{"batch_size": 1, "tpot_ms": 4.0}, {"batch_size": 8, "tpot_ms": 2000}])
    b = write(tmp_path / "new.json", [{"batch_size": 1} | spread("tpot_ms", 3.0) | {"floor": {"step_ms": 1.25}}])
    assert main(["bench", "compare", a, b, "--markdown", "--figure", "tpot_ms", "--figure", "floor.step_ms"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| batch size | tpot ms, old | tpot ms, new | new / old | floor step ms, new |",
        "| --- | --- | --- | --- | --- |",
        "| 1 | 4 | 3 | 0.75 | 1.25 |",
        "| 8 | 2,000 | - | - | - |",
    ]


def test_one_file_has_all_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.json", [{"batch_size": 1, "context": 4000, "launches": 213} | spread("step_ms", 1.909)])
    assert main(["bench", "compare", file, "--markdown"]) == 0
    assert capsys.readouterr().out.splitlines()[::2] == [
        "| batch size | context | launches | step ms |",
        "| 1 | 4,000 | 213 | 1.91 |",
    ]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--markdown", "--figure", "tpot"], "--figure is 'tpot'; expected one that the files have: tpot_ms"),
        (["--markdown", "--label", "a", "--label", "b"], "--label is given 2 times for 1 files"),
        (["--markdown", "--fail-if-slower", "5"], "--markdown prints figures and judges none"),
        (["--figure", "tpot_ms"], "expected two results files to compare"),
        ([], "expected two results files to compare"),
    ],
)
def test_what_cannot_be_printed(
    options: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.json", [{"batch_size": 1, "tpot_ms": 4.0}])
    assert main(["bench", "compare", file, *options]) == 2
    assert error in capsys.readouterr().err
