"""What we write is what llama.cpp's converter writes of the same checkpoint; converted back it is the checkpoint."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.fixtures.gguf_files import converted
from tests.models.gguf_record import held
from thalweg import LLM
from thalweg.assembly.convert import to_safetensors
from thalweg.config.engine import EngineConfig
from thalweg.config.gguf.file import GgufFile
from thalweg.config.model_source import model_folder
from thalweg.quant.ggml_blocks import dequantize
from thalweg.weights.checkpoint import Checkpoint

FAMILIES = ("kimi_k2", "qwen3_5", "qwen3_5_moe", "qwen3_next")
# Its file's name and size are its own; without dense blocks their width says nothing, and we leave it out.
NOT_WRITTEN = (
    *("general.name", "general.size_label", "qwen35moe.feed_forward_length", "qwen3next.feed_forward_length"),
    *("kimi-linear.rope.freq_base", "tokenizer.ggml.padding_token_id"),  # nothing is rotated, and nothing padded
)
# It leaves out what it derives: merges of a vocabulary of ranks, and what Kimi-Linear always has.
WRITTEN_BESIDES = {
    *("kimi-linear.expert_weights_norm", "kimi-linear.expert_group_count", "kimi-linear.expert_group_used_count"),
    *("qwen35moe.vocab_size", "tokenizer.ggml.merges", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.eot_token_id"),
}
RECORDED = json.loads((Path(__file__).parents[1] / "fixtures" / "llama_cpp_files.json").read_text())
MODELS = {"thalweg-tiny": None, "thalweg-tiny-gdn": str(Path(__file__).parents[2] / "models" / "thalweg-tiny-gdn")}


@pytest.fixture(params=FAMILIES)
def oracle(request: pytest.FixtureRequest, shared_dir: Path) -> Path:
    return shared_dir / "oracles" / request.param


def unstacked(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """A checkpoint's tensors as a text model's with each expert by itself, without the layer that drafts tokens."""
    tensors: dict[str, Tensor] = {}
    for name in checkpoint.tensors:
        short, values = name.replace("model.language_model.", "model."), checkpoint.read(name)
        if short.endswith("experts.gate_up_proj"):
            for e, both in enumerate(values):
                at = short.replace("gate_up_proj", str(e))
                tensors[f"{at}.gate_proj.weight"], tensors[f"{at}.up_proj.weight"] = both.chunk(2)
        elif short.endswith("experts.down_proj"):
            at = short.removesuffix(".down_proj")
            tensors |= {f"{at}.{e}.down_proj.weight": expert for e, expert in enumerate(values)}
        elif not short.startswith("mtp."):
            tensors[short] = values
    return tensors


def test_files_are_those_of_llama_cpp(oracle: Path, tmp_path: Path) -> None:
    ours = GgufFile(converted(tmp_path / "ours.gguf", "f32", str(oracle)))
    theirs = GgufFile(oracle / "model-f32.gguf")
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in theirs.tensors.items():
        mine = ours.tensors[name]
        assert (mine.type, mine.shape) == (tensor.type, tensor.shape)
        written, expected = (f.mapped[t.start : t.stop] for f, t in ((ours, mine), (theirs, tensor)))
        if name.endswith("ssm_a"):  # an exponential, which processors round as they do
            pair = (np.frombuffer(data, dtype=np.float32) for data in (written, expected))
            np.testing.assert_allclose(*pair, rtol=1e-6)
        else:
            assert written == expected
    for key, value in theirs.metadata.items():
        assert key in NOT_WRITTEN or ours.metadata[key] == value, key
    assert ours.metadata.keys() <= theirs.metadata.keys()


def test_converting_back_gives_the_checkpoint(oracle: Path, tmp_path: Path) -> None:
    to_safetensors(EngineConfig(model=str(oracle / "model-f32.gguf")), tmp_path / "back", "f32")
    back, original = Checkpoint(tmp_path / "back"), Checkpoint(oracle)
    expected = unstacked(original)
    assert back.tensors.keys() == expected.keys()
    for name in back.tensors:
        torch.testing.assert_close(back.read(name), expected[name].float(), atol=1e-6, rtol=1e-6)
    ids, logits = np.load(oracle / "ids.npy"), np.load(oracle / "logits.npy")
    with LLM(str(tmp_path / "back"), max_num_seqs=2) as llm:
        np.testing.assert_allclose(llm.prompt_logits(ids[0]).numpy(), logits[0], atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_files_with_tokenizers_are_those_of_llama_cpp(tmp_path: Path, name: str) -> None:
    """Tokens and their types, templates, and the layer that drafts tokens included."""
    if not (model_folder(MODELS[name]) / "model.safetensors").exists():
        pytest.skip("the model's weights are absent")
    ours, theirs = held(converted(tmp_path / f"{name}.gguf", "f32", MODELS[name])), RECORDED[name]
    for tensors in (ours["tensors"], theirs["tensors"]):  # an exponential, which processors round as they do
        tensors |= {n: held_as[:2] for n, held_as in tensors.items() if n.endswith("ssm_a")}
    assert ours["tensors"] == theirs["tensors"]
    for key, value in theirs["metadata"].items():
        assert key in NOT_WRITTEN or ours["metadata"][key] == value, key
    assert ours["metadata"].keys() - theirs["metadata"].keys() <= WRITTEN_BESIDES


@pytest.mark.parametrize("name", ["kimi_k2_fp8", "kimi_k2_int4", "qwen3_5_moe_fp8"])
def test_quantised_checkpoints_are_dequantised(shared_dir: Path, tmp_path: Path, name: str) -> None:
    folder = shared_dir / "oracles" / name
    ids, expected = np.load(folder / "ids.npy"), np.load(folder / "logits.npy")
    with LLM(str(converted(tmp_path / "x.gguf", "f32", str(folder))), max_num_seqs=2) as llm:
        np.testing.assert_allclose(llm.prompt_logits(ids[0]).numpy(), expected[0], atol=2e-4, rtol=0)


def test_keys_of_kimi_linear_are_those_of_llama_cpp(shared_dir: Path, tmp_path: Path) -> None:
    theirs = GgufFile(shared_dir / "oracles" / "kimi_linear_gguf" / "model-Q8_0.gguf")
    ours = GgufFile(converted(tmp_path / "ours.gguf", "q8_0", str(theirs.path)))
    for key, value in theirs.metadata.items():
        assert ours.metadata[key] == value, key
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in theirs.tensors.items():
        assert ours.tensors[name].type == tensor.type, name
        assert ours.tensors[name].rows == tensor.rows
        assert ours.tensors[name].columns == tensor.columns


def numbers(file: GgufFile, name: str) -> Tensor:
    tensor = file.tensors[name]
    rows = torch.frombuffer(bytearray(file.mapped[tensor.start : tensor.stop]), dtype=torch.uint8)
    return dequantize(rows.view(tensor.rows, -1), tensor.type, torch.float32)


def test_our_mix_is_that_of_llama_cpp(shared_dir: Path, tmp_path: Path) -> None:
    """The types of every tensor of a Q4_K_M, fallbacks included; and with each ours are no further from the numbers."""
    folder = shared_dir / "oracles" / "kimi_linear_gguf"
    theirs, original = (GgufFile(folder / f"model-{name}.gguf") for name in ("Q4_K_M", "Q8_0"))
    ours = GgufFile(converted(tmp_path / "ours.gguf", "q4_k_m", str(original.path)))
    assert {n: t.type for n, t in ours.tensors.items()} == {n: t.type for n, t in theirs.tensors.items()}
    errors: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, tensor in ours.tensors.items():
        true = numbers(original, name)
        for i, file in enumerate((ours, theirs)):
            errors[tensor.type.name][i] += float((numbers(file, name) - true).square().sum())
    assert set(errors) == {"F32", "Q4_K", "Q5_0", "Q6_K"}
    assert all(mine <= 1.01 * its for mine, its in errors.values()), errors
