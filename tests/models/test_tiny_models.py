"""The trained tiny models answer held-out problems, alone and together."""

from __future__ import annotations

from pathlib import Path

import pytest

from thalweg import LLM, SamplingParams
from thalweg.evals.arith_problems import final_answer, problems

GDN = Path(__file__).resolve().parents[2] / "models" / "thalweg-tiny-gdn"
MAX_BYTES = 12_000_000


def test_the_second_model_is_small_enough_for_the_repository() -> None:
    assert sum(path.stat().st_size for path in GDN.iterdir()) < MAX_BYTES


@pytest.mark.parametrize("model", [None, str(GDN)], ids=["thalweg-tiny", "thalweg-tiny-gdn"])
def test_held_out_problems(model: str | None) -> None:
    asked = problems("eval", 5, 24)
    with LLM(model, max_num_seqs=16) as llm:
        chats = [[{"role": "user", "content": problem.question}] for problem in asked]
        outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=160))
    right = [final_answer(o.outputs[0].text) == problem.answer for o, problem in zip(outputs, asked, strict=True)]
    assert sum(right) >= 0.9 * len(right)
