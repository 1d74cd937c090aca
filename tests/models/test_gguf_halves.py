"""Matrices that a GGUF file has in 16 bits: multiplied as they are on a CPU in float32."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.gguf_files import converted
from thalweg import LLM, SamplingParams
from thalweg.assembly.inspect import describe
from thalweg.config.engine import EngineConfig

IDS = [(7 * i + i * i) % 512 for i in range(80)]


@pytest.mark.parametrize("outtype", ["f16", "bf16"])
def test_halves_are_kept_and_give_the_logits_of_float32(outtype: str, tmp_path: Path) -> None:
    file = str(converted(tmp_path / "model.gguf", outtype))
    logits, answers = [], []
    for dequantize in (False, True):
        with LLM(file, dequantize=dequantize, max_num_seqs=2) as llm:
            assert llm.info.quantization == (None if dequantize else outtype.upper())
            logits.append(llm.prompt_logits(IDS))
            answers.append(
                llm.generate([IDS[:20]], SamplingParams(temperature=0.0, max_tokens=12))[0].outputs[0].token_ids
            )
    assert (logits[0] - logits[1]).norm() < 1e-5 * logits[1].norm()
    assert answers[0] == answers[1]


def test_memory_is_that_of_the_file(tmp_path: Path) -> None:
    file = str(converted(tmp_path / "model.gguf", "f16"))
    kept, widened, halved = (
        describe(EngineConfig(file, **options)).cost.weight_bytes
        for options in ({}, {"dequantize": True}, {"dtype": "bfloat16"})
    )
    assert kept < 0.55 * widened
    assert halved < kept  # which has what is no matrix in float32
