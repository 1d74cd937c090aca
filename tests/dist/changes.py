"""Processes whose interpreters change a few calls as they start: ranks that stop or fail where a test wants it, so that
the others come as far as they do without them, ranks without each other's memory, and all ranks on one device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

UNMAPPED = ("thalweg.parallel.peers:_export", "refuses", "")  # ranks cannot map each other's memory, and NCCL does it
ON_ONE_DEVICE = ("thalweg.assembly.model:choose_device", "first", "")

# What an interpreter runs at its start. A thread waits until the process has imported what it changes. NCCL takes two
# processes on one device only if it believes that they are on different hosts.
_SITE = """
import os, sys, threading, time

changes, me = {changes}, sys.orig_argv[-1]
if any(make == "first" for _, make, _ in changes):
    os.environ.update(NCCL_HOSTID=me[-20:], NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1", NCCL_MNNVL_ENABLE="0")

def change(path, make):
    module, names = path.split(":")
    *owners, name = names.split(".")
    while True:
        owner = sys.modules.get(module)
        for each in owners:
            owner = getattr(owner, each, None)
        if hasattr(owner, name):
            break
        time.sleep(0.002)
    setattr(owner, name, make(getattr(owner, name)))

def hangs(call):
    def hanging(*args, **kwargs):
        if os.path.exists({armed!r}):
            open({there!r}, "w").close()
            time.sleep(600)
        return call(*args, **kwargs)
    return hanging

def fails(call):
    def failing(*args, **kwargs):
        if os.path.exists({armed!r}):
            raise ZeroDivisionError("a test wants it")
        return call(*args, **kwargs)
    return failing

def refuses(call):
    def refusing(*args):
        raise sys.modules["thalweg.parallel.peers"].NoPeerMemory("a test wants none")
    return refusing

def first(call):
    return lambda config, rank: call(config, 0)

for path, make, where in changes:
    if me.endswith(where):
        threading.Thread(target=change, args=(path, globals()[make]), daemon=True).start()
"""


class Changes:
    """`changes`: (module:name of a call, what becomes of it, the end of a process's last argument). One that "hangs"
    or "fails" does so once `arm` was called."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, changes: Sequence[tuple[str, str, str]]) -> None:
        self._armed, self._there = folder / "armed", folder / "there"
        site = _SITE.format(armed=str(self._armed), there=str(self._there), changes=list(changes))
        (folder / "sitecustomize.py").write_text(site)
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)

    def arm(self) -> None:
        self._armed.touch()

    @property
    def hangs(self) -> bool:
        """Whether a call does."""
        return self._there.exists()
