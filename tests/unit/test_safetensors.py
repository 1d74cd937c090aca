"""The safetensors reader agrees with the format's own library and refuses damaged and hostile files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from thalweg.errors import CheckpointError, UnsupportedError
from thalweg.weights.checkpoint import INDEX, Checkpoint
from thalweg.weights.safetensors import SafetensorsFile

Header = dict[str, Any]


def write(path: Path, header: Header | bytes, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> Header:
    as_list = [list(x) if isinstance(x, tuple) else x for x in (shape, offsets)]
    return {"dtype": dtype, "shape": as_list[0], "data_offsets": as_list[1]}


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_reads_what_the_formats_library_writes(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(5, 7),
        "b": torch.randn(3, 4, 2).to(torch.bfloat16),
        "c": torch.randn(6).half(),
        "d": torch.randn(2, 2, dtype=torch.float64),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert set(file.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert file.tensors[name].shape == tuple(tensor.shape)
        assert file.read(name).dtype == tensor.dtype
        assert torch.equal(file.read(name), tensor)
    assert torch.equal(file.read("a", 0, 1, 3), tensors["a"][1:3])
    assert torch.equal(file.read("b", 1, 2), tensors["b"][:, 2:])
    assert torch.equal(file.read("a", 1, 3, 3), tensors["a"][:, 3:3])


def test_a_slice_shares_memory_with_the_mapping(tmp_path: Path) -> None:
    save_file({"a": torch.randn(100, 10)}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    row = file.read("a", 0, 50, 51)
    assert row.data_ptr() == file.read("a").data_ptr() + 50 * 10 * 4


def test_unaligned_tensors_are_read(tmp_path: Path) -> None:
    values = torch.arange(4, dtype=torch.float32)
    raw = values.numpy().tobytes()
    for pad in range(4):
        header = json.dumps({"a": entry(shape=(4,), offsets=(0, 16))}).encode() + b" " * pad
        file = SafetensorsFile(write(tmp_path / f"{pad}.safetensors", header, raw))
        assert torch.equal(file.read("a"), values)
        assert torch.equal(file.read("a", 0, 1, 3), values[1:3])


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        (b"[]", b"", "expected a JSON object"),
        (b"{", b"", "not valid JSON"),
        (b"{\xff}", b"", "not valid JSON"),
        (b'{"a":' + b"[" * 200_000, b"", "nested too deeply"),
        (b'{"a": 1, "a": 2}', b"", "given twice"),
        ({"a": 3}, b"", "malformed entry"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"", "malformed entry"),
        ({"a": {**entry(), "more": 1}}, b"\0" * 8, "malformed entry"),
        ({"a": entry(dtype="Q4")}, b"\0" * 8, "dtype 'Q4'"),
        ({"a": entry(dtype=["F32"])}, b"\0" * 8, "dtype ['F32']"),  # type: ignore[arg-type]
        ({"a": entry(shape=(-2,))}, b"\0" * 8, "shape [-2]"),
        ({"a": entry(shape=(2.0,))}, b"\0" * 8, "shape [2.0]"),
        ({"a": entry(shape=(True, 2))}, b"\0" * 8, "shape [True, 2]"),
        ({"a": entry(shape="2")}, b"\0" * 8, "shape '2'"),
        ({"a": entry(shape=(1,) * 9)}, b"\0" * 8, "up to 8 sizes"),
        ({"a": entry(shape=(2**63,))}, b"\0" * 8, "sizes >= 0"),
        (
            {"a": entry(shape=(2**62, 2**62, 4), offsets=(0, 0))},
            b"",
            "has 0 bytes; expected",
        ),  # 0 modulo 2**64
        ({"a": entry(shape=(3,))}, b"\0" * 8, "has 8 bytes; expected 12"),
        ({"a": entry(dtype="F4", shape=(1,), offsets=(0, 1))}, b"\0", "has 1 bytes; expected 0.5"),
        ({"a": entry(offsets=(8, 0))}, b"\0" * 8, "expected [start, stop]"),
        ({"a": entry(offsets=(0, 8, 16))}, b"\0" * 8, "expected [start, stop]"),
        ({"a": entry(offsets=(-8, 0))}, b"\0" * 8, "expected [start, stop]"),
        ({"a": entry(offsets=(0, 2**40), shape=(2**38,))}, b"\0" * 8, "cut short"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12, "'b' overlaps 'a'"),
        ({"a": entry(), "b": entry(offsets=(0, 8))}, b"\0" * 8, "overlaps"),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, b"\0" * 20, "'b' leaves a gap after 'a'"),
        ({"a": entry(offsets=(4, 12))}, b"\0" * 12, "leaves a gap after 'the header'"),
        ({"a": entry()}, b"\0" * 9, "1 bytes follow the last tensor"),
        ({"__metadata__": {"format": 1}}, b"", "__metadata__"),
        ({"__metadata__": "pt"}, b"", "__metadata__"),
        ({"": entry()}, b"\0" * 8, "a tensor is named ''"),
        ({"a\nb": entry()}, b"\0" * 8, "printable"),
        ({"x" * 2000: entry()}, b"\0" * 8, "a tensor is named"),
    ],
)
def test_hostile_headers_are_refused(tmp_path: Path, header: Header | bytes, data: bytes, said: str) -> None:
    refused(write(tmp_path / "model.safetensors", header, data), said)


@pytest.mark.parametrize("length", [10, 2**31, 2**63, 2**64 - 1, 100_000_001])
def test_header_lengths_are_bounded_before_anything_is_read(tmp_path: Path, length: int) -> None:
    refused(
        write(tmp_path / "model.safetensors", b"{}", length=length),
        f"header length is {length}; expected at most",
    )


def test_short_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    refused(path, "cannot be read")
    for size in (1, 7):
        path.write_bytes(b"\0" * size)
        refused(path, f"has {size} bytes")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(3), "b": torch.randn(2)}, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        refused(path)


@settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_give_a_valid_file_or_one_typed_error(tmp_path: Path, edits: list[tuple[int, int]]) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"layer.a": torch.ones(3, 2), "layer.b": torch.ones(2)}, path)
    data = bytearray(path.read_bytes())
    for position, value in edits:
        data[position % len(data)] = value
    path.write_bytes(data)
    try:
        file = SafetensorsFile(path)
        for name, info in file.tensors.items():
            assert info.stop <= len(data)
            assert tuple(file.read(name).shape) == info.shape
    except (CheckpointError, UnsupportedError) as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message


def test_quantized_tensors_open_but_are_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", {"w": entry("F8_E5M2", (8,), (0, 8))}, b"\0" * 8)
    with pytest.raises(UnsupportedError, match=r"w is F8_E5M2; expected one of .*BF16"):
        SafetensorsFile(path).read("w")


def shards(folder: Path, index: bool = True) -> dict[str, torch.Tensor]:
    """Two shards with two tensors each."""
    tensors = {name: torch.randn(2, 3) for name in "abcd"}
    weight_map = {}
    for i, names in enumerate(("ab", "cd"), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({n: tensors[n] for n in names}, folder / file)
        weight_map.update(dict.fromkeys(names, file))
    if index:
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 96}, "weight_map": weight_map}))
    return tensors


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_read_as_one(tmp_path: Path, index: bool) -> None:
    tensors = shards(tmp_path, index)
    checkpoint = Checkpoint(tmp_path)
    assert list(checkpoint.tensors) == list("abcd")
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def open_fails(folder: Path, said: str, kind: type[Exception] = CheckpointError) -> None:
    with pytest.raises(kind) as caught:
        Checkpoint(folder)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def edit_index(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"].update(changes)
    (folder / INDEX).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        "C:\\model.safetensors",
        "..\\model.safetensors",
        ".safetensors",
        "model.bin",
        "a\0.safetensors",
    ],
)
def test_index_paths_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shards(folder)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    edit_index(folder, a=name)
    open_fails(folder, "expected the plain name of a .safetensors file")


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    shards(tmp_path)
    edit_index(tmp_path, e="model-00002-of-00002.safetensors")
    open_fails(tmp_path, "lacks 'e', which the index says it holds")
    edit_index(tmp_path, e="model-00003-of-00002.safetensors")
    open_fails(tmp_path, "names model-00003-of-00002.safetensors, which is missing")
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    open_fails(tmp_path, "holds 'b', which the index does not list there")
    for bad in ("{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": ["a"]}', "[]"):
        (tmp_path / INDEX).write_text(bad)
        open_fails(tmp_path, INDEX)


def test_incomplete_or_mixed_shards_without_index(tmp_path: Path) -> None:
    shards(tmp_path, index=False)
    first = tmp_path / "model-00001-of-00002.safetensors"
    copy = tmp_path / "model-00003-of-00003.safetensors"
    copy.write_bytes(first.read_bytes())
    open_fails(tmp_path, "expected one complete set")
    copy.unlink()
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(first.read_bytes())
    open_fails(tmp_path, "expected it once")
    first.unlink()
    open_fails(tmp_path, "shard 1 of 2 is missing")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.gguf"])
def test_other_formats_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04")
    open_fails(tmp_path, name, UnsupportedError)


def test_empty_and_absent_folders(tmp_path: Path) -> None:
    open_fails(tmp_path, "no weights in it; expected model.safetensors")
    open_fails(tmp_path / "absent", "no such folder")
