"""SQL over a trace: Perfetto's names, the published queries as they stand, and nothing beyond the trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.trace_files import annotation, kernel, launch, slice_, write
from thalweg.cli import main
from thalweg.errors import ConfigError
from thalweg.profiler import chrome, sql
from thalweg.profiler.chrome import Slice, read_trace
from thalweg.profiler.sql import query


@pytest.fixture
def slices(tmp_path: Path) -> list[Slice]:
    """Two modules that call rearrange, twice and once, one of them twice over; and a call under neither."""
    gdn, kda = "nn.Module: Qwen3GatedDeltaNet_0", "nn.Module: KimiDeltaAttention_3"
    events = [
        annotation(gdn, 0, 100),
        slice_("python: rearrange", 10, 30, "python_function"),
        slice_("aten::reshape", 12, 5),
        slice_("python: rearrange", 50, 30, "python_function"),
        annotation(kda, 200, 100),
        annotation("nn.Module: Linear_7", 210, 40),
        slice_("python: rearrange", 215, 20, "python_function"),
        launch(220, 9),
        slice_("python: rearrange", 400, 10, "python_function"),
        kernel("gemm", 500, 10, 9),
    ]
    return read_trace(write(tmp_path / "t.json", events))


REARRANGED = """
SELECT s.name, COUNT(*) AS calls, SUM(s.dur) / 1e3 AS us
FROM slice s
WHERE s.name LIKE '%rearrange%'
  AND EXISTS (SELECT 1 FROM ancestor_slice(s.id) a WHERE a.name LIKE '%GatedDeltaNet%')
GROUP BY s.name
"""
IN_KDA = """
SELECT name, COUNT(*) AS calls, SUM(dur) / 1e3 AS us
FROM slice
WHERE name LIKE '%rearrange%'
  AND id IN (SELECT s.id FROM slice s JOIN ancestor_slice(s.id) a ON a.name GLOB 'nn.Module: KimiDeltaAttention_*')
GROUP BY name
"""


def test_the_published_queries(slices: list[Slice]) -> None:
    found = query(slices, REARRANGED)
    assert found.columns == ["name", "calls", "us"]
    assert found.rows == [("python: rearrange", 2, 60.0)]
    assert query(slices, IN_KDA).rows == [("python: rearrange", 1, 20.0)]


def test_columns_are_perfettos_and_more(slices: list[Slice]) -> None:
    found = query(slices, "SELECT * FROM slice ORDER BY id")
    assert found.columns[:7] == ["id", "parent_id", "ts", "dur", "name", "depth", "track"]
    first = dict(zip(found.columns, found.rows[0], strict=True))
    assert (first["id"], first["parent_id"], first["depth"], first["correlation"]) == (0, None, 0, None)
    linked = "SELECT k.name FROM slice k JOIN slice h USING (correlation) WHERE h.category = 'cuda_runtime' AND k <> h"
    assert query(slices, linked).rows == [("gemm",)]


@pytest.mark.parametrize("argument", ["s.id", "id", "s.id + 0"])
def test_functions_take_a_column_of_any_name(slices: list[Slice], argument: str) -> None:
    text = f"SELECT (SELECT COUNT(*) FROM ancestor_slice({argument})) AS n FROM slice s ORDER BY s.id"
    assert [n for (n,) in query(slices, text).rows] == [s.depth for s in slices]


ids = st.integers(0, 40)


@settings(max_examples=15, derandomize=True, deadline=None)
@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=12))
def test_ancestors_and_descendants_are_the_transitive_parents(spans: list[tuple[int, int]]) -> None:
    slices = chrome._nest("t", [chrome._Event(ph="X", name="x", ts=a, dur=b) for a, b in spans], {}, {})

    def above(s: Slice) -> set[int]:
        return set() if s.parent_id < 0 else {s.parent_id} | above(slices[s.parent_id])

    pairs = {(s.id, a) for s in slices for a in above(s)}
    up = query(slices, "SELECT s.id, a.id FROM slice s JOIN ancestor_slice(s.id) a ON true").rows
    down = query(slices, "SELECT a.id, s.id FROM slice s, descendant_slice(s.id) a").rows
    assert len(up) == len(pairs) == len(down)
    assert set(up) == pairs == set(down)
    assert {a for (a,) in query(slices, "SELECT id FROM ancestor_slice(0)").rows} == above(slices[0])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("SELECT nothing FROM slice", '"nothing"'),
        ("SELEC 1", "syntax error"),
        ("", "holds no statement"),
        ("SELECT 1; SELECT 2", "holds SELECT, SELECT"),
        ("DELETE FROM slice", "holds DELETE"),
        ("SET threads = 1", "holds SET"),
        ("COPY slice TO 'out.csv'", "holds COPY"),
        ("ATTACH 'other.db'", "holds ATTACH"),
        ("INSTALL httpfs", "holds LOAD"),
        ("SELECT * FROM read_text('{file}')", "disabled by configuration"),
        ("SELECT * FROM '{file}'", "disabled by configuration"),
        ("SELECT * FROM secret", "does not exist"),
        ("SELECT getenv('HOME')", "does not exist"),
    ],
)
def test_it_answers_from_the_trace_alone(slices: list[Slice], tmp_path: Path, text: str, reason: str) -> None:
    secret = [("a variable",)]
    assert secret
    with pytest.raises(ConfigError, match=reason) as caught:
        query(slices, text.format(file=tmp_path / "t.json"))
    assert str(caught.value).startswith("--sql ")
    assert "\n" not in str(caught.value)


def test_an_answer_is_bounded(slices: list[Slice], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql, "MAX_ROWS", 4)
    monkeypatch.setitem(sql._LOCKED, "memory_limit", "64MiB")
    found = query(slices, "SELECT id FROM slice ORDER BY id")
    assert (found.rows, found.more) == ([(0,), (1,), (2,), (3,)], True)
    assert not query(slices, "SELECT id FROM slice LIMIT 4").more
    with pytest.raises(ConfigError, match="Out of Memory"):
        query(slices, "SELECT * FROM range(1000000000) ORDER BY 1 DESC")


def test_a_trace_without_slices_has_an_empty_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    no_slices: Sequence[Slice] = []
    assert query(no_slices, "SELECT COUNT(*) FROM slice").rows == [(0,)]
    assert main(["trace", write(tmp_path / "empty.json", [])]) == 0
    assert "no device" in capsys.readouterr().out


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, slices: list[Slice]) -> None:
    file = str(tmp_path / "t.json")
    assert main(["trace", file, "--sql", REARRANGED]) == 0
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split() == ["name", "calls", "us"]
    assert row.split() == ["python:", "rearrange", "2", "60.0"]
    assert main(["trace", file, "--json", "--sql", IN_KDA]) == 0
    assert '"rows": [["python: rearrange", 1, 20.0]]' in capsys.readouterr().out
    assert main(["trace", file, "--sql", "SELECT nothing"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: --sql failed")
    assert err.count("\n") == 1
