"""What `thalweg bench functions` counts, and what a comparison of two of its files says."""

from __future__ import annotations

import asyncio
import copy
import importlib
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from thalweg.bench.functions.compare import beyond_spread, compare
from thalweg.bench.functions.energy import Energy
from thalweg.bench.functions.hooks import Hooks
from thalweg.bench.functions.record import merge
from thalweg.bench.functions.sources import sources
from thalweg.cli import main
from thalweg.errors import ConfigError
from thalweg.ops.linear import LINEAR, LinearDims
from thalweg.ops.registry import Resolver, Where, watching

PACKAGE = '''
"""A package to be counted."""
import asyncio

LIMIT = 3

def generate():
    for i in range(LIMIT):
        yield i

def total():
    return sum(generate())

async def wait():
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return busy()

def busy():
    return sum([i * i for i in range(5000)])

def fail():
    raise ValueError

def again(n):
    return again(n - 1) if n else busy()

def keep(store):
    store.append(bytearray(100_000))

def drop():
    return len(bytearray(300_000))

class Thing:
    """It has a method."""

    size: int = 1

    def method(self):
        # a comment
        return busy()
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    folder = tmp_path / "counted"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "inner" / "__init__.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("counted.inner")
    for name in [name for name in sys.modules if name.partition(".")[0] == "counted"]:
        del sys.modules[name]


def count(package: ModuleType, kind: Any, run: Any) -> Hooks:
    hooks = Hooks(Path(str(package.__file__)).parents[1], kind)
    before = sys.getprofile()
    hooks.install()
    try:
        with hooks.counting("phase"):
            run(hooks)
        run(hooks)  # is in no phase
    finally:
        hooks.remove()
        sys.setprofile(before)
    return hooks


def test_calls_are_counted_once_however_often_they_wait(package: ModuleType) -> None:
    def run(hooks: Hooks) -> None:
        package.total()
        asyncio.run(package.wait())
        package.again(4)
        with pytest.raises(ValueError):  # noqa: PT011
            package.fail()
        thread = threading.Thread(target=package.again, args=(1,))
        thread.start()
        thread.join()
        hooks.op("an op", package.again)(1)

    hooks = count(package, "time", run)
    calls = {name.partition(":")[2]: f.calls for name, f in hooks.functions["phase"].items()}
    assert calls == {"total": 1, "generate": 1, "wait": 1, "again": 5 + 2 + 2, "busy": 4, "fail": 1}
    assert {name: f.calls for name, f in hooks.ops["phase"].items()} == {"an op": 1}
    assert list(hooks.functions) == ["phase"]


def test_time_is_ones_own_or_with_what_is_called(package: ModuleType) -> None:
    hooks = count(package, "time", lambda _: [package.again(3) for _ in range(20)])
    again, busy = (hooks.functions["phase"][f"counted.inner:{name}"] for name in ("again", "busy"))
    assert (again.calls, busy.calls) == (80, 20)
    assert busy.self_ns == busy.total_ns > 0
    assert again.total_ns == again.self_ns + busy.total_ns  # recursion counts once
    assert again.self_ns < busy.self_ns


def test_memory_is_kept_or_dropped(package: ModuleType) -> None:
    store: list[bytearray] = []

    def run(_: Hooks) -> None:
        package.keep(store)
        package.drop()

    hooks = count(package, "memory", run)
    keep, drop = (hooks.functions["phase"][f"counted.inner:{name}"] for name in ("keep", "drop"))
    assert 100_000 <= keep.kept_bytes < 110_000
    assert 100_000 <= keep.peak_bytes < 110_000
    assert drop.kept_bytes < 10_000
    assert 300_000 <= drop.peak_bytes < 310_000


def test_an_op_is_watched_only_while_asked_for() -> None:
    seen: list[str] = []

    def watch(name: str, function: Any) -> Any:
        seen.append(name)
        return function

    where, dims = Where("cpu", "float32"), LinearDims(D=3, O=2)
    plain = Resolver().resolve(LINEAR, where, dims)
    with watching(watch):
        assert Resolver().resolve(LINEAR, where, dims) is plain
    Resolver().resolve(LINEAR, where, dims)
    assert seen == ["linear [reference] D=3 O=2"]


def test_sources_change_with_what_a_function_does(package: ModuleType) -> None:
    file = Path(str(package.__file__))
    root = file.parents[1]
    before = sources(root)
    assert {n.partition(":")[2] for n in before if n.startswith("counted.inner:")} >= {
        "<module>", "generate", "Thing", "Thing.method", "wait"
    }  # fmt: skip

    def changed(*replacements: tuple[str, str]) -> set[str]:
        text = PACKAGE
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        file.write_text(text)
        after = sources(root)
        names = {**before, **after}
        return {n.partition(":")[2] for n in names if before.get(n) != after.get(n)}

    assert changed(("# a comment", "# another"), ("It has a method.", "Yes."), ("def drop", "\n\ndef drop")) == set()
    assert changed(("n - 1", "n - 2")) == {"again"}
    assert changed(("LIMIT = 3", "LIMIT = 4")) == {"<module>"}
    assert changed(("size: int = 1", "size: int = 2")) == {"Thing"}
    assert changed(("        return busy()\n", "        return busy() + 1\n")) == {"Thing.method"}
    (root / "kernel.cu").write_text("void f();")
    assert set(sources(root)) - set(before) == {"counted/kernel.cu"}


def test_energy_is_read_where_there_are_counters(tmp_path: Path) -> None:
    package, core = tmp_path / "intel-rapl:0", tmp_path / "intel-rapl:0:0"
    for folder, name in ((package, "package-0"), (core, "core")):
        folder.mkdir()
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text("9000000\n")
        (folder / "energy_uj").write_text("8000000\n")
    used: dict[str, float] = {}
    energy = Energy(tmp_path)
    with energy.counting(used):
        (package / "energy_uj").write_text("8500000\n")
    with energy.counting(used):
        (package / "energy_uj").write_text("1000000\n")  # it began again from 0
    assert {n: v for n, v in used.items() if "rapl" in n} == {"rapl package-0": pytest.approx(0.5 + 1.5)}
    assert not [n for n in Energy(tmp_path / "none")._counters if "rapl" in n]


def test_runs_are_merged_per_unit_of_their_phase() -> None:
    def run(ns: int, size: int) -> dict[str, Any]:
        phase = {"cpu_ms": ns / 1e6, "wall_ms": 2.0, "joules": None, "unit": "step", "count": 4}
        row = {"calls": 8, "total_ns": 2 * ns, "self_ns": ns, "kept_bytes": 4 * size, "peak_bytes": size}
        return {"phases": {"decode": phase}, "functions": {"p:f": {"decode": row}}, "ops": None}

    merged = merge([run(4000, 0), run(8000, 0)], [run(0, 10)])
    assert merged["ops"] is None
    assert merged["phases"]["decode"]["joules"] == "not measured"
    assert merged["functions"]["p:f"]["decode"] == {
        "calls": [2, 2],
        "self_us": [1, 2],
        "total_us": [2, 4],
        "kept_bytes": [10],
        "peak_bytes": [10],
    }


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


def test_what_is_nothing_of_its_phase_is_not_told() -> None:
    a, b = made_up(), made_up()
    b["functions"]["p.a:old"] = {"decode": row(0.05)}  # five times as slow
    assert compare(a, b).entries == []


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
    assert "B is no file of thalweg bench functions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--report r.md", "--report is given and --base is not"),
        ("--save no/such/a.json", "--save is 'no/such/a.json'"),
        ("--base no-such-commit", "git rev-parse no-such-commit"),
        ("--base HEAD --repository /", "git rev-parse"),
    ],
)
def test_a_mistake_is_one_line(options: str, named: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "functions", *options.split()]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert named in err
