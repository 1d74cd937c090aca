"""`thalweg convert` there and back, and what commands do with a GGUF file and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from tests.e2e.tiny_model import server_process
from thalweg import LLM
from thalweg.cli import main
from thalweg.config.model_source import model_folder
from thalweg.weights.checkpoint import Checkpoint

QUESTION = "Tom has 3 apples. He buys 4 more apples. How many apples does Tom have now?"
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
GDN = Path(__file__).parents[2] / "models" / "thalweg-tiny-gdn"

pytestmark = pytest.mark.skipif(
    not (model_folder(None) / "model.safetensors").exists(), reason="the bundled model's weights are absent"
)


def convert(*args: object) -> None:
    assert main(["convert", *map(str, args)]) == 0


def answer(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["generate", *map(str, args), "--chat", "--json", "--prompt", QUESTION]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("model", [None, GDN], ids=["thalweg-tiny", "thalweg-tiny-gdn"])
def test_a_converted_model_answers_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path | None
) -> None:
    """In every outtype, and after it was converted back. The tokens of a float32 file are the same."""
    named = [] if model is None else [model]
    original = answer(capsys, *named)
    assert "#### 7" in original["text"]
    for outtype in ("f32", "bf16", "q8_0", "q6_k", "q4_k_m"):
        file = tmp_path / f"{outtype}.gguf"
        convert(*named, "--to", "gguf", "-o", file, "--outtype", outtype)
        found = answer(capsys, file)
        assert found["prompt_tokens"] == original["prompt_tokens"]
        assert "#### 7" in found["text"]
        if outtype == "f32":
            assert found["token_ids"] == original["token_ids"]
    convert(tmp_path / "f32.gguf", "--to", "safetensors", "-o", tmp_path / "back")
    assert answer(capsys, tmp_path / "back")["token_ids"] == original["token_ids"]


def test_the_layer_that_drafts_tokens_goes_along(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    convert(GDN, "--to", "gguf", "-o", tmp_path / "x.gguf", "--outtype", "q8_0")
    convert(tmp_path / "x.gguf", "--to", "safetensors", "-o", tmp_path / "back")
    for model in (tmp_path / "x.gguf", tmp_path / "back"):
        capsys.readouterr()
        asked = ["--num-questions", "8", "--draft-tokens", "1", "--json"]
        assert main(["eval", "mtp-acceptance", str(model), *asked]) == 0
        assert json.loads(capsys.readouterr().out)["results"][0]["accepted"] > 0.9


def test_back_and_forth_loses_nothing(tmp_path: Path) -> None:
    """bfloat16 there and back is the same file's numbers; A_log goes through an exponential."""
    convert("--to", "gguf", "-o", tmp_path / "x.gguf", "--outtype", "bf16")
    convert(tmp_path / "x.gguf", "--to", "safetensors", "-o", tmp_path / "back")
    back, original = Checkpoint(tmp_path / "back"), Checkpoint(model_folder(None))
    assert back.tensors.keys() == original.tensors.keys()
    for name in original.tensors:
        expected = original.read(name).float()
        torch.testing.assert_close(back.read(name).float(), expected, atol=1e-6 if "A_log" in name else 0, rtol=0)
    assert (tmp_path / "back" / "tiktoken.model").read_bytes().split() == (
        (model_folder(None) / "tiktoken.model").read_bytes().split()
    )
    template = (model_folder(None) / "chat_template.jinja").read_text()
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == template


def test_a_gguf_file_is_converted_to_another_type(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    convert("--to", "gguf", "-o", tmp_path / "f16.gguf")
    convert(tmp_path / "f16.gguf", "--to", "gguf", "-o", tmp_path / "q4.gguf", "--outtype", "q4_k_m")
    assert (tmp_path / "q4.gguf").stat().st_size < 0.45 * (tmp_path / "f16.gguf").stat().st_size
    assert "#### 7" in answer(capsys, tmp_path / "q4.gguf")["text"]


def test_inspect_says_what_stays_in_blocks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    convert("--to", "gguf", "-o", tmp_path / "x.gguf", "--outtype", "q8_0")
    weight_bytes = {}
    for option, kept in (
        ("--no-dequantize", "blocks are kept"),
        ("--dequantize", "blocks are brought to float32 as they are loaded"),
    ):
        capsys.readouterr()
        assert main(["inspect", str(tmp_path / "x.gguf"), "--device", "cpu", option, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["name"] == "x"
        assert found["weight_files"].endswith(f"(F16, F32, Q8_0), all fit metadata; {kept}")
        weight_bytes[option] = found["cost"]["weight_bytes"]
        assert found["sampling_defaults"] == "temperature 0 (x.gguf)"
    assert weight_bytes["--no-dequantize"] < 0.5 * weight_bytes["--dequantize"]


def test_a_server_needs_nothing_but_the_file(tmp_path: Path) -> None:
    convert("--to", "gguf", "-o", tmp_path / "tiny-Q8.gguf", "--outtype", "q8_0")
    with (
        server_process(tmp_path / "log", {"model": str(tmp_path / "tiny-Q8.gguf")}) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        [model] = client.models.list().data
        assert model.id == "tiny-Q8"
        chat = client.chat.completions.create(model=model.id, messages=MESSAGES)
        assert chat.choices[0].finish_reason == "stop"
        assert "#### 7" in (chat.choices[0].message.content or "")


def test_a_folder_of_one_file_is_that_file(tmp_path: Path) -> None:
    convert("--to", "gguf", "-o", tmp_path / "m.gguf")
    with LLM(str(tmp_path)) as llm:
        assert llm.info.name == "m"
        assert "#### 7" in llm.chat(MESSAGES)[0].outputs[0].text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--to", "onnx", "-o", "x.gguf"], "--to is 'onnx'; expected gguf or safetensors"),
        (["--to", "gguf", "-o", "x.gguf", "--outtype", "q3_k"], "--outtype is 'q3_k'; expected f32, f16, bf16, q8_0"),
        (["--to", "gguf", "-o", "x.bin"], "expected a file that ends in .gguf"),
        (["--to", "gguf", "-o", "no/x.gguf"], "there is no folder 'no'"),
        (["--to", "gguf", "-o", "there.gguf"], "which exists already"),
        (["--to", "safetensors", "-o", "folder"], "which is in safetensors already; expected a .gguf file"),
        (["there.gguf", "--to", "safetensors", "-o", "x"], "expected a GGUF file"),
        (["there.gguf", "--to", "safetensors", "-o", "x", "--outtype", "q8_0"], "expected f32, f16, bf16 for saf"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.gguf").write_bytes(b"not one of these")
    assert main(["convert", *args]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]


def test_a_folder_with_a_config_and_a_gguf_file_says_which_is_the_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copy(model_folder(None) / "config.json", tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 2
    assert "name the file as MODEL" in capsys.readouterr().err
