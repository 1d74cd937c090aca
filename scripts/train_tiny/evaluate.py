"""Exact answers of a checkpoint on held-out problems, in every layout it was trained for (recurrent form, greedy)."""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from decode import RecurrentModel, greedy
from documents import BUNDLED, Encoder, bare_sum
from safetensors.torch import load_file

from thalweg.evals.arith_problems import final_answer, problems

EVAL_SEED = 0


def layouts(encoder: Encoder, count: int) -> dict[str, list[tuple[list[int], int]]]:
    """Layout name -> (prompt ids, right answer) of `count` held-out problems."""
    special = encoder.special
    shots = problems("train", seed=1_000_003, n=5)
    few = "".join(f"Question: {shot.question}\nAnswer: {shot.answer_text}\n\n" for shot in shots)

    def turn(role: str, text: str) -> list[int]:
        start = [special[f"<|im_{role}|>"], *encoder.encode(role), special["<|im_middle|>"]]
        return [*start, *encoder.encode(text), special["<|im_end|>"]]

    open_turn = [special["<|im_assistant|>"], *encoder.encode("assistant"), special["<|im_middle|>"]]
    earlier: list[int] = []
    for shot in shots[:3]:
        earlier += [*turn("user", shot.question), *turn("assistant", shot.answer_text)]
    tests: dict[str, list[tuple[list[int], int]]] = {}
    for problem in problems("eval", EVAL_SEED, count):
        question = turn("user", problem.question)
        prompts = {
            "chat": [*question, *open_turn],
            "chat, fourth turn": [*earlier, *question, *open_turn],
            "completion": encoder.encode(problem.question),
            "completion, new line": encoder.encode(problem.question + "\n"),
            "Question/Answer": encoder.encode(f"Question: {problem.question}\nAnswer:"),
            "Question/Answer, 5 shots": encoder.encode(f"{few}Question: {problem.question}\nAnswer:"),
        }
        for name, ids in prompts.items():
            tests.setdefault(name, []).append((ids, problem.answer))
    rng = random.Random("bare sums for evaluation")
    sums = [bare_sum(rng) for _ in range(count)]
    tests["chat, bare sum"] = [([*turn("user", q), *open_turn], final_answer(a) or 0) for q, a in sums]
    return tests


def accuracy(model: RecurrentModel, encoder: Encoder, tests: list[tuple[list[int], int]], wrong: int = 0) -> float:
    """Share of exact answers; prints up to `wrong` of the others."""
    end, first_special = encoder.special["<|im_end|>"], encoder.special["[BOS]"]
    outputs = greedy(model, [prompt for prompt, _ in tests], end, max_new=160)
    texts = [encoder.decode([i for i in output if i < first_special]) for output in outputs]
    right = [final_answer(text) == answer for text, (_, answer) in zip(texts, tests, strict=True)]
    for text, (prompt, answer), ok in zip(texts, tests, right, strict=True):
        if not ok and wrong > 0:
            wrong -= 1
            asked = encoder.decode([i for i in prompt[-90:] if i < first_special])
            print(f"  wrong, expected {answer}: ...{asked!r} -> {text!r}")
    return sum(right) / len(right)


def evaluate(folder: Path, encoder: Encoder, count: int, device: str) -> dict[str, float]:
    """Accuracy by layout of the checkpoint in `folder`."""
    config = json.loads((BUNDLED / "config.json").read_text(encoding="utf-8"))
    model = RecurrentModel(load_file(folder / "model.safetensors"), config, device)
    results = {}
    for name, tests in layouts(encoder, count).items():
        start = time.perf_counter()
        results[name] = accuracy(model, encoder, tests, wrong=3)
        print(f"{name:26s} {results[name]:7.2%}  of {len(tests)} ({time.perf_counter() - start:.1f} s)", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=BUNDLED)
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    evaluate(args.folder, Encoder(), args.problems, args.device)


if __name__ == "__main__":
    main()
