"""What a trace says: kernels, launches, gaps and modules, of traces whose answers are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.trace_files import annotation, kernel, launch, slice_, write
from thalweg.cli import main
from thalweg.profiler.chrome import Slice, read_trace
from thalweg.profiler.summary import Gap, OpTime, Summary, summarize


def summary(tmp_path: Path, events: list[dict]) -> Summary:
    slices: list[Slice] = read_trace(write(tmp_path / "t.json", events))
    return summarize(slices)


GPU = [
    annotation("step", 0, 100),
    annotation("nn.Module: Layer_0", 10, 40),
    annotation("nn.Module: Linear_0", 20, 10),
    slice_("aten::linear", 21, 8),
    slice_("aten::mm", 22, 6),
    launch(23, 1),
    annotation("nn.Module: Layer_1", 50, 20),
    launch(55, 2),
    annotation("step", 100, 50),
    launch(110, 3),
    kernel("gemm", 30, 10, 1),
    kernel("norm", 60, 5, 2),
    kernel("gemm", 62, 8, 3, stream=8),  # overlaps the one before, on another stream
    slice_("Memcpy DtoH", 100, 2, "gpu_memcpy", 0, 7, correlation=3),
    # Torch repeats annotations on the device's tracks; they are no work, and no second module.
    slice_("nn.Module: Layer_0", 30, 10, "gpu_user_annotation", 0, 7),
]


def test_device(tmp_path: Path) -> None:
    found = summary(tmp_path, GPU)
    assert found.steps == 2
    assert (found.launches, found.launch_calls) == (4, 3)
    assert found.ops == [
        OpTime("gemm", 2, 18.0, 18.0),
        OpTime("norm", 1, 5.0, 5.0),
        OpTime("Memcpy DtoH", 1, 2.0, 2.0),
    ]
    [device] = found.devices
    assert device.busy_us == 10 + 10 + 2
    assert device.idle_us == 20 + 30
    assert device.num_gaps == 2
    assert device.gaps == [Gap(70.0, 30.0, "gemm", "Memcpy DtoH"), Gap(40.0, 20.0, "gemm", "norm")]
    assert device.share == pytest.approx(50 / 72)


def test_modules(tmp_path: Path) -> None:
    layer, linear = summary(tmp_path, GPU).modules
    assert (layer.name, layer.calls, layer.total_us, layer.self_us) == ("Layer", 2, 60.0, 50.0)
    assert (layer.launches, layer.ops) == (2, 1)  # aten::mm is within aten::linear
    assert (linear.name, linear.calls, linear.launches, linear.ops) == ("Linear", 1, 1, 1)


def test_a_module_within_its_own_kind_counts_its_time_once(tmp_path: Path) -> None:
    events = [annotation("nn.Module: Block_0", 0, 10), annotation("nn.Module: Block_1", 2, 6)]
    [block] = summary(tmp_path, events).modules
    assert (block.calls, block.total_us, block.self_us) == (2, 10.0, 10.0)


def test_host_only(tmp_path: Path) -> None:
    events = [annotation("step", 0, 20), slice_("aten::linear", 1, 9), slice_("aten::mm", 2, 6)]
    found = summary(tmp_path, events)
    assert found.ops == [OpTime("aten::mm", 1, 6.0, 6.0), OpTime("aten::linear", 1, 9.0, 3.0)]
    assert (found.launches, found.launch_calls, found.devices) == (None, None, [])
    assert found.host_ops == 1
    assert found.spans == [OpTime("step", 1, 20.0, 20.0)]


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = write(tmp_path / "t.json", GPU)
    assert main(["trace", file]) == 0
    text = capsys.readouterr().out
    assert "on the device" in text
    assert "4 (2.0 a step)" in text
    assert "Device 0: busy 22.0 us, idle 50.0 us (69.4%) in 2 gaps" in text
    assert main(["trace", file, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ops"][0] == {"name": "gemm", "count": 2, "total_us": 18.0, "self_us": 18.0}
    assert found["devices"][0]["share"] == pytest.approx(50 / 72)
    assert main(["trace", str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
