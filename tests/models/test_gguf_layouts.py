"""Older and newer layouts of the same model, and what stays in blocks: all give the same logits."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.fixtures.gguf_files import converted, copied, joined, plain_tensor, rewritten
from tests.models import random_checkpoint, random_qwen
from thalweg import LLM, SamplingParams
from thalweg.config.gguf.file import GgufFile
from thalweg.config.gguf.write import NewTensor, write_gguf
from thalweg.config.model_source import model_folder
from thalweg.errors import ConfigError
from thalweg.models import family_of
from thalweg.models.family import weight_plan
from thalweg.models.gguf import architecture_for
from thalweg.models.parts.quantized import GgmlCheckpoint
from thalweg.quant import GgmlRows
from thalweg.weights.gguf_write import type_of
from thalweg.weights.plan import local_bytes

IDS = list(range(5, 65))
CONFIGS = ("kimi_linear_48b_a3b", "qwen3_5_9b", "qwen3_5_35b_a3b", "qwen3_next_80b_a3b", "kimi_k2_instruct")
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)

pytestmark = pytest.mark.skipif(
    not (model_folder(None) / "model.safetensors").exists(), reason="the bundled model's weights are absent"
)


def logits(path: Path | str, **options) -> Tensor:  # type: ignore[no-untyped-def]
    with LLM(str(path), max_num_seqs=2, quantize_activations=False, **options) as llm:
        return llm.prompt_logits(IDS)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    return {outtype: converted(folder / f"{outtype}.gguf", outtype) for outtype in ("f32", "q8_0", "q4_k_m")}


def values(file: GgufFile, name: str) -> np.ndarray:
    tensor = file.tensors[name]
    return np.frombuffer(file.mapped[tensor.start : tensor.stop], dtype=np.float32).reshape(tensor.shape)


def test_fused_projections_and_other_shapes(tiny: dict[str, Path], tmp_path: Path) -> None:
    """attn_qkv in place of three, convolution weights in two and three dimensions, kv_b in one, ssm_a as a vector."""
    file, changes, gone = GgufFile(tiny["f32"]), {}, []
    for n in (0, 1, 3, 4):
        at = f"blk.{n}."
        parts = [f"{at}attn_{x}.weight" for x in "qkv"]
        fused = f"{at}attn_qkv.weight"
        rows, columns = file.tensors[parts[0]].shape
        changes[fused] = joined(file, fused, parts, (3 * rows, columns))
        gone += parts
        for x in "qkv":
            conv = f"{at}ssm_conv1d_{x}.weight"
            channels = file.tensors[conv].rows
            changes[conv] = copied(file, conv, (channels, 1, 4) if x == "q" else (channels, 4))
        changes[f"{at}ssm_a"] = copied(file, f"{at}ssm_a", (4,))
        changes[f"{at}ssm_dt.bias"] = copied(file, f"{at}ssm_dt.bias", (1, 256))
    for n in (2, 5):
        k, v = (values(file, f"blk.{n}.attn_{x}_b.weight") for x in "kv")
        whole = np.concatenate([k.transpose(0, 2, 1), v], axis=1)
        changes[f"blk.{n}.attn_kv_b.weight"] = plain_tensor(f"blk.{n}.attn_kv_b.weight", whole.reshape(-1, k.shape[1]))
        gone += [f"blk.{n}.attn_k_b.weight", f"blk.{n}.attn_v_b.weight"]
    other = rewritten(tiny["f32"], tmp_path / "other.gguf", changes, gone)
    assert torch.equal(logits(other), logits(tiny["f32"]))


def test_fused_experts(tiny: dict[str, Path], tmp_path: Path) -> None:
    file, changes, gone = GgufFile(tiny["f32"]), {}, []
    for n in range(1, 6):
        gate, up = (values(file, f"blk.{n}.ffn_{x}_exps.weight") for x in ("gate", "up"))
        name = f"blk.{n}.ffn_gate_up_exps.weight"
        changes[name] = plain_tensor(name, np.concatenate([gate, up], axis=1))
        gone += [f"blk.{n}.ffn_{x}_exps.weight" for x in ("gate", "up")]
    other = rewritten(tiny["f32"], tmp_path / "other.gguf", changes, gone)
    assert torch.equal(logits(other), logits(tiny["f32"]))


def test_qwen3_next_packed_as_its_checkpoint_is(shared_dir: Path, tmp_path: Path) -> None:
    """Old files have q, k, v and z in ssm_in, key head by key head."""
    oracle = shared_dir / "oracles" / "qwen3_next"
    file, changes, gone = GgufFile(oracle / "model-f32.gguf"), {}, []
    for n in (0, 1, 2):
        qkv, z = (values(file, f"blk.{n}.attn_{x}.weight") for x in ("qkv", "gate"))
        q, k, v = qkv[:32], qkv[32:64], qkv[64:]
        heads = [np.concatenate([x[i * len(x) // 2 : (i + 1) * len(x) // 2] for x in (q, k, v, z)]) for i in (0, 1)]
        changes[f"blk.{n}.ssm_in.weight"] = plain_tensor(f"blk.{n}.ssm_in.weight", np.concatenate(heads))
        gone += [f"blk.{n}.attn_qkv.weight", f"blk.{n}.attn_gate.weight"]
    other = rewritten(oracle / "model-f32.gguf", tmp_path / "other.gguf", changes, gone)
    assert torch.equal(logits(other), logits(oracle / "model-f32.gguf"))


def test_kimi_k2_from_before_the_latent_was_cached(shared_dir: Path, tmp_path: Path) -> None:
    """Old files have one attn_kv_b, and the sizes of a head where later ones have the latent's."""
    oracle = shared_dir / "oracles" / "kimi_k2"
    file, changes, gone = GgufFile(oracle / "model-f32.gguf"), {}, []
    for n in range(3):
        k, v = (values(file, f"blk.{n}.attn_{x}_b.weight") for x in "kv")
        whole = np.concatenate([k.transpose(0, 2, 1), v], axis=1).reshape(-1, k.shape[1])
        changes[f"blk.{n}.attn_kv_b.weight"] = plain_tensor(f"blk.{n}.attn_kv_b.weight", whole)
        gone += [f"blk.{n}.attn_k_b.weight", f"blk.{n}.attn_v_b.weight"]
    tensors = {name: copied(file, name) for name in file.tensors if name not in gone}
    sizes = {"key_length": 24, "value_length": 16, "head_count_kv": 4}
    old = {key: value for key, value in file.metadata.items() if not key.endswith("_mla")}
    old |= {f"deepseek2.attention.{key}": size for key, size in sizes.items()}
    write_gguf(tmp_path / "old.gguf", old, [*{**tensors, **changes}.values()])
    assert torch.equal(logits(tmp_path / "old.gguf"), logits(oracle / "model-f32.gguf"))


def test_sizes_may_be_given_layer_by_layer(shared_dir: Path, tmp_path: Path) -> None:
    oracle = shared_dir / "oracles" / "qwen3_5" / "model-f32.gguf"
    file = GgufFile(oracle)
    arrays = {"qwen35.attention.head_count_kv": [0, 0, 0, 2], "qwen35.feed_forward_length": [96] * 4}
    tensors = [copied(file, name) for name in file.tensors]
    write_gguf(tmp_path / "x.gguf", file.metadata | arrays, tensors)
    assert torch.equal(logits(tmp_path / "x.gguf"), logits(oracle))
    write_gguf(tmp_path / "y.gguf", file.metadata | {"qwen35.feed_forward_length": [96, 96, 96, 64]}, tensors)
    with pytest.raises(ConfigError, match="one and the same for each layer"):
        logits(tmp_path / "y.gguf")


def test_split_files(tiny: dict[str, Path], tmp_path: Path) -> None:
    file = GgufFile(tiny["q8_0"])
    names = list(file.tensors)
    for n in range(3):
        own = file.metadata if n == 0 else {}
        metadata = {**own, "split.no": n, "split.count": 3, "split.tensors.count": len(names)}
        write_gguf(tmp_path / f"m-0000{n + 1}-of-00003.gguf", metadata, [copied(file, name) for name in names[n::3]])
    assert torch.equal(logits(tmp_path / "m-00002-of-00003.gguf"), logits(tiny["q8_0"]))
    assert torch.equal(logits(tmp_path), logits(tiny["q8_0"]))  # a folder with nothing else


@pytest.mark.parametrize("outtype", ["q8_0", "q4_k_m"])
def test_weights_stay_in_blocks_and_give_the_same(tiny: dict[str, Path], outtype: str) -> None:
    """Kept or brought to float32 as they are loaded."""
    exact = {"max_num_seqs": 2, "quantize_activations": False}
    with LLM(str(tiny[outtype]), **exact) as kept, LLM(str(tiny[outtype]), dequantize=True) as widened:
        torch.testing.assert_close(kept.prompt_logits(IDS), widened.prompt_logits(IDS), atol=1e-4, rtol=0)
        outputs = [llm.generate(IDS, GREEDY)[0].outputs[0].token_ids for llm in (kept, widened)]
        assert outputs[0] == outputs[1]
        assert kept.info.quantization is not None
        assert outtype[:2].upper() in kept.info.quantization
        assert widened.info.quantization is None
        assert kept.info.weight_bytes < 0.5 * widened.info.weight_bytes


@pytest.mark.parametrize("name", CONFIGS)
def test_what_published_models_take_in_memory(shared_dir: Path, name: str) -> None:
    """A Q4_K_M is at most 1.1 times its file, though what is in float32 beside the blocks is twice as large as in
    bfloat16: norms, routers, low-rank and latent up-projections."""
    raw = json.loads((shared_dir / "configs" / f"{name}.json").read_text())
    raw.pop("quantization_config", None)
    family = family_of(raw)
    config = family.read(raw)
    architecture = architecture_for(family, config)
    layout = architecture.layout(config)
    names = architecture.names(config, layout)
    types = {
        gguf: type_of(gguf, shape, "q4_k_m", layers=len(config.layers), tied=config.vocab.tied)
        for gguf, shape in names.shapes.items()
    }
    used = {piece.name for held in names.held.values() for piece in held.pieces}
    file_bytes = sum(types[gguf].row_bytes(prod(names.shapes[gguf])) for gguf in used)
    kinds = {}
    for theirs, held in names.held.items():
        kind = types[held.pieces[0].name]
        kinds[theirs] = "F32" if held.change != "none" else kind.name
    kept = replace(config, quantized=GgmlCheckpoint(kinds, GgmlRows.average({"Q4_K": 256})))
    plan = weight_plan(family, kept, tensors=frozenset(kinds))
    assert local_bytes(plan, 4) <= 1.1 * file_bytes


@pytest.mark.slow
def test_ranks_share_blocks(tiny: dict[str, Path]) -> None:
    """Rows are shared out between any two, columns between blocks: 256 columns of 8 blocks, but not of one."""
    for outtype in ("f32", "q8_0"):
        got = logits(tiny[outtype], tensor_parallel_size=2)
        torch.testing.assert_close(got, logits(tiny[outtype]), atol=1e-4, rtol=0)
    with pytest.raises(ConfigError, match=r"within a block of 256 \(Q._K\); choose a size .*, or --dequantize"):
        logits(tiny["q4_k_m"], tensor_parallel_size=2)
    got = logits(tiny["q4_k_m"], tensor_parallel_size=2, dequantize=True)
    torch.testing.assert_close(got, logits(tiny["q4_k_m"]), atol=1e-4, rtol=0)


def test_tied_embeddings_in_blocks(shared_dir: Path, tmp_path: Path) -> None:
    """One matrix of blocks is embedding and head: without output.weight the file has it once."""
    oracle = shared_dir / "oracles" / "qwen3_5"
    whole = converted(tmp_path / "q8.gguf", "q8_0", str(oracle / "model-f32.gguf"))
    tied = rewritten(whole, tmp_path / "tied.gguf", {}, ["output.weight"])
    file = GgufFile(whole)
    tensor = file.tensors["token_embd.weight"]
    head = NewTensor("output.weight", tensor.type, tensor.shape, lambda: file.mapped[tensor.start : tensor.stop])
    untied = rewritten(whole, tmp_path / "untied.gguf", {"output.weight": head})
    with LLM(str(tied), quantize_activations=False) as llm:
        assert llm.info.parameters == GgufFile(tied).tensors["token_embd.weight"].rows * 64 + sum(
            t.rows * t.columns for t in GgufFile(tied).tensors.values() if t.name != "token_embd.weight"
        )
        assert torch.equal(llm.prompt_logits(IDS), logits(untied))


def test_value_heads_in_another_order_stay_in_blocks(shared_dir: Path, tmp_path: Path) -> None:
    """Qwen3.5's value heads are reordered by rows, and those of ssm_out by columns: whole blocks are moved, and where a
    block spans two heads (of 16 dims here) columns are put in order when they are multiplied."""
    oracle = shared_dir / "oracles" / "qwen3_5"
    path = converted(tmp_path / "q8.gguf", "q8_0", str(oracle / "model-f32.gguf"))
    with LLM(str(path)) as llm:
        schemes = [str(op.dims.get("scheme")) for op in llm.info.ops]
        assert "Q8_0 64, tiled 2 x 2 x 16" in schemes
    torch.testing.assert_close(logits(path), logits(path, dequantize=True), atol=1e-4, rtol=0)
    with pytest.raises(ConfigError, match="or --dequantize"):
        logits(path, tensor_parallel_size=2)


def test_value_heads_of_whole_blocks_are_moved(tmp_path: Path) -> None:
    c = random_qwen.config(key_heads=2, value_heads=4, key_dim=32, value_dim=32, hidden=64)
    folder = tmp_path / "model"
    random_checkpoint.write(folder, c, random_qwen.published(c, random_qwen.weights(c), prefix="model."))
    path = converted(tmp_path / "q8.gguf", "q8_0", str(folder))
    with LLM(str(path)) as llm:
        assert not any("tiled" in str(op.dims.get("scheme")) for op in llm.info.ops)
    expected = logits(path, dequantize=True)
    torch.testing.assert_close(logits(path), expected, atol=1e-4, rtol=0)
