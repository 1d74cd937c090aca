"""Runs the workload several times, each in a fresh process, and puts the figures of all runs into one file."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thalweg.bench.functions.sources import sources
from thalweg.bench.machine import describe_machine
from thalweg.config import env
from thalweg.config.model_source import BUNDLED
from thalweg.errors import ConfigError

HERE = Path(__file__).parent
TIME_RUNS, MEMORY_RUNS, QUICK_RUNS = 5, 2, 2
# The files of this folder run with the package that PYTHONPATH names, which may be another version of it.
_START = """
import importlib.util, runpy, sys
import thalweg.bench
folder = sys.argv[1]
where = importlib.util.spec_from_file_location(
    "thalweg.bench.functions", folder + "/__init__.py", submodule_search_locations=[folder])
module = sys.modules[where.name] = importlib.util.module_from_spec(where)
where.loader.exec_module(module)
sys.argv[:] = sys.argv[1:]
runpy.run_module("thalweg.bench.functions.worker", run_name="__main__")
"""


@dataclass(frozen=True, slots=True)
class Version:
    """A package's source folder (the one that holds thalweg/), and what to call it."""

    src: Path
    name: str


def this_version() -> Version:
    src = HERE.parents[2]
    return Version(src, "this version")


def record(
    versions: Sequence[Version], model: str | None, quick: bool, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """What `thalweg bench functions --save` writes, of each version. They take turns, so that what the machine does
    meanwhile falls on all of them. Raises ConfigError with a worker's last words if one fails."""
    times = QUICK_RUNS if quick else TIME_RUNS
    model = None if model is None else str(Path(model).expanduser().resolve())
    # Memory is nearly the same every time, and tracing it makes everything several times slower.
    plan = [("time", quick)] * times + [("memory", True)] * (1 if quick else MEMORY_RUNS)
    runs: list[dict[str, list[dict[str, Any]]]] = [{"time": [], "memory": []} for _ in versions]
    for i, (kind, small) in enumerate(plan, start=1):
        for version, found in zip(versions, runs, strict=True):
            tell(f"{version.name}: {kind} run {i} of {len(plan)}")
            found[kind].append(_run(version, kind, model, small))
    machine = describe_machine() | {"torch_threads": 1}  # a worker's
    workload = hashlib.sha256((HERE / "workload.py").read_bytes()).hexdigest()[:16]
    name = None if model is None else Path(model).name
    facts = {"model": name or BUNDLED, "workload": workload, "quick": quick, "runs": times}
    return [
        {
            "kind": "functions",
            "engine": {"version": version.name, **facts},
            "machine": machine,
            **merge(each["time"], each["memory"]),
            "sources": sources(version.src / "thalweg"),
        }
        for version, each in zip(versions, runs, strict=True)
    ]


def _run(version: Version, kind: str, model: str | None, quick: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "figures.json")
        options = json.dumps({"kind": kind, "model": model, "quick": quick})
        command = [sys.executable, "-c", _START, str(HERE), options, str(file)]
        variables = env.for_child(PYTHONPATH=str(version.src), OMP_NUM_THREADS="1", PYTHONHASHSEED="0")
        done = subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode or not file.exists():
            words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise ConfigError(f"the workload does not run with {version.name} ({version.src}): {words[-1]}")
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def merge(times: Sequence[Mapping[str, Any]], memory: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Phases, functions and ops of all runs. Each figure is a list with a number for each run: of a phase in all, and
    of a function or op per unit of its phase (a step, a request): calls, self_us, total_us; kept_bytes; peak_bytes is
    that of one call."""
    phases = {
        name: {
            "unit": phase["unit"],
            "count": phase["count"],
            "cpu_ms": [run["phases"][name]["cpu_ms"] for run in times],
            "wall_ms": [run["phases"][name]["wall_ms"] for run in times],
            "joules": _joules([run["phases"][name]["joules"] for run in times]),
        }
        for name, phase in times[0]["phases"].items()
    }
    return {
        "phases": phases,
        "functions": _merge("functions", times, memory),
        "ops": None if times[0]["ops"] is None else _merge("ops", times, memory),
    }


def _joules(runs: list[dict[str, float] | None]) -> dict[str, list[float]] | str:
    if any(run is None for run in runs):
        return "not measured"
    return {name: [run[name] for run in runs if run is not None] for name in runs[0] or {}}


def _merge(table: str, times: Sequence[Mapping[str, Any]], memory: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    figures: dict[str, tuple[str, float, bool]] = {  # of a run's figures: name, divided by, whether per unit too
        "calls": ("calls", 1, True),
        "self_us": ("self_ns", 1e3, True),
        "total_us": ("total_ns", 1e3, True),
    }
    bytes_of: dict[str, tuple[str, float, bool]] = {
        "kept_bytes": ("kept_bytes", 1, True),
        "peak_bytes": ("peak_bytes", 1, False),
    }
    for runs, wanted in ((times, figures), (memory, bytes_of)):
        for name in {name: None for run in runs for name in run[table]}:
            for phase in runs[0]["phases"]:
                rows = [run[table].get(name, {}).get(phase) for run in runs]
                if not any(rows):
                    continue
                into = found.setdefault(name, {}).setdefault(phase, {})
                for figure, (key, divisor, per_unit) in wanted.items():
                    into[figure] = [
                        round(
                            0.0
                            if row is None
                            else row[key] / divisor / (run["phases"][phase]["count"] if per_unit else 1),
                            4,
                        )
                        for row, run in zip(rows, runs, strict=True)
                    ]
    return found
