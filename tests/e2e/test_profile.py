"""A window recorded from a real engine, and what is found in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from thalweg.cli import main
from thalweg.ops.registry import Where
from thalweg.ops.toolchain import cpu_build
from thalweg.profiler.chrome import Slice, read_trace
from thalweg.profiler.sql import query

CPP = cpu_build.why_not(Where("cpu", "float32"))  # None: this machine has a compiler
DUMMY = ["--load-format", "dummy", "--device", "cpu", "--cache-memory", "64MiB"]


def profile(file: Path, *args: str) -> list[Slice]:
    assert main(["profile", *DUMMY, "--output", str(file), *args]) == 0
    return read_trace(str(file))


def test_decode_steps(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "t.json.gz"
    slices = profile(file, "--steps", "3", "--batch-size", "2", "--input-len", "16")
    assert "3 x step of 2 decode rows\n" in capsys.readouterr().out

    steps = [s for s in slices if s.name == "step"]
    assert len(steps) == 3
    # Every part of a step, in it, on the thread that launches; planning on the one that plans.
    for name in ("build", "model", "sample"):
        assert [s.parent_id for s in slices if s.name == name] == [s.id for s in steps]
    planned = [s for s in slices if s.name in ("schedule", "update", "output")]
    assert {s.name for s in planned} == {"schedule", "update", "output"}
    assert {s.track for s in planned}.isdisjoint(s.track for s in steps)

    # The bundled model's layers, each once a step, under the model.
    layers = [s for s in slices if s.name.startswith("nn.Module: DecoderLayer_")]
    assert len(layers) == 3 * len({s.name for s in layers}) > 0
    assert all(slices[s.parent_id].name == "nn.Module: Decoder_0" for s in layers)
    product = "thalweg::linear" if CPP is None else "aten::mm"
    in_kda = (
        f"SELECT COUNT(*) FROM slice WHERE name = '{product}' AND id IN (SELECT s.id FROM slice s"
        " JOIN ancestor_slice(s.id) a ON a.name GLOB 'nn.Module: KimiDeltaAttention_*')"
    )
    [(inside,)] = query(slices, in_kda).rows
    assert 0 < inside < sum(1 for s in slices if s.name == product)

    # Both requests decode throughout the window. The two clocks are tied at one point, so its edges may differ a bit.
    requests = [s for s in slices if s.category == "request"]
    assert sorted(s.name for s in requests) == ["decode", "decode", "request profile-0", "request profile-1"]
    assert all(s.ts <= steps[0].end and s.end >= steps[-1].ts for s in requests)

    assert main(["trace", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["steps"], found["launches"], found["devices"]) == (3, None, [])
    kinds = {m["name"]: m for m in found["modules"]}
    assert kinds["Decoder"]["calls"] == 3
    assert kinds["KimiDeltaAttention"]["calls"] + kinds["MultiHeadLatentAttention"]["calls"] == len(layers)


def test_an_output_that_cannot_be_written_is_one_line(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "t.json").mkdir()
    assert main(["profile", *DUMMY, "--output", str(tmp_path / "t.json"), "--steps", "1", "--input-len", "4"]) == 2
    assert "which cannot be written: Is a directory\n" in capfd.readouterr().err


def test_prompts(tmp_path: Path) -> None:
    args = ("--steps", "2", "--batch-size", "2", "--input-len", "24", "--max-num-batched-tokens", "40", "--prefill")
    slices = profile(tmp_path / "t.json", *args)
    requests = {(s.track.partition(": ")[2], s.name) for s in slices if s.category == "request"}
    assert ("profile-0", "prompt") in requests
    assert ("profile-1", "prompt") in requests


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--output", "t.txt"], "--output is 't.txt'"),
        (["--output", "none/t.json"], "whose folder does not exist"),
        (["--steps", "40", "--input-len", "16", "--max-model-len", "48"], "of --steps 40"),
        (["--input-len", "100", "--max-model-len", "48"], "48"),
        (["--steps", "0"], "--steps"),
    ],
)
def test_mistakes_are_one_line(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["profile", *DUMMY, *args]) == 2
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert reason in line
    assert not list(tmp_path.iterdir())


def test_two_ranks_are_two_processes_of_one_trace(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "t.json.gz"
    slices = profile(file, "--steps", "2", "--batch-size", "2", "--input-len", "8", "-tp", "2")
    capsys.readouterr()
    steps = [(s.process, s.ts, s.end) for s in slices if s.name == "step"]
    assert [process for process, _, _ in sorted(steps)] == ["rank 0"] * 2 + ["rank 1"] * 2
    # The ranks meet in every layer's collective, so the same step of both lies at the same time.
    (_, begin, end), (_, other_begin, other_end) = sorted(steps)[::2]
    assert max(begin, other_begin) < min(end, other_end)
    assert {s.process for s in slices if "all_reduce" in s.name} == {"rank 0", "rank 1"}
    assert main(["trace", str(file), "--json"]) == 0
    ranks = json.loads(capsys.readouterr().out)["ranks"]
    assert [(name, found["steps"]) for name, found in ranks.items()] == [("rank 0", 2), ("rank 1", 2)]
    assert {m["name"]: m["calls"] for m in ranks["rank 1"]["modules"]}["Decoder"] == 2
    assert main(["trace", str(file)]) == 0
    assert "==== rank 1 ====" in capsys.readouterr().out
