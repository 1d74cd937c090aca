"""Several ways to go on from one long prompt, which is computed once: python scripts/examples/fork.py [MODEL]"""

from __future__ import annotations

import sys

from thalweg import LLM, SamplingParams

PROBLEM = "Tom has 4 apples and 3 pears. He buys 2 apples and eats 1 pear. " * 12
DRAWN = SamplingParams(max_tokens=24, temperature=0.8, seed=1)


def main(model: str | None = None) -> list[str]:
    with LLM(model) as llm:
        root = llm.session("problem", PROBLEM)
        branches = llm.fork(root, 3)
        for i, branch in enumerate(branches):
            answer = branch.generate(f"Way {i + 1}:", DRAWN)
            print(f"{branch.name}: {answer.num_cached_tokens} of {len(answer.prompt_token_ids)} tokens were cached")
        best = branches[0]
        best.roll_back(0)  # to where it left the root, to go another way
        best.generate("Briefly:", DRAWN)
        return [branch.name for branch in branches]


if __name__ == "__main__":
    main(*sys.argv[1:2])
