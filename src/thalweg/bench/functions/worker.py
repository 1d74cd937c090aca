"""One run of the workload in a process of its own, as record.py starts it: OPTIONS (JSON) and FILE are its arguments.

The package that is imported is the one that is measured; this folder may be another version's (commits.py).
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import thalweg
from thalweg.bench.functions import workload
from thalweg.bench.functions.energy import Energy
from thalweg.bench.functions.hooks import Hooks


def measure(kind: Any, model: str | None, quick: bool) -> dict[str, Any]:
    """Figures by phase: calls, times and bytes of functions and ops, processor time, energy."""
    import torch  # before counting: another package's

    torch.set_num_threads(1)
    root = Path(thalweg.__file__).parent
    hooks, energy = Hooks(root, kind, leave_out=root / "bench" / "functions"), Energy()
    phases: dict[str, dict[str, Any]] = {}
    sizes = workload.QUICK if quick else workload.FULL

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        gc.collect()
        joules: dict[str, float] = {}
        with energy.counting(joules):
            cpu, wall = time.process_time(), time.perf_counter()
            with hooks.counting(name):
                yield
            cpu_ms, wall_ms = 1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)
        before = phases.get(name, {"cpu_ms": 0.0, "wall_ms": 0.0, "joules": None})
        phases[name] = {
            "cpu_ms": before["cpu_ms"] + cpu_ms,
            "wall_ms": before["wall_ms"] + wall_ms,
            "joules": {k: v + (before["joules"] or {}).get(k, 0.0) for k, v in joules.items()} or None,
        }

    hooks.install()
    try:
        with phase("import"):
            from thalweg.ops import registry

        watching = getattr(registry, "watching", None)
        if watching is None:  # an older version
            counts = workload.run(model, sizes, phase)
        else:
            with watching(hooks.op):
                counts = workload.run(model, sizes, phase)
    finally:
        hooks.remove()
    for name, count in counts.items():
        phases[name] |= {"unit": workload.PHASES[name], "count": count}
    return {
        "phases": phases,
        "functions": _plain(hooks.functions),
        "ops": None if watching is None else _plain(hooks.ops),
    }


def _plain(figures: dict[str, Any]) -> dict[str, dict[str, dict[str, int]]]:
    """By name, then phase."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for phase, by_name in figures.items():
        for name, each in by_name.items():
            found.setdefault(name, {})[phase] = asdict(each)
    return found


if __name__ == "__main__":
    options, file = sys.argv[1:]
    Path(file).write_text(json.dumps(measure(**json.loads(options))), encoding="utf-8")
