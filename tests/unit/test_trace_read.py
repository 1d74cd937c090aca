"""Chrome traces into nested slices, and files that are none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.trace_files import annotation, kernel, slice_, write
from thalweg.errors import ConfigError
from thalweg.profiler import chrome
from thalweg.profiler.chrome import Slice, read_trace


def test_slices_nest_by_track(tmp_path: Path) -> None:
    events = [
        {"ph": "M", "name": "thread_name", "pid": 4242, "tid": 1, "args": {"name": "main"}},
        slice_("inner", 2, 3),
        slice_("outer", 1, 10),
        slice_("next", 11, 1),
        slice_("elsewhere", 3, 1, tid=2),
        {"ph": "i", "name": "an instant", "ts": 3, "pid": 4242, "tid": 1},
    ]
    found = {s.name: s for s in read_trace(write(tmp_path / "t.json", events))}
    assert set(found) == {"inner", "outer", "next", "elsewhere"}
    assert found["inner"].parent_id == found["outer"].id
    assert [found[n].depth for n in ("outer", "inner", "next", "elsewhere")] == [0, 1, 0, 0]
    assert found["next"].parent_id == -1  # begins where outer ends
    assert (found["inner"].ts, found["inner"].dur) == (2000, 3000)
    assert found["outer"].track == "4242: main"


def test_large_times_keep_their_nanoseconds(tmp_path: Path) -> None:
    # Torch's microseconds since a distant zero: a double holds them only to about a nanosecond.
    events = ", ".join(
        f'{{"ph": "X", "name": "{i}", "ts": 4328118425969.{i:03d}, "dur": 0.001, "pid": 1, "tid": 1}}'
        for i in range(1000)
    )
    (tmp_path / "t.json").write_text(f'{{"traceEvents": [{events}]}}')
    slices = read_trace(str(tmp_path / "t.json"))
    assert [s.ts for s in slices] == [4328118425969000 + i for i in range(1000)]
    assert all(s.depth == 0 for s in slices)


def test_overlapping_kernels_are_neighbours(tmp_path: Path) -> None:
    events = [kernel("first", 0, 10, 1), kernel("early", 8, 12, 2)]
    assert [s.parent_id for s in read_trace(write(tmp_path / "t.json", events))] == [-1, -1]


@settings(max_examples=60, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20), st.integers(0, 1)), max_size=30))
def test_a_parent_encloses_its_child(spans: list[tuple[int, int, int]]) -> None:
    events = [chrome._Event(ph="X", name=str(i), ts=ts, dur=dur, tid=tid) for i, (ts, dur, tid) in enumerate(spans)]
    slices = chrome._nest("t", events, {}, {})
    assert [s.id for s in slices] == list(range(len(spans)))
    assert sorted((s.ts, s.dur, s.track[-1]) for s in slices) == sorted(
        (1000 * ts, 1000 * dur, str(tid)) for ts, dur, tid in spans
    )
    for s in slices:
        if s.parent_id < 0:
            assert s.depth == 0
            continue
        parent: Slice = slices[s.parent_id]
        assert parent.track == s.track
        assert parent.ts <= s.ts <= s.end <= parent.end
        assert s.depth == parent.depth + 1


def test_packed_files_and_bare_lists_are_read(tmp_path: Path) -> None:
    events = [annotation("step", 0, 1)]
    (tmp_path / "t.json.gz").write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode(), mtime=0))
    (tmp_path / "list.json").write_text(json.dumps(events))
    for name in ("t.json.gz", "list.json"):
        [found] = read_trace(str(tmp_path / name))
        assert (found.name, found.category) == ("step", "user_annotation")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a Chrome trace"),
        (b"{}", "not a Chrome trace"),
        (b"[1]", "not a Chrome trace"),
        (b'{"traceEvents": 5}', "not a Chrome trace"),
        (b'{"traceEvents": [{"ph": "X", "name": "\xff"}]}', "not a Chrome trace"),
        (b'{"traceEvents": [{"ph": "X", "ts": 1e300}]}', "expected microseconds"),
        (b'{"traceEvents": [{"ph": "X", "ts": 1, "dur": -1}]}', "expected microseconds"),
        (b'{"traceEvents": [{"ph": "X", "args": 5}]}', "not a Chrome trace"),
        (b"[" * 100_000, "not a Chrome trace"),
        (b'{"traceEvents": [], "x": ' + b"[" * 100_000, "not a Chrome trace"),
        (gzip.compress(b"[" + b" " * 10_000, mtime=0)[:-9], "damaged gzip"),
        (b"\x1f\x8b nonsense", "damaged gzip"),
        (gzip.compress(b" " * (2 << 20), mtime=0), "more than 1 MiB"),
        (b" " * (2 << 20), "more than 1 MiB"),
    ],
)
def test_other_files_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, reason: str) -> None:
    monkeypatch.setattr(chrome, "MAX_BYTES", 1 << 20)
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(ConfigError, match=reason) as caught:
        read_trace(str(tmp_path / "t.json"))
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ConfigError, match="no such file"):
            read_trace(str(path))


def test_slices_and_depth_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = write(tmp_path / "deep.json", [slice_("x", i, 10_000 - 2 * i) for i in range(chrome.MAX_DEPTH + 1)])
    with pytest.raises(ConfigError, match="nested more than 512 deep"):
        read_trace(deep)
    monkeypatch.setattr(chrome, "MAX_SLICES", 3)
    with pytest.raises(ConfigError, match="4 slices; expected at most 3"):
        read_trace(write(tmp_path / "many.json", [slice_("x", i, 1) for i in range(4)]))
