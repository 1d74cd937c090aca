"""SQL over a trace, in DuckDB: table `slice`, table functions ancestor_slice(id) and descendant_slice(id).

Names and shapes are Perfetto's, so that a query written for its trace processor runs here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np

from thalweg.errors import ConfigError
from thalweg.profiler.chrome import Slice

MAX_ROWS = 10_000  # of an answer
MAX_ANCESTRY = 50_000_000  # pairs of a slice and one above it
_LOCKED = {
    "enable_external_access": False,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "python_enable_replacements": False,
    "temp_directory": "",  # what does not fit is an error, nothing is written to disk
    "memory_limit": "2GiB",
}
_INTEGERS = ("id", "parent_id", "ts", "dur", "depth", "correlation")
_TEXTS = ("name", "track", "category", "args")
COLUMNS = ("id", "parent_id", "ts", "dur", "name", "depth", "track", "category", "correlation", "args")


@dataclass(frozen=True, slots=True)
class Answer:
    """Column names and at most MAX_ROWS rows; `more` says that some were left out."""

    columns: list[str]
    rows: list[tuple[Any, ...]]
    more: bool


def query(slices: Sequence[Slice], sql: str) -> Answer:
    """The answer to one SELECT over the trace. It sees nothing else: no files, extensions, settings or variables.

    Raises ConfigError, one line, for bad SQL, a statement that is not a query, and one that needs too much memory.
    """
    if sum(s.depth for s in slices) > MAX_ANCESTRY:
        raise ConfigError(f"the trace nests too deeply for --sql: over {MAX_ANCESTRY} pairs; record fewer steps")
    connection = duckdb.connect(":memory:", config=_LOCKED)  # type: ignore[arg-type]
    try:
        _load(connection, slices)
        connection.execute("SET lock_configuration = true")
        statements = connection.extract_statements(sql)
        if (kinds := [statement.type.name for statement in statements]) not in (["SELECT"], ["EXPLAIN"]):
            raise ConfigError(f"--sql holds {', '.join(kinds)[:80] or 'no statement'}; expected one SELECT")
        found = connection.execute(statements[0])
        columns = [column[0] for column in found.description or []]
        rows = found.fetchmany(MAX_ROWS + 1)
    except (duckdb.Error, UnicodeError) as e:
        raise ConfigError(f"--sql failed: {(str(e).splitlines() or [type(e).__name__])[0]}") from None
    finally:
        connection.close()
    return Answer(columns, rows[:MAX_ROWS], len(rows) > MAX_ROWS)


def _load(connection: duckdb.DuckDBPyConnection, slices: Sequence[Slice]) -> None:
    arrays: dict[str, np.ndarray] = {n: np.array([getattr(s, n) for s in slices], dtype=np.int64) for n in _INTEGERS}
    arrays |= {n: np.array([getattr(s, n) for s in slices], dtype=object) for n in _TEXTS}
    types = {**dict.fromkeys(_INTEGERS, "BIGINT"), **dict.fromkeys(_TEXTS, "VARCHAR")}
    connection.execute(f"CREATE TABLE slice ({', '.join(f'{n} {types[n]}' for n in COLUMNS)})")
    if slices:
        connection.register("loaded", arrays)
        absent = {n: f"nullif({n}, -1)" for n in ("parent_id", "correlation")} | {"args": "nullif(args, '')"}
        connection.execute(f"INSERT INTO slice SELECT {', '.join(absent.get(n, n) for n in COLUMNS)} FROM loaded")
        connection.unregister("loaded")
    connection.execute(
        "CREATE TABLE _ancestry AS WITH RECURSIVE up(_below, _above) AS ("
        " SELECT id, parent_id FROM slice WHERE parent_id IS NOT NULL"
        " UNION ALL SELECT _below, parent_id FROM up JOIN slice ON id = _above WHERE parent_id IS NOT NULL"
        ") SELECT _below, _above FROM up"
    )
    # DuckDB puts a macro's argument into its body as text would be, so an `id` or `s.id` of the caller would be taken
    # for one of the body's own. Where the argument stands, the body therefore has no column of an ordinary name.
    hidden = ", ".join(f"s.{n} AS _{n}" for n in COLUMNS)
    shown = ", ".join(f"_{n} AS {n}" for n in COLUMNS)
    for function, given, wanted in (
        ("ancestor_slice", "_below", "_above"),
        ("descendant_slice", "_above", "_below"),
    ):
        view = f"_{function}"
        connection.execute(
            f"CREATE VIEW {view} AS SELECT {given}, {hidden} FROM _ancestry JOIN slice s ON s.id = {wanted}"
        )
        connection.execute(
            f"CREATE MACRO {function}(_argument) AS TABLE"
            f" SELECT {shown} FROM (SELECT * FROM {view} WHERE {given} = _argument)"
        )
