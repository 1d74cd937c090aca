"""How many of the machine's cores this process may use."""

from __future__ import annotations

import os
from math import ceil
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """Physical cores that this process may run on, and no more than its control groups allow it the time of: 1 or more.

    Two threads of one core compute no more than one, and threads beyond a quota are stopped while others wait for them.
    Where the system does not tell (`root` has no sysfs), each processor counts as a core.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_core(root, cpu) for cpu in allowed}
    quotas = [quota for folder in _control_groups(root) if (quota := _quota(folder)) is not None]
    return max(1, min([len(cores), *(ceil(quota) for quota in quotas)]))


def _core(root: Path, cpu: int) -> tuple[int, ...]:
    """What distinguishes the processor's core from others."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    try:
        package, core = (int((topology / name).read_text()) for name in ("physical_package_id", "core_id"))
    except (OSError, ValueError):
        return (cpu,)
    return (package, core)


def _control_groups(root: Path) -> list[Path]:
    """Folders of this process's groups that may limit its time, from its own up: version 2, then version 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        own = mount / path.lstrip("/")
        found += [folder for folder in (own, *own.parents) if folder == mount or mount in folder.parents]
    return found


def _quota(folder: Path) -> float | None:
    """Processors' worth of time that the group has, None if there is no limit."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((folder / name).read_text() for name in names).split()
            if quota != "max" and float(quota) > 0:
                return float(quota) / float(period)
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return None
