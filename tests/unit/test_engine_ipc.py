"""Folders of sockets: which ones a start removes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from thalweg.engine.processes import ipc


@pytest.fixture(autouse=True)
def tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(ipc, "MAX_FOLDER_LENGTH", 1000)
    return tmp_path


def left(tmp: Path) -> list[str]:
    return sorted(path.name for path in tmp.iterdir())


def abandoned(tmp: Path, name: str = "a", *, locked: bool = True) -> Path:
    folder = tmp / f"{ipc.PREFIX}{name}"
    folder.mkdir()
    (folder / "engine").touch()
    if locked:
        (folder / "lock").touch()
    return folder


def test_a_folder_is_private_and_goes_when_it_is_told_to(tmp: Path) -> None:
    folder = ipc.SocketFolder()
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    (folder.path / "engine").touch()
    folder.cleanup()
    assert left(tmp) == []


def test_a_start_removes_what_dead_processes_left_and_nothing_else(tmp: Path) -> None:
    used = ipc.SocketFolder()
    abandoned(tmp)
    being_made = abandoned(tmp, "b", locked=False)
    (tmp / "thalweg-models").mkdir()
    kept = abandoned(tmp / "thalweg-models")
    (tmp / f"{ipc.PREFIX}link").symlink_to(kept)
    new = ipc.SocketFolder()
    names = [used.path.name, new.path.name, being_made.name, "thalweg-models", f"{ipc.PREFIX}link"]
    assert left(tmp) == sorted(names)
    assert kept.exists()
    os.utime(being_made, (0, 0))
    ipc.remove_stale()
    assert not being_made.exists()
    used.cleanup()
    new.cleanup()


def test_other_users_folders_are_left_alone(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = abandoned(tmp)
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    ipc.remove_stale()
    assert folder.exists()


def test_a_long_place_for_temporary_files_is_passed_over(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipc, "MAX_FOLDER_LENGTH", 1)
    folder = ipc.SocketFolder()
    assert folder.path.parent == Path("/tmp")
    assert left(tmp) == []
    folder.cleanup()
