"""Two files of `thalweg bench functions` side by side: what was changed, what moved, and where that counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Any

import msgspec

from thalweg.errors import ConfigError

HOT = ("prefill", "decode")
REQUEST = ("grammar", "http")
LEAST_SHARE = 0.001  # of its phase's time that a change must be, to be told of
LEAST_CHANGE = 0.05  # of the figure itself
LEAST_BYTES = 1024  # per unit of the phase; while modules are imported, much depends on which came first
SIGMAS = 3.0
Figures = Mapping[str, Mapping[str, list[float]]]  # by phase, then figure
_Runs = Annotated[list[float], msgspec.Meta(min_length=1)]
_Table = dict[str, dict[str, dict[str, _Runs]]]


class _Phase(msgspec.Struct):
    unit: str
    count: int
    cpu_ms: _Runs
    joules: dict[str, _Runs] | str


class _File(msgspec.Struct):
    """What --save writes, as far as a comparison reads it."""

    engine: dict[str, Any]
    machine: dict[str, Any]
    phases: dict[str, _Phase]
    functions: _Table
    ops: _Table | None
    sources: dict[str, str]


@dataclass(frozen=True, slots=True)
class Moved:
    """One figure of a function or op in one phase, medians of A's and B's runs. `delta_share` is what the change is of
    the phase's time (of A); None for bytes."""

    name: str
    phase: str
    figure: str
    a: float
    b: float
    delta_share: float | None

    @property
    def slower_by(self) -> float:
        """Percent; negative if it got faster."""
        return 100 * (self.b / self.a - 1) if self.a else float("inf")


@dataclass(frozen=True, slots=True)
class Entry:
    """A function or op: `share` of each phase's time in A and B, microseconds per call in A and B; None where it has
    none. `was` is its name in A, if it was renamed or moved."""

    name: str
    verdict: str
    share: dict[str, tuple[float | None, float | None]]
    us_per_call: dict[str, tuple[float | None, float | None]]
    moved: tuple[Moved, ...]
    was: str | None = None


@dataclass(frozen=True, slots=True)
class FunctionsComparison:
    modified: list[Entry]
    added: list[Entry]
    removed: list[Entry]
    renamed: list[Entry]
    moved: list[Entry]  # beyond the spread though their source is the same
    ops: list[Entry] | None  # moved, added or removed; None: a version was too old to be asked
    unchanged: int  # functions of which there is nothing to say
    phases: dict[str, tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]]
    differs: list[tuple[str, str, str]]

    @property
    def entries(self) -> list[Entry]:
        return [*self.modified, *self.added, *self.removed, *self.renamed, *self.moved, *(self.ops or ())]

    def slower_by(self, percent: float) -> list[Moved]:
        """Times that grew by more, in any phase."""
        every = (m for e in self.entries for m in e.moved)
        return [m for m in every if m.delta_share is not None and m.slower_by > percent]


def is_functions(file: Mapping[str, Any]) -> bool:
    return file.get("kind") == "functions"


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> FunctionsComparison:
    """Raises ConfigError for files without functions, or of different workloads."""
    for file, name in ((a, "A"), (b, "B")):
        if not is_functions(file):
            raise ConfigError(f"{name} is not a file of thalweg bench functions; expected one that --save wrote")
        try:
            msgspec.convert(file, _File)
        except msgspec.ValidationError as e:
            raise ConfigError(f"{name} is not a file that thalweg bench functions --save wrote: {e}") from None
    for fact in ("workload", "quick", "model"):
        one, other = a["engine"].get(fact), b["engine"].get(fact)
        if one != other:
            raise ConfigError(f"{fact} is {one} in A and {other} in B; expected two runs of the same workload")
    before, after = a["sources"], b["sources"]
    gone, new = [n for n in before if n not in after], [n for n in after if n not in before]
    was = _renamed({n: before[n] for n in gone}, {n: after[n] for n in new})
    pair = _Pair(a, b, "functions")
    lists: dict[str, list[Entry]] = {k: [] for k in ("modified", "added", "removed", "renamed", "moved")}
    unchanged = 0
    for name in after:
        entry = pair.entry(name, was.get(name, name))
        if name in was:
            lists["renamed"].append(entry)
        elif name not in before:
            lists["added"].append(entry)
        elif before[name] != after[name]:
            lists["modified"].append(entry)
        elif entry.moved:
            lists["moved"].append(entry)
        else:
            unchanged += 1
    lists["removed"] = [pair.entry(name, name) for name in gone if name not in was.values()]
    ops: list[Entry] | None = None
    if isinstance(a.get("ops"), dict) and isinstance(b.get("ops"), dict):
        of_ops = _Pair(a, b, "ops")
        ops = [of_ops.entry(n, n) for n in {**a["ops"], **b["ops"]}]
        ops = [e for e in ops if e.moved or e.name not in a["ops"] or e.name not in b["ops"]]
    phases = {n: (a["phases"].get(n), b["phases"].get(n)) for n in {**a["phases"], **b["phases"]}}
    machines = a.get("machine") or {}, b.get("machine") or {}
    differs = [
        (n, str(machines[0].get(n, "-")), str(machines[1].get(n, "-")))
        for n in {**machines[0], **machines[1]}
        if machines[0].get(n) != machines[1].get(n)
    ]
    for entries in (*lists.values(), ops or []):
        entries.sort(key=lambda e: (-_weight(e), e.name))
    return FunctionsComparison(**lists, ops=ops, unchanged=unchanged, phases=phases, differs=differs)


def verdict(phases: Mapping[str, Any]) -> str:
    """Where a function with these phases counts."""
    if any(p in HOT for p in phases):
        return "hot path"
    if any(p in REQUEST for p in phases):
        return "per request"
    return "initialisation only" if phases else "not called by the workload"


def beyond_spread(a: list[float], b: list[float]) -> bool:
    """Whether least..greatest do not overlap, and the medians differ by more than SIGMAS robust standard deviations
    (1.4826 times the median absolute deviation) and LEAST_CHANGE of A's."""
    if not a or not b or not (min(b) > max(a) or max(b) < min(a)):
        return False
    difference, sigma = abs(median(b) - median(a)), 1.4826 * (_mad(a) ** 2 + _mad(b) ** 2) ** 0.5
    return difference > SIGMAS * sigma and difference > LEAST_CHANGE * abs(median(a))


def _mad(values: list[float]) -> float:
    middle = median(values)
    return median(abs(v - middle) for v in values)


def _renamed(gone: dict[str, str], new: dict[str, str]) -> dict[str, str]:
    """New names and the old ones of what has the same source and moved or was renamed; only where there is no doubt."""
    one, other = list(gone.values()), list(new.values())
    old = {h: n for n, h in gone.items() if one.count(h) == 1}
    return {n: old[h] for n, h in new.items() if other.count(h) == 1 and h in old and ":<module>" not in n}


def _weight(entry: Entry) -> float:
    """What is looked at first: changes of time by their share, then shares of prefill and decode."""
    changes = max((abs(m.delta_share) for m in entry.moved if m.delta_share is not None), default=0.0)
    return 10 * changes + max((s or 0.0 for p in HOT for s in entry.share.get(p, ())), default=0.0)


class _Pair:
    """Figures of both files' functions or ops."""

    def __init__(self, a: Mapping[str, Any], b: Mapping[str, Any], table: str) -> None:
        self._a, self._b = a[table], b[table]
        # A share is of all time within the package's functions.
        self._all = [_sums(file["functions"]) for file in (a, b)]

    def entry(self, name: str, was: str) -> Entry:
        a: Figures = self._a.get(was, {})
        b: Figures = self._b.get(name, {})
        phases = {**a, **b}
        share: dict[str, tuple[float | None, float | None]] = {}
        per_call: dict[str, tuple[float | None, float | None]] = {}
        for phase in phases:
            sides = [f.get(phase, {}) for f in (a, b)]
            one, other = (_share(s, all_.get(phase, 0.0)) for s, all_ in zip(sides, self._all, strict=True))
            share[phase] = one, other
            one, other = (_per_call(s) for s in sides)
            per_call[phase] = one, other
        moved = [
            m for phase in phases if phase in a and phase in b for m in self._moved(name, phase, a[phase], b[phase])
        ]
        return Entry(name, verdict(b or a), share, per_call, tuple(moved), was if was != name else None)

    def _moved(self, name: str, phase: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Moved]:
        found = []
        for figure in ("self_us", "kept_bytes", "peak_bytes"):
            one, other = a.get(figure, []), b.get(figure, [])
            if not beyond_spread(one, other):
                continue
            before, after = median(one), median(other)
            if figure == "self_us":
                total = self._all[0].get(phase, 0.0)
                part = (after - before) / total if total else 0.0
                if abs(part) >= LEAST_SHARE:
                    found.append(Moved(name, phase, figure, before, after, part))
            elif phase in (*HOT, *REQUEST) and abs(after - before) >= LEAST_BYTES:
                found.append(Moved(name, phase, figure, before, after, None))
        return found


def _sums(functions: Mapping[str, Figures]) -> dict[str, float]:
    """Microseconds per unit of each phase in all functions."""
    sums: dict[str, float] = {}
    for phases in functions.values():
        for phase, figures in phases.items():
            sums[phase] = sums.get(phase, 0.0) + _median(figures, "self_us")
    return sums


def _median(figures: Mapping[str, list[float]], name: str) -> float:
    values = figures.get(name)
    return median(values) if values else 0.0


def _share(figures: Mapping[str, list[float]], total: float) -> float | None:
    return _median(figures, "self_us") / total if figures.get("self_us") and total else None


def _per_call(figures: Mapping[str, list[float]]) -> float | None:
    calls = _median(figures, "calls")
    return _median(figures, "total_us") / calls if calls else None
