"""Exact answers of a checkpoint on held-out problems, in every layout it was trained for (recurrent form, greedy), and
how many of its drafts are what it then says."""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from chat import Text
from decode import RecurrentModel, greedy
from documents import bare_sum
from families import FOLDERS, load_text, part, read_config
from safetensors.torch import load_file

from thalweg.evals.arith_problems import final_answer, problems

EVAL_SEED = 0
MAX_NEW = 160
Tests = list[tuple[list[int], int]]  # prompt ids and the right answer


def layouts(text: Text, count: int) -> dict[str, Tests]:
    """Layout name -> `count` held-out problems, the most used layouts first."""
    shots = problems("train", seed=1_000_003, n=5)
    few = "".join(f"Question: {shot.question}\nAnswer: {shot.answer_text}\n\n" for shot in shots)
    earlier = [(shot.question, shot.answer_text) for shot in shots[:3]]
    tests: dict[str, Tests] = {}
    for problem in problems("eval", EVAL_SEED, count):
        question = problem.question
        prompts = {name: text.ids(pieces) for name, pieces in text.chat_prompts([], question).items()}
        prompts |= {
            f"{name}, fourth turn": text.ids(pieces) for name, pieces in text.chat_prompts(earlier, question).items()
        }
        prompts |= {
            "completion": text.encode(question),
            "completion, new line": text.encode(question + "\n"),
            "Question/Answer": text.encode(f"Question: {question}\nAnswer:"),
            "Question/Answer, 5 shots": text.encode(f"{few}Question: {question}\nAnswer:"),
        }
        for name, ids in prompts.items():
            tests.setdefault(name, []).append((ids, problem.answer))
    rng = random.Random("bare sums for evaluation")
    sums = [bare_sum(rng) for _ in range(count)]
    asked = [(text.ids(text.chat_prompts([], q)["chat"]), final_answer(a) or 0) for q, a in sums]
    return {**tests, "chat, bare sum": asked}


def measure(model: RecurrentModel, text: Text, tests: Tests, wrong: int = 0, drafting: bool = False) -> dict[str, Any]:
    """`exact`, the share of exact answers, and with `drafting` what `acceptance` says; prints `wrong` bad answers."""
    prompts = [prompt for prompt, _ in tests]
    outputs, drafts = greedy(model, prompts, text.end_ids, MAX_NEW, drafting)
    texts = [text.decode(output) for output in outputs]
    right = [final_answer(said) == answer for said, (_, answer) in zip(texts, tests, strict=True)]
    for said, (prompt, answer), ok in zip(texts, tests, right, strict=True):
        if not ok and wrong > 0:
            wrong -= 1
            print(f"  wrong, expected {answer}: ...{text.decode(prompt[-90:])!r} -> {said!r}")
    drafted = {"drafts": acceptance(outputs, drafts)} if drafting else {}
    return {"exact": sum(right) / len(right), **drafted}


def acceptance(outputs: list[list[int]], drafts: list[list[list[int]]]) -> dict[str, dict[str, Any]]:
    """What speculation with 1, 2, ... drafts per step would do, by that number: `accepted` the share of drafts that are
    accepted, `by_place` that of the first, second, ..., and `tokens_per_step` with the model's own token.

    A step drafts after the last known token; the drafts before the first wrong one are accepted, and the model's own
    token follows. Drafts that reach beyond the last token are not counted. No step takes a prompt's last token: the
    first generated one comes from the prompt.
    """
    results = {}
    for count in range(1, max((len(draft) for row in drafts for draft in row), default=0) + 1):
        tried, taken, steps = [0] * count, [0] * count, 0
        for output, row in zip(outputs, drafts, strict=True):
            place = 0
            while place < len(output) - 1:
                told = output[place + 1 :][:count]
                guessed = row[place][: len(told)]
                good = next((i for i, (a, b) in enumerate(zip(told, guessed, strict=True)) if a != b), len(told))
                for i in range(len(told)):
                    tried[i] += 1
                    taken[i] += i < good
                place += good + 1
                steps += 1
        results[str(count)] = {
            "accepted": round(sum(taken) / max(sum(tried), 1), 4),
            "by_place": [round(a / max(b, 1), 4) for a, b in zip(taken, tried, strict=True)],
            "tokens_per_step": round(sum(len(output) - 1 for output in outputs) / max(steps, 1), 3),
        }
    return results


def evaluate(
    folder: Path, family: str, text: Text, count: int, device: str, until: float = float("inf")
) -> Iterator[dict[str, Any]]:
    """The results so far, by layout, of the checkpoint in `folder`; the first layout is measured with drafts.

    No layout but the first is begun after the time `until` (time.perf_counter).
    """
    model = part(family, "decode").Recurrent(load_file(folder / "model.safetensors"), read_config(family), device)
    results: dict[str, Any] = {}
    for number, (name, tests) in enumerate(layouts(text, count).items()):
        start = time.perf_counter()
        if number and start > until:
            print(f"{name:26s} not measured: out of time", flush=True)
            continue
        results[name] = measure(model, text, tests, wrong=3, drafting=number == 0 and model.DRAFTS > 0)
        seconds = time.perf_counter() - start
        print(f"{name:26s} {results[name]['exact']:7.2%}  of {len(tests)} ({seconds:.1f} s)", flush=True)
        for drafted, figures in results[name].get("drafts", {}).items():
            print(f"  {drafted} drafts: {json.dumps(figures)}", flush=True)
        yield results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="default: where the family's model lives")
    parser.add_argument("--family", choices=FOLDERS, default="kimi_linear")
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    folder = args.folder or FOLDERS[args.family]
    for _ in evaluate(folder, args.family, load_text(args.family), args.problems, args.device):
        pass


if __name__ == "__main__":
    main()
