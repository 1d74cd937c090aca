"""What a trace says: time by kernel, launches by step and layer, gaps where a device idles, host time by module."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from msgspec.structs import replace

from thalweg.profiler.chrome import DEVICE_WORK, Slice
from thalweg.tracing import STEP

LARGEST_GAPS = 10
_MODULE = re.compile(r"nn\.Module: (.+?)(?:_\d+)?")


@dataclass(frozen=True, slots=True)
class OpTime:
    """Microseconds of all calls under one name. self_us leaves out ops inside it; the same as total on a device."""

    name: str
    count: int
    total_us: float
    self_us: float


@dataclass(frozen=True, slots=True)
class ModuleTime:
    """Host microseconds of all calls of a module class; self_us leaves out modules inside it.

    `launches` is the device's kernels and copies that came from it, None where the trace has no device; `ops` is torch
    ops called in it, those inside other ops not counted.
    """

    name: str
    calls: int
    total_us: float
    self_us: float
    launches: int | None
    ops: int


@dataclass(frozen=True, slots=True)
class Gap:
    """A time in which the device did nothing: its begin, after the trace's, the work before it and after it."""

    at_us: float
    us: float
    after: str
    before: str


@dataclass(frozen=True, slots=True)
class DeviceIdle:
    """A device between its first and its last piece of work; the gaps are the largest ones of `num_gaps`."""

    device: str
    busy_us: float
    idle_us: float
    num_gaps: int
    gaps: list[Gap]

    @property
    def share(self) -> float:
        whole = self.busy_us + self.idle_us
        return self.idle_us / whole if whole else 0.0


@dataclass(frozen=True, slots=True)
class Summary:
    """All of it. `ops` are kernels and copies of the devices, or torch's ops by self time where there is no device.

    `launches` counts what the devices did and `launch_calls` the host's calls that caused it: one CUDA graph is one
    call. Both are None without a device; `steps` is 0 for a trace without `step` spans.
    """

    steps: int
    host_ops: int
    launches: int | None
    launch_calls: int | None
    ops: list[OpTime]
    devices: list[DeviceIdle]
    modules: list[ModuleTime]
    spans: list[OpTime]


def by_rank(slices: Sequence[Slice]) -> dict[str, list[Slice]]:
    """The slices of each rank by its name, as if it were a trace of its own; empty for a trace without ranks."""
    ranks = {s.process for s in slices if s.process.startswith("rank ")}
    found: dict[str, list[Slice]] = {}
    for rank in sorted(ranks, key=lambda name: int(name.split()[1])):
        mine = [s for s in slices if s.process == rank]
        ids = {s.id: i for i, s in enumerate(mine)} | {-1: -1}
        found[rank] = [replace(s, id=i, parent_id=ids[s.parent_id]) for i, s in enumerate(mine)]
    return found


def summarize(slices: Sequence[Slice]) -> Summary:
    """`slices` as read_trace gives them."""
    on_device = [s for s in slices if s.category in DEVICE_WORK]
    host_ops = [s for s in slices if s.category == "cpu_op" and not _inside(slices, s, "cpu_op")]
    spans = [s for s in slices if s.category == "user_annotation" and not s.name.startswith("nn.Module: ")]
    if on_device:
        ops = _times(on_device, {})
    else:
        ops = _times([s for s in slices if s.category == "cpu_op"], _covered(slices, "cpu_op"))
    return Summary(
        steps=sum(1 for s in spans if s.name == STEP),
        host_ops=len(host_ops),
        launches=len(on_device) if on_device else None,
        launch_calls=len({s.correlation for s in on_device if s.correlation >= 0}) if on_device else None,
        ops=ops,
        devices=[_idle(name, slices[0].ts, work) for name, work in _by_process(on_device)],
        modules=_modules(slices, on_device, host_ops),
        spans=_times(spans, {}),
    )


def _parents(slices: Sequence[Slice], s: Slice) -> Iterator[Slice]:
    while s.parent_id >= 0:
        s = slices[s.parent_id]
        yield s


def _inside(slices: Sequence[Slice], s: Slice, category: str) -> bool:
    return any(p.category == category for p in _parents(slices, s))


def _covered(slices: Sequence[Slice], category: str) -> dict[int, int]:
    """Nanoseconds of each slice of the category that its nearest descendants of the same category take."""
    covered: defaultdict[int, int] = defaultdict(int)
    for s in slices:
        if s.category == category:
            above = next((p for p in _parents(slices, s) if p.category == category), None)
            if above is not None:
                covered[above.id] += s.dur
    return covered


def _times(found: Sequence[Slice], covered: dict[int, int]) -> list[OpTime]:
    """By name, the longest self time first."""
    sums: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for s in found:
        entry = sums[s.name]
        entry[0] += 1
        entry[1] += s.dur
        entry[2] += s.dur - covered.get(s.id, 0)
    rows = [OpTime(name, n, total / 1e3, own / 1e3) for name, (n, total, own) in sums.items()]
    return sorted(rows, key=lambda row: -row.self_us)


def _module(s: Slice) -> str | None:
    """The class of a module's slice on the host, as this project and torch's own tracer name it."""
    if s.category == "gpu_user_annotation" or (match := _MODULE.fullmatch(s.name)) is None:
        return None
    return match[1]


def _modules(slices: Sequence[Slice], on_device: Sequence[Slice], host_ops: Sequence[Slice]) -> list[ModuleTime]:
    modules = {s.id: name for s in slices if (name := _module(s)) is not None}
    calls: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for i, name in modules.items():
        around = [p.id for p in _parents(slices, slices[i]) if p.id in modules]
        entry = calls[name]
        entry[0] += 1
        entry[2] += slices[i].dur
        if all(modules[p] != name for p in around):
            entry[1] += slices[i].dur
        if around:
            calls[modules[around[0]]][2] -= slices[i].dur

    def count(found: Sequence[Slice]) -> dict[str, int]:
        counts: defaultdict[str, int] = defaultdict(int)
        for s in found:
            for name in {modules[p.id] for p in _parents(slices, s) if p.id in modules}:
                counts[name] += 1
        return counts

    callers = {s.correlation: s for s in slices if s.correlation >= 0 and s.category in ("cuda_runtime", "cuda_driver")}
    launches = count([callers[s.correlation] for s in on_device if s.correlation in callers])
    ops = count(host_ops)
    rows = [
        ModuleTime(name, n, total / 1e3, own / 1e3, launches.get(name, 0) if on_device else None, ops.get(name, 0))
        for name, (n, total, own) in calls.items()
    ]
    return sorted(rows, key=lambda row: -row.total_us)


def _by_process(on_device: Sequence[Slice]) -> list[tuple[str, list[Slice]]]:
    """The devices' work; torch's traces make each device a process."""
    found: defaultdict[str, list[Slice]] = defaultdict(list)
    for s in on_device:
        found[s.process].append(s)
    return sorted(found.items())


def _idle(device: str, begin: int, work: Sequence[Slice]) -> DeviceIdle:
    """`work` by begin, on all streams of the device."""
    last, gaps, busy = work[0], [], work[0].dur  # last: the piece that ended last so far
    for _, s in pairwise(work):
        if s.ts > last.end:
            gaps.append(Gap((last.end - begin) / 1e3, (s.ts - last.end) / 1e3, last.name, s.name))
        busy += max(0, s.end - max(s.ts, last.end))
        if s.end > last.end:
            last = s
    gaps.sort(key=lambda gap: -gap.us)
    return DeviceIdle(device, busy / 1e3, sum(g.us for g in gaps), len(gaps), gaps[:LARGEST_GAPS])
