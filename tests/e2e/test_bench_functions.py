"""`thalweg bench functions` and `make perf-report`, with the real workload."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from statistics import median
from typing import Any

import pytest

import thalweg
from thalweg.cli import main

SRC = Path(thalweg.__file__).parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def check_figures(figures: dict[str, Any]) -> None:
    functions, phases = figures["functions"], figures["phases"]
    assert list(phases) == ["import", "load", "prefill", "decode", "grammar", "http"]
    # In C++ where there is a compiler.
    (decode,) = functions.keys() & {
        "thalweg.ops.delta.mixer_cpp:kda_mixer_decode",
        "thalweg.ops.delta.kda.reference:kda_decode",
    }
    (prefill,) = functions.keys() & {
        "thalweg.ops.delta.prefill_cpp:kda_mixer_prefill",
        "thalweg.ops.delta.kda.reference:kda_prefill",
    }
    for name, (phase, calls) in {
        "thalweg.runner.step:ModelRunner.launch": ("prefill", 1),
        "thalweg.models.decoder:Decoder.forward": ("decode", 1),
        prefill: ("prefill", 4),
        decode: ("decode", 4),
    }.items():
        row = functions[name][phase]
        assert row["calls"] == [calls] * 2
        assert all(0 < own <= whole for own, whole in zip(row["self_us"], row["total_us"], strict=True))
        assert min(row["peak_bytes"]) > 0
    ops = {name.split()[0]: phases for name, phases in figures["ops"].items()}
    assert ops["kda_mixer_decode"]["decode"]["calls"] == [4, 4]
    assert "prefill" not in ops["kda_mixer_decode"]
    assert set(functions["thalweg.sampling.grammars:Grammars._compile"]) == {"grammar"}
    assert set(functions["thalweg.weights.safetensors:<module>"]) <= {"import", "load"}
    assert any(name.startswith("thalweg.server.chat:") and "http" in f for name, f in functions.items())
    # Functions make up what a phase of one thread costs.
    for phase in ("prefill", "decode"):
        of_all = sum(median(f[phase]["self_us"]) for f in functions.values() if phase in f) * phases[phase]["count"]
        assert 0.5 < of_all / 1e3 / median(phases[phase]["cpu_ms"]) < 1.1


def test_report_of_two_commits(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.com")
        done = subprocess.run(["git", "-C", str(tmp_path), *identity, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    package = tmp_path / "src" / "thalweg"
    shutil.copytree(SRC / "thalweg", package, ignore=shutil.ignore_patterns("__pycache__"))
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "before")
    slots = package / "cache" / "slots.py"
    slots.write_text(slots.read_text() + "\n\ndef never_called() -> None:\n    pass\n")
    scheduler = package / "scheduler" / "scheduler.py"
    text = scheduler.read_text()
    begin = "    def schedule(self) -> StepPlan | None:\n"
    assert text.count(begin) == 1
    head, tail = text.split(begin)
    docstring, rest = tail.split('"""\n', 1) if tail.lstrip().startswith('"""') else ("", tail)
    docstring += '"""\n' if docstring else ""
    scheduler.write_text(f"{head}{begin}{docstring}        sum(range(100_000))\n{rest}")
    git("commit", "-qam", "after")
    report, file = tmp_path / "report.md", tmp_path / "B.json"
    line = ["bench", "functions", "--quick", "--base", "HEAD~1", "--repository", str(tmp_path)]
    assert main([*line, "--report", str(report), "--save", str(file)]) == 0
    out, err = capfd.readouterr()
    assert "time run 1 of 3" in err
    check_figures(json.loads(file.read_text()))
    assert report.read_text() == out
    assert f"{git('rev-parse', '--short', 'HEAD~1')} and {git('rev-parse', '--short', 'HEAD')}" in out
    assert "1 modified, 1 added, 0 removed" in out
    (modified,) = [r for r in out.splitlines() if r.startswith("| `thalweg.scheduler.scheduler:Scheduler.schedule`")]
    assert "hot path" in modified
    assert "decode: slower" in modified
    assert "Not called by the workload: `thalweg.cache.slots:never_called`\n" in out
    assert git("worktree", "list").count("\n") == 0
    assert git("status", "--porcelain", "--untracked-files=no") == ""

    # Of one version alone the figures are printed.
    figures = json.loads(file.read_text())
    monkeypatch.setattr("thalweg.bench.functions.record.record", lambda *_: [figures])
    assert main(["bench", "functions", "--quick"]) == 0
    out = capfd.readouterr().out
    assert "prefill: 1 step, CPU" in out
    assert "share of decode" in out
