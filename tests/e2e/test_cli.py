"""The commands with a real engine, on the bundled model's shapes with random weights."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from thalweg.cli import main
from thalweg.config.model_source import model_folder

DUMMY = ["--load-format", "dummy", "--device", "cpu", "--cache-memory", "64MiB"]
COMMAND = [sys.executable, "-c", "from thalweg.cli import main; raise SystemExit(main())"]


def start(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*COMMAND, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def generate_json(capsys: pytest.CaptureFixture[str], *args: str) -> dict:
    assert main(["generate", *DUMMY, "--json", *args]) == 0
    return json.loads(capsys.readouterr().out)


def test_generate_streams_text_and_then_tells_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    found = generate_json(capsys, "--prompt", "Two and two", "--max-tokens", "12", "--ignore-eos")
    assert found["prompt"] == "Two and two"
    assert found["generated_tokens"] == len(found["token_ids"]) == 12
    assert found["finish_reason"] == "length"
    assert found["prompt_tokens"] > 0
    assert found["ttft_s"] > 0
    assert found["tokens_per_s"] > 0

    assert main(["generate", *DUMMY, "--prompt", "Two and two", "--max-tokens", "12", "--ignore-eos"]) == 0
    out, err = capsys.readouterr()
    assert out == found["text"] + "\n"
    assert f"{found['prompt_tokens']} prompt tokens, 12 generated, " in err
    assert "tokens/s" in err


def test_a_seed_gives_the_same_sample_again(capsys: pytest.CaptureFixture[str]) -> None:
    # Another seed draws other dummy weights too, so only the same one is compared.
    args = ("--prompt", "x", "--temperature", "1", "--max-tokens", "16", "--ignore-eos", "--seed", "5")
    assert generate_json(capsys, *args)["token_ids"] == generate_json(capsys, *args)["token_ids"]


def test_the_chat_template_is_used_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    plain = generate_json(capsys, "--prompt", "hello", "--max-tokens", "1")
    chat = generate_json(capsys, "--prompt", "hello", "--max-tokens", "1", "--chat")
    assert chat["prompt_tokens"] > plain["prompt_tokens"] + 4


def test_chat_reads_turns_from_a_pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "hello\n\nhello\n/reset\nhello\n/exit\nnever read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert main(["chat", *DUMMY, "--max-tokens", "4", "--ignore-eos", "--system", "Be brief."]) == 0
    out, err = capsys.readouterr()
    prompt_tokens = [int(line.split()[0]) for line in err.splitlines() if "prompt tokens" in line]
    assert len(prompt_tokens) == 3
    assert prompt_tokens[1] > prompt_tokens[0]  # the history
    assert prompt_tokens[2] == prompt_tokens[0]  # forgotten
    assert "forgotten" in err
    assert out.endswith("\n")


def test_chat_goes_on_after_a_turn_that_does_not_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("word " * 200 + "\nhi\n"))
    assert main(["chat", *DUMMY, "--max-model-len", "64", "--max-tokens", "2", "--ignore-eos"]) == 0
    err = capsys.readouterr().err
    assert "error: the prompt has" in err
    assert "2 generated" in err


def test_evals_print_their_figures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["eval", "arith", *DUMMY, "--num-questions", "3", "--max-new-tokens", "4", "--parallel", "2"]) == 0
    out = capsys.readouterr().out
    assert [line.split(":")[0] for line in out.splitlines()] == [
        "Questions",
        "Accuracy",
        "Invalid",
        "Latency",
        "Output throughput",
    ]
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "1 + 1?", "answer": "#### 2"}\n' * 4, encoding="utf-8")
    args = ["--data-path", str(data), "--num-shots", "1", "--max-new-tokens", "4", "--json"]
    assert main(["eval", "gsm8k", *DUMMY, *args]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_questions"] == 3
    assert found["errors"] == 0
    assert 0 < found["output_tokens"] <= 12
    assert {"accuracy", "invalid", "latency_s", "output_throughput"} <= set(found)


def test_bench_latency_writes_its_figures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    sizes = ["--batch-size", "1,3", "--input-len", "8", "--output-len", "4", "--num-iters", "2"]
    assert main(["bench", "latency", *DUMMY, *sizes, "--output-json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "TTFT ms" in out
    assert "torch" in out
    figures = json.loads(path.read_text())
    assert figures["ops"]["kda_mixer_decode"] in ("cpp", "reference")
    assert f"served by {figures['ops']['experts']}: experts" in out
    assert [part for part in figures["start_seconds"] if part != "recording"] == ["device", "weights", "cache"]
    assert [r["batch_size"] for r in figures["results"]] == [1, 3]
    assert figures["engine"]["load_format"] == "dummy"
    assert figures["machine"]["torch_threads"] >= 1
    for r in figures["results"]:
        assert 0 < r["min_ttft_ms"] <= r["median_ttft_ms"] <= r["max_ttft_ms"]
        assert set(r["host_us"]) == {"schedule", "build", "update", "output"}
        assert r["host_us_per_step"] == pytest.approx(sum(r["host_us"].values()))
        assert r["launches_per_step"] is None
        assert r["floor"]["step_bytes"] > 0
        assert r["floor"]["prefill_flops"] > r["floor"]["step_flops"]
        assert r["output_throughput"] == pytest.approx(r["batch_size"] * 4 / r["median_e2el_ms"] * 1e3)
    assert main(["bench", "latency", *DUMMY, "--output-len", "1", "--num-iters", "1"]) == 0


def test_inspect_needs_a_config_only(shared_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(shared_dir / "configs" / "kimi_linear_48b_a3b.json", tmp_path / "config.json")
    assert main(["inspect", str(tmp_path), "--dtype", "bfloat16", "--cache-memory", "8GiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 49_122_681_728
    assert round(found["active_parameters"] / 1e9, 2) == 3.11
    assert found["cost"]["bytes_per_token"] == 7 * 576 * 2
    assert found["cost"]["bytes_per_sequence"] == 20 * (32 * 128 * 128 * 4 + 3 * 3 * 4096 * 2)
    assert sum(found["layer_kinds"].values()) == len(found["layers"]) == 27
    assert found["memory"]["num_slots"] == 64
    assert found["memory"]["num_blocks"] > 0
    assert "no weight files" in found["weight_files"]
    assert {op["op"] for op in found["ops"]} >= {"norm_linear", "kda_mixer_prefill", "mla_prefill", "experts"}

    assert main(["inspect", str(tmp_path), "--cache-memory", "1MiB"]) == 0  # described, though it would not start
    out = capsys.readouterr().out
    assert "does not fit: " in out
    assert "--max-num-seqs 64" in out
    assert "8064" in out
    assert "49,122,681,728" in out

    assert main(["inspect", str(tmp_path), "-tp", "4", "--dtype", "bfloat16", "--json"]) == 0
    sharded = json.loads(capsys.readouterr().out)
    assert sharded["parameters"] == found["parameters"]
    assert sharded["cost"]["weight_bytes"] < found["cost"]["weight_bytes"] / 3

    assert main(["inspect", str(tmp_path), "--dtype", "bfloat16", "--quantization", "fp8", "--json"]) == 0
    quantized = json.loads(capsys.readouterr().out)
    assert quantized["cost"]["quantization"] == "fp8"
    assert quantized["checkpoint_cost"]["weight_bytes"] == found["cost"]["weight_bytes"]
    experts = 26 * 257 * 3 * 2304 * 1024  # from two bytes each to one, and a scale in four bytes a block
    assert found["cost"]["weight_bytes"] - quantized["cost"]["weight_bytes"] == experts - experts // 128**2 * 4


def test_inspect_takes_a_config_alone(shared_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "any-name.json"
    shutil.copy(shared_dir / "configs" / "kimi_linear_48b_a3b.json", path)
    (tmp_path / "model.safetensors").write_bytes(b"not looked at")
    for line in (["--config", str(path)], ["--config-file", str(path), "--load-format", "dummy"]):
        assert main(["inspect", *line, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["parameters"], found["weight_files"]) == (
            49_122_681_728,
            "not looked at (--config)",
        )
    assert main(["inspect", "--config", str(path), "--num-layers", "4"]) == 0
    assert "max num seqs    64: the default on a CPU" in capsys.readouterr().out
    assert main(["generate", "--config", str(path), "--prompt", "x"]) == 2  # to run it, random weights must be meant
    assert "needs --load-format dummy" in capsys.readouterr().err
    for absent in ("/no-such.json", str(tmp_path)):
        assert main(["inspect", "--config", absent]) == 2
        assert capsys.readouterr().err == f"error: --config-file is '{absent}', and there is no such file\n"


def test_a_config_key_can_be_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(model_folder(None), tmp_path / "model"))
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"sliding_window": None, "use_sliding_window": False, "layer_scales": [], "extra": {"on": False}}
    (folder / "config.json").write_text(json.dumps(raw))
    args = ["generate", str(folder), "--prompt", "x", "--max-tokens", "1", "--json"]
    assert main(args) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    (folder / "config.json").write_text(json.dumps(raw | {"sliding_window": 4096}))
    assert main(args) == 2
    assert "unknown key sliding_window, not supported; if it does not change the model, " in (
        error := capsys.readouterr().err
    )
    assert "--ignore-config-key sliding_window" in error
    assert main([*args, "--ignore-config-key", "sliding_window"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == text
    assert main([*args, "--ignore-config-key", "sliding_window", "--ignore-config-key", "slide"]) == 2
    assert "--ignore-config-key is 'slide', which " in capsys.readouterr().err


def test_inspect_compares_weight_files_with_the_config(
    shared_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    oracle = shared_dir / "oracles" / "kimi_linear"
    assert main(["inspect", str(oracle)]) == 0
    assert "all fit config.json" in capsys.readouterr().out
    raw = json.loads((oracle / "config.json").read_text())
    raw["intermediate_size"] += 1
    (tmp_path / "config.json").write_text(json.dumps(raw))
    shutil.copy(oracle / "model.safetensors", tmp_path)
    assert main(["inspect", str(tmp_path)]) == 2
    assert "misshapen" in capsys.readouterr().err


def damaged_model(folder: Path) -> str:
    for path in model_folder(None).iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copy(path, folder)
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    return str(folder)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ([*DUMMY, "--prompt", ""], "empty"),
        ([*DUMMY, "--prompt", "word " * 50, "--max-model-len", "16"], "--max-model-len"),
        ([*DUMMY, "--prompt", "x", "--op", "no_op=reference"], "no_op"),
        ([*DUMMY, "--prompt", "x", "--max-model-len", "1t"], "--max-model-len"),
        (["--load-format", "dummy", "--prompt", "x", "--cache-memory", "1"], "--cache-memory"),
        (["DAMAGED", "--prompt", "x"], "model.safetensors"),
    ],
)
def test_what_the_engine_refuses_is_one_line_and_exit_code_2(
    args: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [damaged_model(tmp_path) if arg == "DAMAGED" else arg for arg in args]
    assert main(["generate", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err


ENDLESS = ["generate", *DUMMY, "--prompt", "x", "--ignore-eos", "--max-tokens", "100000"]


def test_ctrl_c_ends_with_130_and_no_traceback() -> None:
    # A shell's background jobs ignore SIGINT, and so would what they start; a handled signal is back at its default.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start(*ENDLESS)
    signal.signal(signal.SIGINT, handler)
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == ""


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    process = start(*ENDLESS)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=30) == 1
    assert process.stderr.read() == ""
    process.stderr.close()
