"""Kimi-K2 on a CUDA device, in every published format: kernels where there are some, references beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.models import naive_kimi_k2 as naive
from tests.models import random_kimi_k2 as random
from tests.models.oracle_kl import divergences
from tests.models.served import BF16_KL, BF16_LOGPROB, PARAMS, VOCAB, Model, decode_against_prompts, on_gpu, prompts

pytestmark = pytest.mark.gpu

# Products over fp8 round activations of 17 tokens and more, and not of fewer: in all of this model's products that is a
# mean difference of 0.13 in float32 and 0.14 in bfloat16, measured on a CPU.
W8A8_LOGPROB = 0.14
SHAPE = dict(layers=3, hidden=256, heads=4, q_rank=128, rank=128, nope=128, rope=64, value=128, experts=16, top_k=4,
             inner=256, dense_inner=512, vocab=VOCAB, max_position_embeddings=600)  # fmt: skip


def model(stored: str) -> Model:
    c = random.config(**SHAPE)
    w = held = random.weights(c)
    if stored != "none":
        pack, quantization = {"fp8": (random.in_fp8, random.FP8), "int4": (random.in_int4, random.INT4)}[stored]
        (w, held), c = pack(w), {**c, "quantization_config": quantization}
    return Model(c, w, lambda ids: naive.logits(c, held, ids))


@pytest.fixture(scope="module", params=["none", "fp8", "int4"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    found = model(request.param)
    return found.write(tmp_path_factory.mktemp("model")), found


def test_logits_in_float32_and_bfloat16(served: tuple[Path, Model]) -> None:
    folder, found = served
    ids = prompts(5)[4]
    expected = found.twin(ids)
    for chunk in (512, 20, 1):
        with on_gpu(folder, "float32", max_num_seqs=2, max_num_batched_tokens=chunk) as llm:
            logits = llm.prompt_logits(ids).cpu()
        np.testing.assert_allclose(logits.numpy(), expected.numpy(), atol=1e-3, rtol=0)
    with on_gpu(folder, "bfloat16", max_num_seqs=2) as llm:
        assert divergences(expected, llm.prompt_logits(ids).cpu()).mean() < BF16_KL


def test_decode_steps_in_bfloat16_say_what_prompts_say(served: tuple[Path, Model]) -> None:
    rounds = served[1].config.get("quantization_config") == random.FP8
    with on_gpu(served[0], "bfloat16", max_num_seqs=6, max_num_batched_tokens=64) as llm:
        assert llm.info.decode_steps.startswith("CUDA graphs"), llm.info.decode_steps
        assert decode_against_prompts(llm).mean() < (W8A8_LOGPROB if rounds else BF16_LOGPROB)


def test_kernels_give_the_tokens_of_references_in_float32(served: tuple[Path, Model]) -> None:
    results = []
    for prefer in ({"*": "reference"}, {}):
        with on_gpu(served[0], "float32", max_num_seqs=4, op_preference=prefer) as llm:
            results.append([o.outputs[0].token_ids for o in llm.generate(prompts(6), PARAMS * 2)])
    assert results[0] == results[1]
