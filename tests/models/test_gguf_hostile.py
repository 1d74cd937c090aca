"""GGUF files whose metadata or tensors do not fit: each gives one line that names what is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fixtures.gguf_files import converted, copied, plain_tensor, rewritten
from thalweg import LLM
from thalweg.assembly.model import open_model
from thalweg.config.engine import EngineConfig
from thalweg.config.gguf.file import GgufFile
from thalweg.config.gguf.write import NewTensor, write_gguf
from thalweg.config.model_source import model_folder
from thalweg.errors import CheckpointError, ConfigError, ThalwegError, UnsupportedError
from thalweg.quant.ggml_types import TYPES
from thalweg.text.codec import load_codec

pytestmark = pytest.mark.skipif(
    not (model_folder(None) / "model.safetensors").exists(), reason="the bundled model's weights are absent"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    return {outtype: converted(folder / f"{outtype}.gguf", outtype) for outtype in ("f32", "q4_k_m")}


def load(path: Path) -> None:
    with LLM(str(path), max_num_seqs=2):
        pass


def test_missing_surplus_and_misshapen_tensors_are_named(tiny: dict[str, Path], tmp_path: Path) -> None:
    file = GgufFile(tiny["f32"])
    path = tmp_path / "bad.gguf"
    in_blocks = NewTensor("output_norm.weight", TYPES["Q8_0"], (256,), lambda: bytes(272))
    for changes, gone, message in (
        ({}, ["blk.0.attn_q.weight"], "1 missing: blk.0.attn_q.weight"),
        ({"blk.0.odd.weight": plain_tensor("blk.0.odd.weight", np.ones(4))}, [], "1 unexpected: blk.0.odd.weight"),
        ({"blk.0.attn_q.weight": plain_tensor("blk.0.attn_q.weight", np.ones((8, 256)))}, [], "blk.0.attn_q.weight"),
        ({"blk.0.attn_q.weight": copied(file, "blk.0.attn_q.weight", (512, 128))}, [], "[512, 128], not what holds"),
        ({"blk.2.attn_k_b.weight": copied(file, "blk.2.attn_k_b.weight", (4, 32, 64))}, [], "[heads, rank, nope]"),
        ({"output_norm.weight": in_blocks}, [], "[256] in Q8_0, not a vector of numbers"),
        ({"blk.0.ssm_a": plain_tensor("blk.0.ssm_a", np.ones(4))}, [], "expected -exp(A_log)"),
    ):
        rewritten(tiny["f32"], path, changes, gone)
        with pytest.raises(CheckpointError) as caught:
            load(path)
        assert message in str(caught.value)
    assert "blk.0.attn_q.weight" in file.tensors


def test_other_architectures_are_refused_by_name(tiny: dict[str, Path], tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", {"general.architecture": "llama"}, [])
    with pytest.raises(UnsupportedError, match="'llama'; expected one of kimi-linear, deepseek2, qwen3next"):
        LLM(str(tmp_path / "x.gguf"))
    write_gguf(tmp_path / "y.gguf", {}, [])
    with pytest.raises(CheckpointError, match=r"general.architecture is None"):
        LLM(str(tmp_path / "y.gguf"))


ODD = st.sampled_from(
    [0, 1, 3, 255, 65535, 2**31 - 1, 2**32 - 1, -1, True, 0.0, -1.0, float("nan"), float("inf"), 1e-30, "", "yarn", []]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_metadata_give_a_model_or_one_line(tiny: dict[str, Path], tmp_path: Path, data: st.DataObject) -> None:
    file = GgufFile(tiny["q4_k_m"])
    keys = data.draw(st.lists(st.sampled_from(sorted(file.metadata)), min_size=1, max_size=2))
    changes = {key: data.draw(ODD) for key in keys}
    write_gguf(tmp_path / "x.gguf", file.metadata | changes, [copied(file, name) for name in file.tensors])
    config, fault = EngineConfig(model=str(tmp_path / "x.gguf"), device="cpu"), ""
    try:
        open_model(config, 0)
        load_codec(config)
    except ThalwegError as error:
        fault = str(error)
    assert "\n" not in fault


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kimi-linear.block_count": 0}, "block_count is 0"),
        ({"kimi-linear.block_count": 2**31}, "block_count is 2147483648"),
        ({"kimi-linear.block_count": ["x", "y"]}, "one and the same for each layer"),
        ({"kimi-linear.expert_count": 2**20}, "expert_count is 1048576; expected 8, the experts that there are"),
        ({"kimi-linear.attention.head_count": "4"}, "head_count is '4'; expected an integer"),
        ({"kimi-linear.attention.head_count_kv": [1]}, "expected an integer for each of 6 layers"),
        ({"kimi-linear.expert_gating_func": 1}, "expected 2, which is sigmoid"),
        ({"kimi-linear.vocab_size": 7}, "vocab_size is 7; expected 1280"),
        ({"kimi-linear.context_length": True}, "context_length is True"),
        ({"general.sampling.temp": -1.0}, "temperature"),
    ],
)
def test_hostile_hyperparameters(tiny: dict[str, Path], tmp_path: Path, changes, message: str) -> None:  # type: ignore[no-untyped-def]
    file = GgufFile(tiny["f32"])
    tensors = [copied(file, name) for name in file.tensors]
    write_gguf(tmp_path / "x.gguf", file.metadata | changes, tensors)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        load(tmp_path / "x.gguf")
