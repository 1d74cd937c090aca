"""A comparison as Markdown that is also readable as it stands: for a terminal, and for a change request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from thalweg.bench.functions.compare import HOT, Entry, FunctionsComparison, Moved
from thalweg.bench.spread import Spread

LONGEST = 40  # entries of a list that are shown
_UNITS = {"self_us": "us", "kept_bytes": "bytes kept", "peak_bytes": "bytes at most in a call"}


def markdown(found: FunctionsComparison, a: str, b: str) -> str:
    """The whole report; `a` and `b` name the two."""
    parts = [f"# Functions: {a} and {b}", _summary(found)]
    parts += [f"- differs: {name}: {one} | {other}" for name, one, other in found.differs]
    parts += ["## Phases", _table(("phase", "A: CPU ms", "B: CPU ms", "B/A", "A: energy", "B: energy"), _phases(found))]
    for title, entries in (
        ("Modified", found.modified),
        ("Added", found.added),
        ("Removed", found.removed),
        ("Renamed or moved, the source being the same", found.renamed),
        ("Moved beyond the spread, the source being the same", found.moved),
        ("Ops that moved, came or went", found.ops or []),
    ):
        if entries:
            parts += [f"## {title}: {len(entries)}", _entries(entries)]
    if found.ops is None:
        parts.append("Ops were not recorded: one of the two is a version that cannot be asked for them.")
    return "\n\n".join(parts) + "\n"


def figures_table(figures: Mapping[str, Any], phase: str, table: str, count: int) -> str:
    """The functions or ops of one file that take most of a phase, as Markdown."""
    rows: list[tuple[float, list[str]]] = []
    total = sum(median(f[phase]["self_us"]) for f in figures["functions"].values() if f.get(phase, {}).get("self_us"))
    for name, phases in figures[table].items():
        f = phases.get(phase, {})
        if not f.get("self_us"):
            continue
        self_us, calls = Spread.of(f["self_us"]), median(f["calls"])
        per_call = f"{median(f['total_us']) / calls:.1f}" if calls else "-"
        share, peak = (f"{100 * self_us.median / total:.1f} %" if total else "-"), f.get("peak_bytes")
        cells = [f"`{name}`", f"{calls:.4g}", per_call, self_us.show(1), share]
        rows.append((self_us.median, [*cells, f"{median(peak):.0f}" if peak else "-"]))
    rows.sort(key=lambda row: -row[0])
    unit = figures["phases"][phase]["unit"]
    name = "op" if table == "ops" else "function"
    headings = (name, f"calls/{unit}", "us/call", f"self us/{unit}", f"share of {phase}", "peak bytes")
    return _table(headings, (cells for _, cells in rows[:count]))


def energy(phase: Mapping[str, Any]) -> str:
    """Joules of a phase by counter, or "not measured"."""
    joules = phase.get("joules")
    if not isinstance(joules, dict) or not joules:
        return "not measured"
    return ", ".join(f"{name} {Spread.of(values).show(2)} J" for name, values in joules.items())


def _summary(found: FunctionsComparison) -> str:
    hot = [e for e in found.entries if e.verdict == "hot path"]
    times = [m for e in hot for m in e.moved if m.delta_share is not None and m.phase in HOT]
    slower, faster = (sum((m.delta_share or 0) * sign > 0 for m in times) for sign in (1, -1))
    counts = f"{len(found.modified)} modified, {len(found.added)} added, {len(found.removed)} removed"
    also = f"{len(found.renamed)} renamed or moved, {found.unchanged} the same and within the spread"
    return f"{counts}, {also}. On the hot path {slower} figures of time grew and {faster} shrank beyond the spread."


def _phases(found: FunctionsComparison) -> Iterator[Sequence[str]]:
    for name, sides in found.phases.items():
        times = [None if s is None else Spread.of(s["cpu_ms"]) for s in sides]
        a, b = times
        ratio = "-" if a is None or b is None or not a.median else f"{b.median / a.median:.3f}"
        shown = ["-" if t is None else t.show(1) for t in times]
        yield [name, *shown, ratio, *("-" if s is None else energy(s) for s in sides)]


def _entries(entries: Sequence[Entry]) -> str:
    headings = ("function or op", "verdict", "of prefill", "of decode step", "us/call", "beyond the spread")
    called, rest = [e for e in entries if e.share], [e for e in entries if not e.share]
    rows = ([_name(e), e.verdict, *(_shares(e, p) for p in HOT), _per_call(e), _moved(e)] for e in called[:LONGEST])
    parts = [_table(headings, rows)] if called else []
    if len(called) > LONGEST:
        parts.append(f"And {len(called) - LONGEST} more with smaller shares.")
    if rest:
        parts.append(
            f"Not called by the workload: {', '.join(map(_name, rest[:LONGEST]))}" + ", ..." * (len(rest) > LONGEST)
        )
    return "\n\n".join(parts)


def _name(e: Entry) -> str:
    return f"`{e.name}`" + (f" (was `{e.was}`)" if e.was else "")


def _shares(e: Entry, phase: str) -> str:
    shares = e.share.get(phase)
    return "-" if shares is None else _arrow(*(None if s is None else f"{100 * s:.2f} %" for s in shares))


def _per_call(e: Entry) -> str:
    phase = next((p for p in ("decode", "prefill", *e.us_per_call) if p in e.us_per_call), None)
    if phase is None:
        return "-"
    return f"{phase}: " + _arrow(*(None if v is None else f"{v:.1f}" for v in e.us_per_call[phase]))


def _arrow(a: str | None, b: str | None) -> str:
    return a or "-" if a == b else f"{a or '-'} -> {b or '-'}"


def _moved(e: Entry) -> str:
    return "; ".join(map(_describe, e.moved)) or "no"


def _describe(m: Moved) -> str:
    change = f"{m.a:.1f} -> {m.b:.1f} {_UNITS[m.figure]}"
    if m.delta_share is None:
        return f"{m.phase}: {change}"
    return f"{m.phase}: {'slower' if m.b > m.a else 'faster'}, {change} ({100 * m.delta_share:+.2f} % of {m.phase})"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [list(headings), *([c.replace("|", r"\|") for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])
