"""--quantization fp8 in whole models: against float64 on the dequantized weights, over shards, ranks and formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.models import naive_kimi_linear as naive
from tests.models import random_checkpoint as random
from tests.models.plans import plan, read
from thalweg import LLM, SamplingParams
from thalweg.errors import ConfigError
from thalweg.models.family import step_costs
from thalweg.models.parts.part import Step
from thalweg.quant import scheme_named
from thalweg.quant.fp8_blocks import dequantize, quantize
from thalweg.weights.checkpoint import Checkpoint
from thalweg.weights.load import load
from thalweg.weights.plan import Target, local_bytes

# Blocks that are partial in both directions, and two shared experts.
ODD = dict(layers=3, full=(2,), hidden=144, experts=5, top_k=2, shared=2, inner=136, vocab=131, context=300)
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


def dequantized(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The experts' matrices as fp8 holds them."""
    experts = {n: w for n, w in weights.items() if ".experts." in n or ".shared_experts." in n}
    assert experts
    return {**weights, **{n: dequantize(*quantize(w), torch.float32) for n, w in experts.items()}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    c = random.config(**ODD)
    return random.write(tmp_path_factory.mktemp("model"), c, random.weights(c))


@pytest.mark.parametrize("size", [1, 2])
def test_logits_are_those_of_the_dequantized_experts(folder: Path, size: int) -> None:
    c = random.config(**ODD)
    ids = np.random.default_rng(0).integers(0, 131, 40).tolist()
    expected = naive.logits(c, dequantized(random.weights(c)), ids).numpy()
    with LLM(str(folder), quantization="fp8", tensor_parallel_size=size, max_num_seqs=2, block_size=16) as llm:
        np.testing.assert_allclose(llm.prompt_logits(ids).numpy(), expected, atol=2e-4, rtol=0)
        tokens = llm.generate([ids[:9]], GREEDY)[0].outputs[0].token_ids
    every = naive.logits(c, dequantized(random.weights(c)), ids[:9] + tokens).numpy()
    assert tokens == every[8:-1].argmax(-1).tolist()


def filled(targets: list[Target], checkpoint: Checkpoint) -> dict[str, Tensor]:
    dtypes = {"model": torch.float32, "float32": torch.float32, "float8_e4m3fn": torch.float8_e4m3fn}
    params = {
        t.name + s.suffix: torch.full(s.shape, torch.nan).to(dtypes[s.dtype]) for t in targets for s in t.parameters
    }
    load(targets, checkpoint, params.__getitem__)
    assert not any(p.float().isnan().any() for p in params.values())
    return params


def test_shards_of_a_checkpoint_and_of_ranks_hold_the_same_values(folder: Path, tmp_path: Path) -> None:
    raw = random.weights(random.config(**ODD))
    weight_map = {}
    for i in range(3):
        part = dict(sorted(raw.items(), key=lambda kv: kv[0][::-1])[i::3])
        save_file(part, tmp_path / f"model-{i + 1:05}-of-00003.safetensors")
        weight_map.update(dict.fromkeys(part, f"model-{i + 1:05}-of-00003.safetensors"))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    c = read(random.config(**ODD))
    targets = plan(c, 0, 1, "fp8")
    one, many = filled(targets, Checkpoint(folder)), filled(targets, Checkpoint(tmp_path))
    assert all(torch.equal(one[name].float(), many[name].float()) for name in one)

    def experts(params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        name = "layers.1.mlp.experts"
        gate_up, scales = params[f"{name}.gate_up"].unflatten(1, (2, -1)), params[f"{name}.gate_up_scale"]
        down = dequantize(params[f"{name}.down"], params[f"{name}.down_scale"], torch.float32)
        return dequantize(gate_up, scales.unflatten(1, (2, -1)), torch.float32), down

    ranks = [experts(filled(plan(c, rank, 2, "fp8"), Checkpoint(folder))) for rank in range(2)]
    whole = experts(one)
    assert torch.equal(torch.cat([gate_up for gate_up, _ in ranks], 2), whole[0])
    assert torch.equal(torch.cat([down for _, down in ranks], 2), whole[1])


def test_dummy_weights_are_quantized_and_counted(tmp_path: Path) -> None:
    c = random.config(**ODD)
    (tmp_path / "config.json").write_text(json.dumps(c))
    source: dict[str, Any] = dict(load_format="dummy", config_file=str(tmp_path / "config.json"), max_num_seqs=2)
    with LLM(**source, quantization="fp8") as llm:
        config = read(c)
        assert llm.info.weight_bytes == local_bytes(plan(config, 0, 1, "fp8"), 4)
        assert llm.info.weight_bytes < 0.5 * local_bytes(plan(config), 4)
        assert llm.info.quantization == "fp8"
        assert llm.prompt_logits([1, 2, 3]).isfinite().all()


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    c = random.config(layers=2, full=(1,), dense=2)
    random.write(tmp_path, c, random.weights(c))
    with pytest.raises(ConfigError, match=r"--quantization is 'fp8', .* has none; leave it out"):
        LLM(str(tmp_path), quantization="fp8")


def test_the_cost_of_a_step_counts_a_byte_an_element(shared_dir: Path) -> None:
    raw = json.loads((shared_dir / "configs/kimi_linear_48b_a3b.json").read_text())
    c = read(raw)
    full, fp8 = (step_costs(c, Step(1, cached=4000, scheme=scheme_named(q))) for q in (None, "fp8"))
    saved = 26 * 9 * 3 * 2304 * 1024 * (1 - 4 / 128**2)  # 26 layers of 8 experts and a shared one, a byte per element
    assert sum(x.bytes for x in full) - sum(x.bytes for x in fp8) == pytest.approx(saved, rel=1e-6)
    assert sum(x.flops for x in full) == sum(x.flops for x in fp8)
