"""Which implementation served each op of a model, in few words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from thalweg.assembly.info import OpChoice


def served_by(choices: Iterable[OpChoice]) -> dict[str, str]:
    """By the name of an op, such as "1-16: cpp, 17-: reference": who serves how many tokens; "cpp" alone serves any.
    Tables that differ by dimensions are joined by "or"."""
    tables: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for choice in choices:
        tables[choice.op][", ".join(map(str, choice.table))] = None
    return {op: " or ".join(found) for op, found in sorted(tables.items())}


def in_words(served: Mapping[str, str]) -> str:
    """One line per way of being served, with all ops that are."""
    by_table: defaultdict[str, list[str]] = defaultdict(list)
    for op, table in served.items():
        by_table[table].append(op)
    return "\n".join(f"served by {table}: {', '.join(ops)}" for table, ops in sorted(by_table.items()))
