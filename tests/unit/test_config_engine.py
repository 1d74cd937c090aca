"""EngineConfig refuses what cannot be honoured, in the command line's words, and decides every "auto"."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from thalweg.config import env
from thalweg.config.engine import EngineConfig, parse_size
from thalweg.config.model_source import model_folder
from thalweg.errors import ConfigError


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_num_seqs", 0),
        ("max_num_seqs", True),
        ("max_num_seqs", "64"),
        ("max_num_batched_tokens", 0),
        ("max_model_len", 0),
        ("max_model_len", 1.5),
        ("block_size", 0),
        ("cache_memory", 0),
        ("gpu_memory_utilization", 0),
        ("gpu_memory_utilization", 1.01),
        ("gpu_memory_utilization", float("nan")),
        ("gpu_memory_utilization", "0.9"),
        ("tensor_parallel_size", 0),
        ("tensor_parallel_size", 10**6),
        ("dtype", "int8"),
        ("quantization", "int4"),
        ("quantization", ""),
        ("state_dtype", "float16"),
        ("device", "gpu"),
        ("device", "cuda:x"),
        ("load_format", "gguf"),
        ("seed", 2**64),
        ("model", ""),
        ("tokenizer", 3),
        ("ignore_config_key", "sliding_window"),
        ("ignore_config_key", [""]),
        ("op_preference", ["*"]),
        ("op_preference", {"*": 1}),
        ("enable_prefix_caching", "yes"),
        ("snapshot_interval", 0),
        ("cpu_cache_memory", 0),
    ],
)
def test_a_value_out_of_range_is_one_line_that_names_the_option(option: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**{option: value})  # type: ignore[arg-type]
    message = str(caught.value)
    shown = "MODEL" if option == "model" else f"--{option.replace('_', '-')}"  # an argument, not an option
    assert message.startswith(f"{shown} is {value!r}; expected ")
    assert "\n" not in message


def test_defaults_are_valid_and_frozen() -> None:
    config = EngineConfig()
    assert config.max_num_seqs is None  # left to the device
    with pytest.raises(FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize("given", [{}, {"enable_prefix_caching": False}, {"tensor_parallel_size": 2}])
def test_prefixes_are_cached_unless_told_otherwise(device: str, given: dict[str, Any]) -> None:
    found = EngineConfig(**given).resolve(device=device, checkpoint_dtype="bfloat16", context_len=100, layers=2)
    assert found.enable_prefix_caching is given.get("enable_prefix_caching", True)


def test_a_budget_below_the_number_of_sequences_is_allowed() -> None:
    assert EngineConfig(max_num_seqs=64, max_num_batched_tokens=1).max_num_batched_tokens == 1


def test_op_preference_does_not_follow_the_callers_dict() -> None:
    prefer = {"*": "reference"}
    config = EngineConfig(op_preference=prefer)
    prefer["*"] = "triton"
    assert dict(config.op_preference) == {"*": "reference"}
    with pytest.raises(TypeError):
        config.op_preference["*"] = "triton"  # type: ignore[index]


def test_to_dict_gives_the_same_config_back() -> None:
    config = EngineConfig(model="m", op_preference={"kda_decode": "triton"}, seed=7, ignore_config_key=["a", "b.c"])
    assert EngineConfig(**config.to_dict()) == config
    assert type(config.to_dict()["op_preference"]) is dict


@pytest.mark.parametrize(
    ("asked", "device", "checkpoint", "got"),
    [
        ("auto", "cpu", "bfloat16", "float32"),
        ("auto", "cuda:0", "bfloat16", "bfloat16"),
        ("auto", "cuda:0", "float32", "float32"),
        ("bfloat16", "cpu", "float32", "bfloat16"),
    ],
)
def test_resolve_decides_the_dtype(asked: str, device: str, checkpoint: str, got: str) -> None:
    resolved = EngineConfig(dtype=asked, load_format="safetensors").resolve(
        device=device, checkpoint_dtype=checkpoint, context_len=4096, layers=2
    )
    assert (resolved.dtype, resolved.device, resolved.load_format) == (got, device, "auto")


def test_resolve_keeps_a_device_that_was_named_and_refuses_too_long_a_context() -> None:
    config = EngineConfig(device="cpu", max_model_len=4097)
    with pytest.raises(ConfigError, match="--max-model-len is 4097; expected at most 4096"):
        config.resolve(device="cuda", checkpoint_dtype="bfloat16", context_len=4096, layers=2)
    assert config.resolve(device="cuda", checkpoint_dtype="bfloat16", context_len=4097, layers=2).device == "cpu"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("4096", 4096),
        ("32k", 32 * 1024),
        ("1m", 1 << 20),
        ("1.5M", 3 << 19),
        ("2GiB", 2 << 30),
        ("2g", 2 << 30),
        ("40gb", 40 * 10**9),
        ("1 TiB", 1 << 40),
        (" 8k ", 8192),
        ("10B", 10),
    ],
)
def test_sizes(text: str, value: int) -> None:
    assert parse_size(text, "--max-model-len") == value


@pytest.mark.parametrize("text", ["", "k", "-1", "1e3", "12x", "1.0001k", "9" * 30, "1i", "nan", "1 2"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--cache-memory is "):
        parse_size(text, "--cache-memory")


def test_a_model_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    assert model_folder(str(tmp_path)) == tmp_path
    assert model_folder(None) == model_folder("thalweg-tiny")
    assert model_folder(None).name == "thalweg-tiny"
    with pytest.raises(ConfigError, match=r"MODEL is .*file'?, a file; expected a folder"):
        model_folder(str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"no such folder$"):
        model_folder("./nowhere/at/all")
    (tmp_path / "thalweg-tiny").mkdir()  # a folder of the user's own comes first
    assert model_folder("thalweg-tiny") == Path("thalweg-tiny")


def test_only_known_environment_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THALWEG_LOG_LEVEL", "debug")
    monkeypatch.setenv("THALWEG_API_KEY", "")
    assert env.read("THALWEG_LOG_LEVEL") == "debug"
    assert env.read("THALWEG_API_KEY") is None
    with pytest.raises(KeyError):
        env.read("HOME")


@pytest.mark.parametrize(("device", "tokens"), [("cpu", 2048), ("cuda:0", 16384)])
def test_tokens_of_a_step_follow_the_device(device: str, tokens: int) -> None:
    arguments = dict(device=device, checkpoint_dtype="bfloat16", context_len=4096, layers=2)
    assert EngineConfig().resolve(**arguments).max_num_batched_tokens == tokens
    assert EngineConfig(max_num_batched_tokens=5).resolve(**arguments).max_num_batched_tokens == 5


def test_prompts_run_as_graphs_unless_a_number_is_given() -> None:
    arguments = dict(device="cuda:0", checkpoint_dtype="bfloat16", context_len=4096, layers=2)
    assert EngineConfig().resolve(**arguments).prefill_graph_tokens == 2048
    assert EngineConfig().resolve(**arguments | {"layers": 32}).prefill_graph_tokens == 2048
    assert EngineConfig().resolve(**arguments | {"layers": 33}).prefill_graph_tokens == 4096  # longer to launch
    assert EngineConfig(tensor_parallel_size=2).resolve(**arguments).prefill_graph_tokens == 4096
    data_parallel = EngineConfig(data_parallel_size=2, enable_expert_parallel=True)
    assert data_parallel.resolve(**arguments).prefill_graph_tokens == 4096
    for tokens in (0, 512):
        config = EngineConfig(tensor_parallel_size=2, prefill_graph_tokens=tokens)
        assert config.resolve(**arguments).prefill_graph_tokens == tokens
