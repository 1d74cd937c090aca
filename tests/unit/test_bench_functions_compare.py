"""What a comparison of two files of `thalweg bench functions` says, on made-up figures."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from thalweg.bench.functions.compare import beyond_spread, compare
from thalweg.bench.functions.report import markdown
from thalweg.cli import main
from thalweg.errors import ConfigError


@pytest.mark.parametrize(
    ("a", "b", "moved"),
    [
        ([10, 11, 12, 11, 10], [13, 14, 15, 14, 13], False),  # apart, and not by three deviations
        ([10, 10.1, 10.2, 10.1, 10], [13, 13.1, 13.2, 13.1, 13], True),
        ([10, 10.1, 10.2, 10.1, 10], [7, 7.1, 7.2, 7.1, 7], True),
        ([10, 10.1, 13.0, 10.1, 10], [13, 13.1, 13.2, 13.1, 12.9], False),  # one run of A was as slow as B
        ([10, 10, 10, 10, 10], [10.4, 10.4, 10.4, 10.4, 10.4], False),  # less than 5 %
        ([], [1.0], False),
    ],
)
def test_beyond_the_spread(a: list[float], b: list[float], moved: bool) -> None:
    assert beyond_spread(a, b) is moved


def row(self_us: float, calls: float = 1, peak: float = 100) -> dict[str, list[float]]:
    return {
        "calls": [calls] * 5,
        "self_us": [self_us * f for f in (0.99, 1.0, 1.01, 1.0, 1.0)],
        "total_us": [self_us] * 5,
        "kept_bytes": [0, 0],
        "peak_bytes": [peak, peak],
    }


def made_up() -> dict[str, Any]:
    functions: dict[str, Any] = {
        "p.a:hot": {"decode": row(90), "prefill": row(900)},
        "p.a:steady": {"decode": row(10), "prefill": row(100)},
        "p.a:start": {"load": row(500)},
        "p.a:answer": {"http": row(50)},
        "p.a:old": {"decode": row(0.01)},
    }
    phase = {"unit": "step", "count": 4, "cpu_ms": [1.0] * 5, "wall_ms": [1.0] * 5, "joules": "not measured"}
    return {
        "kind": "functions",
        "engine": {"version": "x", "model": "m", "workload": "w", "quick": False, "runs": 5},
        "machine": {"cpu": "c"},
        "phases": {name: dict(phase) for name in ("load", "prefill", "decode", "http")},
        "functions": functions,
        "ops": {"linear [reference] D=1": {"decode": row(40)}, "gone [reference]": {"decode": row(1)}},
        "sources": {**{name: f"source of {name}" for name in functions}, "p.a:never": "n", "p.a:<module>": "m"},
    }


def test_nothing_is_said_of_the_same() -> None:
    found = compare(made_up(), made_up())
    assert found.entries == []
    assert found.unchanged == 7


def test_modified_added_removed_renamed_and_moved_are_told_apart() -> None:
    a, b = made_up(), made_up()
    b["sources"]["p.a:hot"] = "another"
    b["functions"]["p.a:hot"] = {"decode": row(120), "prefill": row(900)}
    b["sources"]["p.a:start"] = "another"
    b["sources"]["p.a:never"] = "another"
    b["sources"]["p.b:moved"] = b["sources"].pop("p.a:answer")
    b["functions"]["p.b:moved"] = b["functions"].pop("p.a:answer")
    del b["sources"]["p.a:old"], b["functions"]["p.a:old"]
    b["sources"]["p.a:new"] = "new"
    b["functions"]["p.a:new"] = {"decode": row(5)}
    b["functions"]["p.a:steady"] = {"decode": row(10, peak=9000), "prefill": row(50)}
    b["ops"]["linear [reference] D=1"] = {"decode": row(60)}
    b["ops"]["came [reference]"] = b["ops"].pop("gone [reference]")
    found = compare(a, b)
    verdicts = {e.name: e.verdict for e in found.modified}
    assert verdicts == {
        "p.a:hot": "hot path",
        "p.a:start": "initialisation only",
        "p.a:never": "not called by the workload",
    }
    assert [e.name for e in found.added] == ["p.a:new"]
    assert [e.name for e in found.removed] == ["p.a:old"]
    assert [(e.name, e.was, e.verdict) for e in found.renamed] == [("p.b:moved", "p.a:answer", "per request")]
    assert [e.name for e in found.moved] == ["p.a:steady"]
    assert [e.name for e in found.ops] == ["linear [reference] D=1", "gone [reference]", "came [reference]"]
    hot = found.modified[0]
    assert hot.share["decode"] == (pytest.approx(90 / 100.01), pytest.approx(120 / 135))
    assert hot.us_per_call["decode"] == (90, 120)
    (moved,) = hot.moved
    assert (moved.phase, moved.figure, moved.delta_share) == ("decode", "self_us", pytest.approx(30 / 100.01))
    steady = {(m.phase, m.figure): m.delta_share for m in found.moved[0].moved}
    assert steady == {("decode", "peak_bytes"): None, ("prefill", "self_us"): pytest.approx(-0.05)}
    assert [m.name for m in found.slower_by(10)] == ["p.a:hot", "linear [reference] D=1"]
    assert [m.name for m in found.slower_by(40)] == ["linear [reference] D=1"]


def test_a_version_without_ops_is_told_of() -> None:
    a = made_up() | {"ops": None}
    assert "Ops were not recorded" in markdown(compare(a, made_up()), "A", "B")
    assert "Ops were not recorded" not in markdown(compare(made_up(), made_up()), "A", "B")


def test_what_is_nothing_of_its_phase_is_not_told() -> None:
    a, b = made_up(), made_up()
    b["functions"]["p.a:old"] = {"decode": row(0.05)}  # five times as slow
    assert compare(a, b).entries == []


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("functions", "p.a:hot"), 3, r"Expected `object`, got `int` - at `\$.functions"),
        (("functions", "p.a:hot", "decode", "self_us"), [], "length >= 1"),
        (("functions", "p.a:hot", "decode", "self_us"), ["x"], "Expected `float`"),
        (("phases", "decode", "cpu_ms"), None, "Expected `array`"),
        (("sources",), [], "Expected `object`"),
    ],
)
def test_a_damaged_file_is_named(path: tuple[str, ...], value: Any, said: str) -> None:
    b = made_up()
    inner: Any = b
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    with pytest.raises(ConfigError, match=f"B is not a file that thalweg bench functions --save wrote: .*{said}"):
        compare(made_up(), b)


@pytest.mark.parametrize("fact", ["workload", "quick", "model"])
def test_other_workloads_are_not_compared(fact: str) -> None:
    b = made_up()
    b["engine"][fact] = "other"
    with pytest.raises(ConfigError, match=f"{fact} is .* in A and other in B"):
        compare(made_up(), b)


def test_bench_compare_takes_such_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = made_up(), copy.deepcopy(made_up())
    b["functions"]["p.a:hot"]["decode"] = row(120)
    b["phases"]["decode"]["joules"] = {"rapl package-0": [1.0, 1.2, 1.1]}
    b["machine"]["cpu"] = "d"
    files = [tmp_path / "A.json", tmp_path / "B.json"]
    for file, figures in zip(files, (a, b), strict=True):
        file.write_text(json.dumps(figures))
    line = ["bench", "compare", *map(str, files)]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert "differs: cpu: c | d" in out
    assert "decode: slower, 90.0 -> 120.0 us (+30.00 % of decode)" in out
    assert "rapl package-0 1.10 (1.00..1.20) J" in out
    assert "not measured" in out
    assert main([*line, "--fail-if-slower", "10"]) == 1
    assert main([*line, "--fail-if-slower", "50"]) == 0
    (tmp_path / "other.json").write_text(json.dumps({"results": [{"op": "x", "us": 1}]}))
    assert main(["bench", "compare", str(files[0]), str(tmp_path / "other.json")]) == 2
    assert "B is not a file of thalweg bench functions" in capsys.readouterr().err
