"""The cores that a process may use, as Linux tells them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from thalweg.assembly.cores import usable_cores


@pytest.fixture(autouse=True)
def _sixteen_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def two_threads_per_core(root: Path) -> None:
    for cpu in range(16):
        topology = f"sys/devices/system/cpu/cpu{cpu}/topology"
        write(root, f"{topology}/physical_package_id", f"{cpu % 8 // 4}\n")
        write(root, f"{topology}/core_id", f"{cpu % 4}\n")


def test_threads_of_one_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cores(tmp_path) == 16
    two_threads_per_core(tmp_path)
    assert usable_cores(tmp_path) == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 8})
    assert usable_cores(tmp_path) == 2


@pytest.mark.parametrize(
    ("group", "files", "cores"),
    [
        ("0::/a/b", {"a/b/cpu.max": "150000 100000", "a/cpu.max": "max 100000"}, 2),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "max 100000"}, 16),
        ("0::/", {"cpu.max": "nonsense"}, 16),
        ("5:memory:/m\n4:cpu,cpuacct:/d", {"cpu/d/cpu.cfs_quota_us": "400000", "cpu/d/cpu.cfs_period_us": "100000"}, 4),
        ("4:cpu,cpuacct:/d", {"cpu/d/cpu.cfs_quota_us": "-1", "cpu/d/cpu.cfs_period_us": "100000"}, 16),
        # As a container sees it: its own group is the mount's root, whatever its path outside.
        ("0::/../outside", {"cpu.max": "200000 100000"}, 2),
    ],
)
def test_control_groups_limit_them(tmp_path: Path, group: str, files: dict[str, str], cores: int) -> None:
    write(tmp_path, "proc/self/cgroup", group + "\n")
    for name, text in files.items():
        write(tmp_path, f"sys/fs/cgroup/{name}", text + "\n")
    assert usable_cores(tmp_path) == cores


def test_this_machine_has_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
