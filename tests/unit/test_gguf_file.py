"""The GGUF reader reads what is written, and refuses damaged and hostile files before it allocates by what they say."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fixtures.gguf_files import by_hand, plain_tensor, record, small, string
from thalweg.config.gguf.file import GgufFile
from thalweg.config.gguf.keys import shortest
from thalweg.config.gguf.model import GgufModel, gguf_in, open_gguf
from thalweg.config.gguf.write import write_gguf
from thalweg.errors import CheckpointError, ConfigError, ThalwegError, UnsupportedError

U32, F32, STRING, ARRAY = 4, 6, 8, 9


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IIQ", ARRAY, kind, count) + content


def refused(path: Path, *parts: str, error: type[ThalwegError] = CheckpointError) -> None:
    with pytest.raises(error) as caught:
        GgufFile(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_reads_what_is_written(tmp_path: Path) -> None:
    file = GgufFile(small(tmp_path / "x.gguf"))
    assert file.metadata == {
        "general.architecture": "x",
        "a.int": 7,
        "a.float": 0.5,
        "a.bool": True,
        "a.list": [1, -2],
        "a.text": ["é", ""],
    }
    first, second = file.tensors.values()
    assert (first.name, first.shape, first.rows, first.columns, first.row_bytes) == ("first", (2, 3), 2, 3, 12)
    assert (second.shape, second.rows, second.columns) == ((5,), 5, 1)
    assert struct.unpack("<6f", file.mapped[first.start : first.stop]) == (0, 1, 2, 3, 4, 5)
    assert struct.unpack("<5f", file.mapped[second.start : second.stop]) == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("head", "parts", "error"),
    [
        ({"magic": b"GGML"}, ("begins with b'GGML'", "expected a GGUF file"), CheckpointError),
        ({"version": 1}, ("version 1; expected 2 or 3",), UnsupportedError),
        ({"version": 3 << 24}, ("big-endian",), UnsupportedError),
        ({"tensors": 2**63}, ("tensors; expected at most",), CheckpointError),
        ({"num_keys": 2**40}, ("keys; expected at most",), CheckpointError),
        ({"num_keys": 9000}, ("a key is ''",), CheckpointError),
    ],
)
def test_hostile_heads(tmp_path: Path, head: dict[str, Any], parts: tuple[str, ...], error: type[ThalwegError]) -> None:
    refused(by_hand(tmp_path / "x.gguf", **head), *parts, error=error)


KEY = string("k")


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ([string("k", 2**63)], ("a key takes", "expected at most")),
        ([string("k", 300)], ("a key takes 300 bytes; expected at most",)),
        ([KEY + struct.pack("<II", U32, 1), KEY + struct.pack("<II", U32, 1)], ("'k'", "every key once")),
        ([string("a\nb") + struct.pack("<II", U32, 1)], ("printable",)),
        ([KEY + struct.pack("<I", 13)], ("k is of type 13",)),
        ([KEY + struct.pack("<IQ", STRING, 2**62)], ("k takes",)),
        ([KEY + array(U32, 2**61)], ("values; expected at most",)),
        ([KEY + array(F32, 7_000_000)], ("k takes 28000000 bytes; expected at most",)),
        ([KEY + array(STRING, 7_000_000)], ("k has a string of",)),
        ([KEY + array(STRING, 2, string("x", 2**64 - 9))], ("k has a string of",)),
        ([KEY + array(77, 1)], ("elements of type 77",)),
        ([KEY + array(ARRAY, 1, struct.pack("<IQIQ", ARRAY, 1, ARRAY, 1))], ("arrays 3 deep",)),
        ([string("general.alignment") + struct.pack("<II", U32, 0)], ("alignment is 0",)),
        ([string("general.alignment") + struct.pack("<II", U32, 48)], ("power of two",)),
        ([string("general.alignment") + struct.pack("<I", STRING) + string("32")], ("power of two",)),
    ],
)
def test_hostile_metadata(tmp_path: Path, keys: list[bytes], parts: tuple[str, ...]) -> None:
    refused(by_hand(tmp_path / "x.gguf", keys=keys, records=[record()]), *parts)


@pytest.mark.parametrize(
    ("records", "parts", "error"),
    [
        ([record(dims=())], ("0 dimensions",), CheckpointError),
        ([record(dims=(1,) * 5)], ("5 dimensions",), CheckpointError),
        ([record(dims=(0, 4))], ("shape [4, 0]",), CheckpointError),
        ([record(dims=(2**32, 2**32))], ("below 2^48",), CheckpointError),
        ([record(dims=(2**63, 2**63, 2**63, 2**63))], ("below 2^48",), CheckpointError),
        ([record(dims=(40,))], ("ends at byte", "cut short"), CheckpointError),
        ([record(offset=2**63)], ("ends at byte",), CheckpointError),
        ([record(offset=4)], ("offset 4; expected a multiple of 32",), CheckpointError),
        ([record(), record()], ("occurs twice",), CheckpointError),
        ([record("a", (12,)), record("b", (4,), offset=32)], ("'b' overlaps 'a'",), CheckpointError),
        ([record("a\tb")], ("printable",), CheckpointError),
        ([record("")], ("printable",), CheckpointError),
        ([record("x" * 257)], ("name takes 257",), CheckpointError),
        ([record(kind=12, dims=(128,))], ("rows of 128; expected a multiple of 256 for Q4_K",), CheckpointError),
        ([record(kind=19, dims=(256,))], ("of type IQ1_S; expected one of F32, F16",), UnsupportedError),
        ([record(kind=4)], ("of type number 4",), UnsupportedError),
    ],
)
def test_hostile_tensors(
    tmp_path: Path, records: list[bytes], parts: tuple[str, ...], error: type[ThalwegError]
) -> None:
    refused(by_hand(tmp_path / "x.gguf", records=records), *parts, error=error)


def test_counts_are_checked_before_anything_is_allocated(tmp_path: Path) -> None:
    """Files of a few hundred bytes that speak of gigabytes."""
    for i, keys in enumerate(([KEY + array(F32, 7_999_000)], [KEY + array(STRING, 7_999_000)], [string("k", 2**40)])):
        path = by_hand(tmp_path / f"{i}.gguf", keys=keys)
        tracemalloc.start()
        with pytest.raises(CheckpointError):
            GgufFile(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


def test_files_cut_short_anywhere_are_refused(tmp_path: Path) -> None:
    whole = small(tmp_path / "x.gguf").read_bytes()
    end = GgufFile(tmp_path / "x.gguf").tensors["second"].stop
    cut = tmp_path / "cut.gguf"
    for length in range(1, end):
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            GgufFile(cut)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_bytes_give_a_file_or_one_line(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(small(tmp_path / "x.gguf").read_bytes())
    for at, byte in changes:
        data[at % len(data)] = byte
    (tmp_path / "y.gguf").write_bytes(data)
    fault = ""
    try:
        for tensor in GgufFile(tmp_path / "y.gguf").tensors.values():
            assert 0 < tensor.start < tensor.stop <= len(data)
    except ThalwegError as error:
        fault = str(error)
    assert "\n" not in fault


def split(folder: Path, total: int = 3) -> list[Path]:
    """A model in parts, each with a tensor of its own."""

    paths = [folder / f"m-{n:05}-of-{total:05}.gguf" for n in range(1, total + 1)]
    for n, path in enumerate(paths):
        own = {"general.architecture": "x"} if n == 0 else {}
        split = {"split.no": n, "split.count": total, "split.tensors.count": total}
        write_gguf(path, own | split, [plain_tensor(f"t{n}", np.ones(4))])
    return paths


def test_split_files_are_one_model(tmp_path: Path) -> None:
    paths = split(tmp_path)
    for path in paths:  # any of them names all
        model = GgufModel(path)
        assert list(model.tensors) == ["t0", "t1", "t2"]
        assert model.architecture == "x"
        assert model.file_of("t2").path == paths[2]
    assert gguf_in(tmp_path) == paths[0]


def test_split_files_must_be_complete_and_agree(tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(CheckpointError, match=r"says that it is part 2 of 3, counted from 0; expected 1 of 3"):
        GgufModel(paths[0])
    paths[1].unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003.gguf is missing \(1 of 3 parts\)"):
        GgufModel(paths[0])
    with pytest.raises(CheckpointError, match="part 4 of 3"):
        GgufModel(tmp_path / "m-00004-of-00003.gguf")
    alone = tmp_path / "renamed.gguf"
    alone.write_bytes(paths[0].read_bytes())
    with pytest.raises(CheckpointError, match="part 0 of 3"):
        GgufModel(alone)


def test_a_folder_of_several_models_is_refused_by_name(tmp_path: Path) -> None:
    small(tmp_path / "a-Q4.gguf")
    small(tmp_path / "mmproj-x.gguf")
    assert gguf_in(tmp_path) == tmp_path / "a-Q4.gguf"
    small(tmp_path / "a-Q8.gguf")
    with pytest.raises(ConfigError, match=r"several GGUF models; expected one of them: a-Q4.gguf, a-Q8.gguf"):
        gguf_in(tmp_path)


def test_a_file_is_parsed_once_until_it_changes(tmp_path: Path) -> None:
    path = small(tmp_path / "x.gguf")
    assert open_gguf(path) is open_gguf(path)
    before = open_gguf(path)
    write_gguf(path, {"general.architecture": "y" * 40}, [])
    assert open_gguf(path) is not before


def test_floats_are_as_short_as_they_were() -> None:
    for value in (1e-5, 2.446, 2.827, 0.1, 10000000.0, 1 / 3):
        stored = struct.unpack("<f", struct.pack("<f", value))[0]
        assert shortest(stored) == pytest.approx(value, rel=1e-7)
    assert shortest(struct.unpack("<f", struct.pack("<f", 2.446))[0]) == 2.446
