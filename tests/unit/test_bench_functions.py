"""What `thalweg bench functions` counts and records."""

from __future__ import annotations

import asyncio
import importlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from thalweg.bench.functions.energy import Energy
from thalweg.bench.functions.hooks import Hooks
from thalweg.bench.functions.record import merge
from thalweg.bench.functions.sources import sources
from thalweg.cli import main
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
    resolver = Resolver({"linear": "reference"})
    plain = resolver.resolve(LINEAR, where, dims)
    with watching(watch):
        assert resolver.resolve(LINEAR, where, dims) is plain
    resolver.resolve(LINEAR, where, dims)
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
