"""Gated DeltaNet's mixer and output projection as one op in a layer: rows that decode beside prompts and by themselves.
On a GPU: test_gpu_gdn_decode_add in tests/ops."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.served import prompts, qwen3_5_moe_fp8
from thalweg import LLM, SamplingParams


def answers(folder: Path) -> list[tuple[int, ...]]:
    # At most 20 tokens in a step, so that prompts come beside rows that decode.
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    with LLM(str(folder), device="cpu", dtype="float32", max_num_seqs=3, max_num_batched_tokens=20) as llm:
        return [tuple(o.outputs[0].token_ids) for o in llm.generate(prompts(3), params)]


def test_a_layer_gives_the_tokens_of_the_two_ops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = qwen3_5_moe_fp8().write(tmp_path)
    expected = answers(folder)
    monkeypatch.setattr("thalweg.layers.gdn.refusal", lambda where, dims: None)  # then the reference serves
    assert answers(folder) == expected


def test_whoever_asks_for_one_of_the_two_by_name_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = qwen3_5_moe_fp8().write(tmp_path)
    monkeypatch.setattr("thalweg.layers.gdn.refusal", lambda where, dims: None)
    for prefer in ({}, {"linear_add_fp8": "reference"}, {"gdn_mixer_decode": "reference"}):
        with LLM(str(folder), device="cpu", dtype="float32", op_preference=prefer) as llm:
            names = {choice.op for choice in llm.info.ops}
        assert ("gdn_decode_add" in names) == (not prefer)
