"""generation_config.json, as users of LLM, the command line and the server meet it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from thalweg import LLM, SamplingParams
from thalweg.assembly.source import open_source
from thalweg.cli.app import app
from thalweg.config.engine import EngineConfig
from thalweg.config.model_source import model_folder
from thalweg.errors import ConfigError

PROMPT = "Kate has 3 bags with 4 apples in each bag. How many apples is that?"
WILD = {"temperature": 50.0, "top_k": 40, "max_new_tokens": 12}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The bundled model, whose file asks for tokens as random as can be told from greedy ones."""
    shutil.copytree(model_folder(None), tmp_path / "model")
    rewrite(tmp_path / "model", **WILD)
    return tmp_path / "model"


def rewrite(folder: Path, **said: Any) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **said}))


def source(model: Path | None, generation_config: str) -> Any:
    return open_source(EngineConfig(None if model is None else str(model), generation_config=generation_config))


def test_offline_defaults_are_the_files_and_given_params_are_not_touched(folder: Path) -> None:
    with LLM(str(folder), device="cpu", seed=3) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(temperature=50.0, top_k=40, max_tokens=12)
        by_default = llm.generate(PROMPT)[0].outputs[0].token_ids
        said = llm.generate(PROMPT, llm.get_default_sampling_params())[0].outputs[0].token_ids
        greedy = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=12))[0].outputs[0].token_ids
        answer = llm.chat([{"role": "user", "content": PROMPT}])[0].outputs[0]
        assert len(by_default) == len(said) == len(answer.token_ids) == 12
        assert greedy not in (by_default, said)
    with LLM(str(folder), device="cpu", generation_config="vllm") as llm:
        assert llm.get_default_sampling_params() == SamplingParams()
        assert llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=12))[0].outputs[0].token_ids == greedy


def test_command_line_takes_the_files_defaults_unless_told_otherwise(folder: Path, tmp_path: Path) -> None:
    def text(*options: str) -> str:
        command = ["generate", str(folder), "--chat", "--prompt", PROMPT, "--json", "--max-tokens", "24", *options]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        return str(json.loads(result.stdout)["text"])

    wild = text()
    assert text() == wild  # --seed makes it the same again
    calm = text("--generation-config", "none")
    assert wild != calm == text("--temperature", "0")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "generation_config.json").write_text('{"temperature": 0}')
    assert text("--generation-config", str(tmp_path / "other")) == calm


@pytest.mark.parametrize("name", ["vllm", "none"])
def test_stop_ids_hold_without_the_sampling_defaults(folder: Path, name: str) -> None:
    rewrite(folder, eos_token_id=[7, 9])
    opened = source(folder, name)
    assert opened.generation.sampling == {}
    assert opened.eos_token_ids[:2] == (7, 9)


def test_every_stop_id_ends_a_text(folder: Path) -> None:
    """Those of generation_config.json, as Qwen lists two of them, and config.json's own."""
    rewrite(folder, eos_token_id=[7, 9])
    own = json.loads((folder / "config.json").read_text())["eos_token_id"]
    with LLM(str(folder), device="cpu", generation_config="none") as llm:
        for end, finish in ((7, "stop"), (9, "stop"), (own, "stop"), (8, "length")):
            params = SamplingParams(temperature=0, max_tokens=3, logit_bias={end: 100})
            output = llm.generate(PROMPT, params)[0].outputs[0]
            assert (output.finish_reason, output.token_ids[0]) == (finish, end)
            assert len(output.token_ids) == (1 if finish == "stop" else 3)


def test_the_bundled_model_stays_greedy() -> None:
    assert source(None, "auto").generation.sampling == {"temperature": 0.0}


def test_inspect_says_which_defaults_are_in_force(folder: Path) -> None:
    for options, expected in (
        ((), f"temperature 50, top_k 40, max_tokens 12 ({folder / 'generation_config.json'})"),
        (("--generation-config", "none"), "the engine's own"),
    ):
        result = CliRunner().invoke(app, ["inspect", str(folder), "--json", *options])
        assert json.loads(result.stdout)["sampling_defaults"] == expected


def test_defaults_that_no_request_could_have_are_refused_at_the_start(folder: Path, tmp_path: Path) -> None:
    rewrite(folder, top_p=0)
    with pytest.raises(ConfigError, match=r"generation_config\.json: top_p is 0.*--generation-config none"):
        source(folder, "auto")
    assert source(folder, "none").generation.sampling == {}
    with pytest.raises(ConfigError, match=r"--generation-config is .*; expected auto, vllm, none or a folder"):
        source(folder, str(tmp_path))
    with pytest.raises(ConfigError, match="--generation-config is ''; expected auto, vllm, none or a folder"):
        EngineConfig(generation_config="")
