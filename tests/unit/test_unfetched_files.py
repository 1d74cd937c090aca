"""Model folders whose files were never fetched: each is named, with what to do, in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from thalweg.cli import main
from thalweg.config.model_source import model_folder
from thalweg.errors import CheckpointError
from thalweg.tokenizer.load import load_tokenizer

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 98304123\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"
STAND_INS = [
    (POINTER, "git lfs pull"),
    (b"", "is empty"),
    (PAGE, "is a web page"),
    (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "is a web page"),
]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder(None), tmp_path / "model"))


def refusal(capsys: pytest.CaptureFixture[str], *line: str) -> str:
    assert main(list(line)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(("content", "said"), STAND_INS)
@pytest.mark.parametrize("name", sorted(p.name for p in model_folder(None).iterdir() if p.suffix != ".md"))
def test_every_file_of_a_model(
    folder: Path, name: str, content: bytes, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / name).write_bytes(content)
    error = refusal(capsys, "generate", str(folder), "--prompt", "x", "--chat")
    assert f"{folder / name} is " in error
    assert said in error


@pytest.mark.parametrize(("content", "said"), STAND_INS)
def test_shards_and_their_index(folder: Path, content: bytes, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model.safetensors").unlink()
    for shard in SHARDS:
        (folder / shard).write_bytes(content)
    without_index = refusal(capsys, "inspect", str(folder))
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}))
    with_index = refusal(capsys, "inspect", str(folder))
    assert f"{folder / SHARDS[0]} is " in with_index
    assert with_index == without_index
    (folder / INDEX).write_bytes(content)
    error = refusal(capsys, "inspect", str(folder))
    assert f"{folder / INDEX} is " in error
    assert all(said in e for e in (error, with_index))


@pytest.mark.parametrize(("content", "said"), STAND_INS)
def test_a_tokenizer_of_the_other_kind(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"tokenizer.json .*{said}"):
        load_tokenizer(tmp_path)


def test_text_in_place_of_weights_is_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model.safetensors").write_bytes(b"Access to this model is restricted")
    assert "which begins with 'Access to this model is restricted'" in refusal(capsys, "inspect", str(folder))
