"""`thalweg eval --base-url` against `thalweg serve` with the bundled model, beside the same model in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.tiny_model import ServerProcess, server_process
from thalweg.cli import main
from thalweg.config.model_source import model_folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    if not (model_folder(None) / "model.safetensors").exists():
        pytest.skip("the bundled model has no weights in this checkout")
    with server_process(tmp_path_factory.mktemp("server") / "log", {}, {"api_key": "key"}) as running:
        yield running


def evaluate(file: Path, *arguments: str) -> dict[str, Any]:
    assert main(["eval", *arguments, "--output-json", str(file)]) == 0
    [row] = json.loads(file.read_text())["results"]
    assert isinstance(row, dict)
    return row


def test_arith_is_as_accurate_as_in_process(
    server: ServerProcess, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    questions = ("arith", "--num-questions", "12", "--seed", "5", "--max-new-tokens", "96")
    served = evaluate(tmp_path / "b.json", *questions, "--base-url", server.url, "--api-key", "key", "--parallel", "4")
    out = capsys.readouterr().out
    assert [line.split(":")[0] for line in out.splitlines()] == [
        "Questions",
        "Accuracy",
        "Invalid",
        "Latency",
        "Output throughput",
    ]
    here = evaluate(tmp_path / "a.json", *questions)
    assert [a["text"] for a in served["answers"]] == [a["text"] for a in here["answers"]]
    assert (served["accuracy"], served["output_tokens"]) == (here["accuracy"], here["output_tokens"])
    assert main(["bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    assert "paired: 0 right in A alone and 0 in B alone" in capsys.readouterr().out


def test_gsm8k_has_the_same_answers_as_in_process(server: ServerProcess, shared_dir: Path, tmp_path: Path) -> None:
    data = str(shared_dir / "data" / "gsm8k_test.jsonl")
    asked = ("gsm8k", "--data-path", data, "--num-questions", "3", "--num-shots", "2", "--max-new-tokens", "24")
    served = evaluate(tmp_path / "b.json", *asked, "--base-url", server.url, "--api-key", "key")
    here = evaluate(tmp_path / "a.json", *asked)
    assert served["answers"] == here["answers"]
    assert served["errors"] == 0


def test_a_wrong_key_and_a_wrong_name_are_told(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["eval", "arith", "--base-url", server.url, "--num-questions", "2"]
    assert main([*asked, "--api-key", "wrong"]) == 2
    assert "GET /v1/models answered 401" in capsys.readouterr().err
    assert main([*asked, "--api-key", "key", "--model", "other"]) == 1
    assert "failed: 2 x 404: the model 'other' is not served here" in capsys.readouterr().out
