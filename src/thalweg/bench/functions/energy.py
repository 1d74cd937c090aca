"""Counters of energy that the machine has: RAPL's of processor packages, NVML's of GPUs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class Energy:
    """Joules between two looks, by counter: "rapl package-0", "nvml 0". Empty where the machine counts none, or does
    not let this user read them. A GPU's are all that it drew, whoever used it."""

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self._counters = {**dict(_rapl(powercap)), **dict(_nvml())}

    @contextmanager
    def counting(self, into: dict[str, float]) -> Iterator[None]:
        """Add what is used until the context ends."""
        before = {name: read() for name, (read, _) in self._counters.items()}
        try:
            yield
        finally:
            for name, (read, wraps_at) in self._counters.items():
                used = read() - before[name]
                into[name] = into.get(name, 0.0) + (used + wraps_at if used < 0 else used)


_Counter = tuple[Callable[[], float], float]  # joules, and where it begins again from 0


def _rapl(powercap: Path) -> Iterator[tuple[str, _Counter]]:
    for folder in sorted(powercap.glob("intel-rapl:*")):
        if folder.name.count(":") > 1:
            continue  # a part of a package, which the package counts too
        try:
            name, most = (folder / "name").read_text().strip(), int((folder / "max_energy_range_uj").read_text())
            int((folder / "energy_uj").read_text())  # root's alone on most systems
        except (OSError, ValueError):
            continue
        file = folder / "energy_uj"
        yield f"rapl {name}", (lambda file=file: int(file.read_text()) / 1e6, most / 1e6)  # type: ignore[misc]


def _nvml() -> Iterator[tuple[str, _Counter]]:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return
    count = ctypes.c_uint()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return
    for i in range(count.value):
        handle, joules = ctypes.c_void_p(), ctypes.c_ulonglong()

        def read(handle: ctypes.c_void_p = handle, value: ctypes.c_ulonglong = joules) -> float:
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(value))
            return value.value / 1e3

        if not nvml.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(handle)) and not (
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(joules))
        ):
            yield f"nvml {i}", (read, 0.0)
