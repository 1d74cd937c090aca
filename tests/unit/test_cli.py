"""The command line without an engine: help, versions, and one line for every mistake."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pytest
import typer

from thalweg import __version__
from thalweg.cli import main
from thalweg.cli.bench import _integers
from thalweg.cli.options import engine_config, sampling_params, takes
from thalweg.config.engine import EngineConfig
from thalweg.config.extras import why_missing
from thalweg.core import SamplingParams
from thalweg.errors import ConfigError

COMMANDS = ["generate", "chat", "serve", "inspect", "eval arith", "eval gsm8k", "bench latency", "bench host"]
COMMANDS += ["bench serve", "bench soak"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[int, str, str]]:
    """Runs one command line here: (exit code, stdout, stderr)."""

    def run(line: str) -> tuple[int, str, str]:
        out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        code = main(line.split())
        monkeypatch.undo()
        out.flush()
        return code, out.buffer.getvalue().decode(), err.getvalue()

    return run


def test_a_front_end_starts_without_torch() -> None:
    """Which is for the rank's thread, or another process; also profilers want to be used where torch came in."""
    code = "import sys, thalweg.engine.llm, thalweg.bench.latency; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command_line_is_read_without_torch() -> None:
    heavy = "[m for m in ('torch', 'numpy', 'fastapi', 'zmq', 'tokenizers') if m in sys.modules]"
    code = f"import sys, thalweg.cli; found = {heavy}; sys.exit(', '.join(found) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(run: Callable[[str], tuple[int, str, str]], command: str) -> None:
    code, out, err = run(f"{command} --help")
    assert (code, err) == (0, "")
    assert "Usage: thalweg" in out
    if command in {"generate", "chat", "serve", "inspect", "eval arith", "bench latency"}:
        assert "--max-model-len" in out
        assert "MODEL" in out.partition("\n\n")[0]  # in brackets or not, by the version of typer
    assert command != "serve" or "--port " in out
    assert "trust" not in out


def test_help_without_a_command_and_version(run: Callable[[str], tuple[int, str, str]]) -> None:
    assert "generate" in run("")[1]
    assert run("--version") == (0, f"thalweg {__version__}\n", "")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--no-such-option", "--no-such-option"),
        ("generat --prompt x", "generate"),
        ("generate --prompt x --no-such-option", "--no-such-option"),
        ("generate", "--prompt"),
        ("generate --prompt", "--prompt"),
        ("generate --prompt x model another", "another"),
        ("generate --prompt x --max-num-seqs many", "--max-num-seqs"),
        ("generate --prompt x --max-num-seqs 0", "--max-num-seqs"),
        ("generate --prompt x --max-model-len 32q", "--max-model-len"),
        ("generate --prompt x --max-num-batched-tokens -3", "--max-num-batched-tokens"),
        ("generate --prompt x --cache-memory lots", "--cache-memory"),
        ("generate --prompt x --dtype int4", "--dtype"),
        ("generate --prompt x --device toaster", "--device"),
        ("generate --prompt x --load-format gguf", "--load-format"),
        ("generate --prompt x --op reference", "--op"),
        ("generate --prompt x --gpu-memory-utilization 2", "--gpu-memory-utilization"),
        ("generate --prompt x -tp 0", "--tensor-parallel-size"),
        ("generate --prompt x --temperature -1", "temperature"),
        ("generate --prompt x --top-p nan", "top_p"),
        ("generate --prompt x --max-tokens -1", "max_tokens"),
        ("generate --prompt x --trust-remote-code", "--trust-remote-code"),
        ("generate no/such/folder --prompt x", "no/such/folder"),
        ("inspect no/such/folder", "no/such/folder"),
        ("inspect --op mla_rope=reference", "names 'mla_rope', which this model does not use"),
        ("inspect --op kda_decode=reference", "unknown op 'kda_decode'; known: all_gather"),
        ("eval", "Missing command"),
        ("eval arith --num-questions 0", "--num-questions"),
        ("eval arith --max-num-seqs 4", "--max-num-seqs"),
        ("eval gsm8k", "--data-path"),
        ("eval gsm8k --data-path no/such/file", "--data-path"),
        ("bench latency --batch-size 1,x", "--batch-size"),
        ("bench latency --batch-size 0", "--batch-size"),
        ("bench latency --input-len 0", "--input-len"),
        ("bench latency --input-len 8,x", "--input-len"),
        ("bench latency --output-json no/such/folder/f.json", "--output-json"),
        ("bench host --finished -1", "--finished"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    run: Callable[[str], tuple[int, str, str]], line: str, named: str
) -> None:
    code, out, err = run(line)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err


def test_trust_remote_code_says_why(run: Callable[[str], tuple[int, str, str]]) -> None:
    assert "never run" in run("chat --trust-remote-code")[2]


def test_engine_options_reach_the_config() -> None:
    config = engine_config(
        "folder", max_model_len="32k", max_num_batched_tokens="1k", cache_memory="2GiB", op=["*=a", "b=c"]
    )
    assert config.model == "folder"
    assert (config.max_model_len, config.max_num_batched_tokens, config.cache_memory) == (32768, 1024, 2 << 30)
    assert dict(config.op_preference) == {"*": "a", "b": "c"}


def test_defaults_are_those_of_the_offline_api() -> None:
    assert engine_config() == EngineConfig()
    assert sampling_params().over({}) == SamplingParams(temperature=0, max_tokens=256)


def test_takes_offers_a_group_and_hands_over_what_it_makes() -> None:
    app, got = typer.Typer(), []

    @app.command()
    @takes(config=engine_config, leave_out=("max_num_seqs",))
    def command(config: EngineConfig, flag: Annotated[bool, typer.Option("--flag")] = False) -> None:
        """Says something."""
        got.append((config, flag))

    app(["--flag", "m", "-tp", "2", "--seed", "7"], standalone_mode=False)
    assert got == [(EngineConfig(model="m", tensor_parallel_size=2, seed=7), True)]
    assert command.__doc__ == "Says something."
    with pytest.raises(Exception, match="max-num-seqs"):
        app(["--max-num-seqs", "3"], standalone_mode=False)


def test_integers() -> None:
    assert _integers("1, 8,64", "--x") == [1, 8, 64]
    for text in ("", "1,", "-1", "1.5", "9" * 12, "²"):
        with pytest.raises(ConfigError, match="--x"):
            _integers(text, "--x")


def test_a_library_that_is_missing_is_one_line_that_names_its_extra(
    run: Callable[[str], tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.json"
    trace.write_text('{"traceEvents": [{"ph": "X", "name": "step", "ts": 0, "dur": 1, "pid": 1, "tid": 1}]}')
    for module, library, extra, command in (
        ("thalweg.server.run", "uvicorn", "serve", "serve"),
        ("thalweg.profiler.sql", "duckdb", "trace", f"trace {trace} --sql select"),
    ):
        monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.setitem(sys.modules, library, None)
        code, _, said = run(command)
        assert (code, said) == (
            2,
            f"error: this needs {library}, which is not installed; pip install 'thalweg[{extra}]'\n",
        )


def test_a_module_that_no_extra_has_is_a_mistake_of_our_own() -> None:
    assert why_missing(ModuleNotFoundError(name="thalweg.nothing")) is None
    assert why_missing(ModuleNotFoundError(name="fastapi.routing")) is not None
