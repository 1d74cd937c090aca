"""The Qwen families on other shapes than the oracles', in every published layout, against a second implementation in
float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models import naive_qwen as naive
from tests.models import random_qwen as random
from tests.models.test_kimi_k2 import holds, ids_of
from thalweg import LLM, SamplingParams
from thalweg.errors import UnsupportedError

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4,
        "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2], "mrope_interleaved": True}  # fmt: skip

SHAPES: dict[str, dict[str, Any]] = {
    "6 value heads over 2 key heads, 8 layers, 12 experts": dict(
        layers=8, hidden=48, value_heads=6, key_dim=12, value_dim=20, heads=6, head_dim=24, rotary=0.5, experts=12,
        top_k=4, inner=20, shared=36, vocab=777, tie_word_embeddings=True,
    ),
    "a shared expert as wide as the others": dict(inner=28, shared=28),
    "dense, one key head": dict(dense=56, key_heads=1, value_heads=3, heads=3, kv_heads=1, head_dim=16, rotary=1.0),
    "all experts, as many key heads as value heads": dict(experts=3, top_k=3, value_heads=2, heads=2, layers=2,
                                                          full_attention_interval=2),
    "full attention only": dict(layers=2, dense=40, layer_types=["full_attention"] * 2),
    "linear attention only": dict(layers=2, layer_types=["linear_attention"] * 2),
    "YaRN": dict(dense=40, rope_parameters=YARN),
}  # fmt: skip
ODD = next(iter(SHAPES))


@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes_against_float64(tmp_path: Path, name: str) -> None:
    c = random.config(**SHAPES[name])
    w = random.weights(c, seed=3)
    ids = ids_of(c, 61, seed=1)  # with 0, float32's rounding alone comes to 1.8e-4 at two tokens, in plain torch too
    expected = naive.logits(c, w, ids)
    folder = random.write(tmp_path / "model", c, random.published(c, w, prefix="model.", stacked="num_experts" in c))
    for chunk, block_size in ((4096, 16), (13, 8), (1, 1)):
        holds(folder, ids, expected, max_num_batched_tokens=chunk, block_size=block_size)


LAYOUTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "flat, experts stacked": (dict, dict(prefix="model.", stacked=True)),
    "flat, each expert, the other prefix": (dict, dict(prefix="model.language_model.")),
    "nested, experts stacked": (random.nested, dict(stacked=True)),
    "nested, each expert, the other prefix": (random.nested, dict(prefix="model.")),
    "Qwen3-Next": (random.as_next, dict(prefix="model.", packed=True)),
    "Qwen3-Next, stacked": (random.as_next, dict(prefix="model.", packed=True, stacked=True)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same(tmp_path: Path, name: str) -> None:
    """Beside tensors of a vision model and of an MTP layer, which hold NaN."""
    of_text, layout = LAYOUTS[name]
    c = random.config(**SHAPES[ODD] | dict(layers=4))
    w = random.weights(c)
    ids = ids_of(c, 30)
    tensors = random.beside_the_text(random.published(c, w, **layout))
    holds(random.write(tmp_path / "model", of_text(c), tensors), ids, naive.logits(c, w, ids), block_size=16)


# Widths whose blocks are ragged, and two blocks in some.
WIDE: dict[str, Any] = dict(hidden=144, value_heads=6, key_dim=32, value_dim=24, head_dim=40, inner=136, shared=72,
                            rotary=0.4)  # fmt: skip


@pytest.mark.parametrize("kept", [(), ("0.mlp.experts.2.up_proj",), ("1.linear_attn.in_proj_z", "o_proj")], ids=str)
@pytest.mark.parametrize("form", ["nested", "Qwen3-Next"])
def test_published_fp8(tmp_path: Path, kept: tuple[str, ...], form: str) -> None:
    """Experts are not stacked there. A list may keep more modules in bfloat16 than usual."""
    of_text, layout = (random.nested, {}) if form == "nested" else (random.as_next, dict(prefix="model.", packed=True))
    c = random.config(**WIDE)
    tensors, quantization = random.in_fp8(random.published(c, random.weights(c), **layout), kept)
    folder = random.write(tmp_path / "model", of_text({**c, "quantization_config": quantization}), tensors)
    if "0.mlp.experts.2.up_proj" in kept:
        with pytest.raises(UnsupportedError, match=r"experts.*some are in fp8; expected all or none"):
            LLM(str(folder))
        return
    held, ids = random.unpublished(c, random.out_of_fp8(tensors), **layout), ids_of(c, 30)
    for chunk in (4096, 7):
        holds(folder, ids, naive.logits(c, held, ids), max_num_batched_tokens=chunk)


def test_batched_and_preempted_requests_give_what_each_gives_alone(tmp_path: Path) -> None:
    c = random.config(**SHAPES[ODD])
    w = random.weights(c)
    folder = random.write(tmp_path / "model", c, random.published(c, w, stacked=True))
    prompts = [ids_of(c, 3 + 11 * i, seed=i) for i in range(6)]
    with LLM(str(folder), dtype="float32", max_num_seqs=1) as llm:
        alone = [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY)]
        memory = 5 * llm.info.bytes_per_sequence + 30 * 4 * llm.info.bytes_per_token
    with LLM(
        str(folder), dtype="float32", max_num_seqs=4, max_num_batched_tokens=24, block_size=4, max_model_len=80,
        cache_memory=memory,
    ) as llm:  # fmt: skip
        together = llm.generate(prompts, GREEDY)
        assert llm.engine.core.stats().num_preemptions > 0
    assert [o.outputs[0].token_ids for o in together] == alone
    for prompt, tokens in zip(prompts, alone, strict=True):
        every = naive.logits(c, w, prompt + tokens)
        assert tokens == every[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_projections_apart_give_the_same(tmp_path: Path) -> None:
    """What `--op` asks for, though it serves nobody by default."""
    c = random.config()
    folder = random.write(tmp_path / "model", c, random.published(c, random.weights(c)))
    found = []
    for op_preference in ({}, {"norm_linear": "separate"}):
        with LLM(str(folder), dtype="float32", max_num_seqs=2, op_preference=op_preference) as llm:
            (output,) = llm.generate([ids_of(c, 40)], GREEDY)
            found.append((llm.prompt_logits(ids_of(c, 40)), output.outputs[0].token_ids))
    (logits, tokens), (other_logits, other_tokens) = found
    np.testing.assert_allclose(other_logits.numpy(), logits.numpy(), atol=1e-5, rtol=0)
    assert other_tokens == tokens


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_ranks_give_the_logits_of_one(tmp_path: Path, ranks: int, fp8: bool) -> None:
    """With 2 key heads and 2 KV heads for 4 ranks, and 3 value heads per key head on 2; in fp8 ranks cut between
    blocks, experts' within one."""
    blocks = dict(value_dim=128, head_dim=64, rotary=0.25, inner=256, shared=512) if fp8 else {}
    c = random.config(**{**WIDE, "value_heads": 6 if ranks == 2 else 8, "heads": 8, **blocks})
    w = random.weights(c)
    tensors, quantization = random.in_fp8(random.published(c, w))
    raw = random.nested({**c, "quantization_config": quantization} if fp8 else c)
    held = random.unpublished(c, random.out_of_fp8(tensors)) if fp8 else w
    folder = random.write(tmp_path / "model", raw, tensors if fp8 else random.published(c, w, stacked=True))
    ids = ids_of(c, 40)
    holds(folder, ids, naive.logits(c, held, ids), tensor_parallel_size=ranks, max_num_batched_tokens=16)
