"""The bundled model on a CPU says what it said before: greedy tokens stored at an earlier commit, and logits that the
model written down plainly gives in float64.

A change that is meant to alter them stores them anew: `python -m tests.models.test_stored_logits`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file

from tests.models import naive_kimi_linear as naive
from thalweg import LLM, SamplingParams
from thalweg.config.model_source import model_folder

STORED = Path(__file__).parents[1] / "fixtures" / "bundled_model.npz"
ROWS = 10  # of each prompt, its last
PROMPTS = [
    "Nora has 14 stickers. She buys 9 more stickers. How many stickers does she have now?",
    "Kate has 12 cases with 16 apples in each case. How many apples is that altogether?",
    "The quick brown fox",
]
GREEDY = SamplingParams(temperature=0, max_tokens=64)


def computed() -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
    """float32 [ROWS, V] of each prompt, and the tokens int64 [n] that follow it."""
    found = {}
    with LLM(device="cpu", dtype="float32", max_num_seqs=4, cache_memory=1 << 28) as llm:
        for i, (prompt, output) in enumerate(zip(PROMPTS, llm.generate(PROMPTS, GREEDY), strict=True)):
            found[f"logits_{i}"] = llm.prompt_logits(llm.tokenizer.encode(prompt))[-ROWS:].numpy()
            found[f"greedy_{i}"] = np.array(output.outputs[0].token_ids)
    return found


def test_logits_and_tokens_are_those_stored() -> None:
    found = computed()
    with np.load(STORED, allow_pickle=False) as stored:
        assert found.keys() == set(stored.files)
        for name, values in found.items():
            if name.startswith("greedy"):
                assert values.tolist() == stored[name].tolist()
            else:
                # In plain torch values of up to 25 are off by as much as 9.4e-6, in C++ by 7.5e-6.
                np.testing.assert_allclose(values, stored[name], atol=1e-5, rtol=1e-6)


def exact() -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
    """`computed`, with the logits of float64."""
    found = computed()
    folder = model_folder(None)
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    with LLM(device="cpu", dtype="float32", max_num_seqs=4, cache_memory=1 << 28) as llm:
        for i, prompt in enumerate(PROMPTS):
            logits = naive.logits(config, weights, llm.tokenizer.encode(prompt))
            found[f"logits_{i}"] = logits[-ROWS:].float().numpy()
    return found


if __name__ == "__main__":
    np.savez_compressed(STORED, **exact())
