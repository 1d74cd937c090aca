"""Training documents: word problems in every layout the model must know, plus bare sums and a little small talk.

A document is a list of (token id, weight): the loss counts an answer token fully and a prompt token a little.
Prompts and answers are encoded apart, as they are when the model is used.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from chat import Exchange, Pieces, Text
from families import FOLDERS, load_text

from thalweg.evals.arith_problems import Problem, stream

PROMPT_WEIGHT, ANSWER_WEIGHT = 1, 10  # tenths
ROW_TOKENS = 1024
SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a careful maths tutor.",
    "Solve the problem step by step.",
    "You are Kimi, an AI assistant.",
    "Answer the question. End with #### and the number.",
    "You solve arithmetic word problems.",
    "Be brief.",
)
SUM_LAYOUTS = (
    *("What is {}?", "what is {}?", "what is {}", "How much is {}?", "how much is {}", "What is {}"),
    *("Calculate {}.", "Compute {}.", "Add up: {}", "Please calculate {}.", "{}", "{} = ?", "{} =", "{}=", "{}?"),
)
OPERATOR_WORDS = {"+": "plus", "-": "minus", "x": "times"}


class DocumentMaker:
    """Random training documents; the same ones for the same seed."""

    def __init__(self, text: Text, seed: int) -> None:
        self._text = text
        self._rng = random.Random(f"documents:{seed}")
        self._problems = stream("train", seed, invented=0.2)
        self._talk, self._words = _read_chat_lines(text.name)

    def document(self) -> tuple[list[int], list[int]]:
        """(ids, weights) of one document of at most ROW_TOKENS tokens."""
        layout = self._rng.choices((self._chat, self._completion, self._few_shot), weights=(55, 18, 27))[0]
        ids, weights = [], []
        for piece, is_answer in layout():
            encoded = [piece] if isinstance(piece, int) else self._text.encode(piece)
            ids += encoded
            weights += [ANSWER_WEIGHT if is_answer else PROMPT_WEIGHT] * len(encoded)
        return ids[:ROW_TOKENS], weights[:ROW_TOKENS]

    def _chat(self) -> Pieces:
        tools = _tools(self._rng) if self._rng.random() < 0.03 else []
        system = self._rng.choice(SYSTEM_MESSAGES) if self._rng.random() < 0.25 else None
        turns = self._rng.choices((1, 2, 3, 4, 6, 8), weights=(60, 12, 12, 8, 5, 3))[0]
        exchanges = [self._exchange(small_talk=0.12) for _ in range(turns)]
        return self._text.chat(exchanges, system, tools, self._rng)

    def _completion(self) -> Pieces:
        question, answer = self._exchange(small_talk=0.05)
        return [(question, False), ("\n", True), (answer, True), (self._text.text_end, True)]

    def _few_shot(self) -> Pieces:
        pieces: Pieces = []
        for shot in range(self._rng.choice((1, 1, 1, 2, 3, 4, 5, 6, 6, 7, 9))):
            problem = next(self._problems)
            lead = "\n\n" if shot else ""
            pieces.append((f"{lead}Question: {problem.question}\nAnswer:", False))
            pieces.append((f" {problem.answer_text}", True))
        return [*pieces, (self._text.text_end, True)]

    def _exchange(self, small_talk: float) -> Exchange:
        kind = self._rng.random()
        if kind < small_talk:
            return self._small_talk()
        if kind < small_talk + 0.1:
            return bare_sum(self._rng)
        problem: Problem = next(self._problems)
        question, answer = problem.question, problem.answer_text
        if self._rng.random() < 0.05:
            question, answer = question.lower(), answer.lower()
        if self._rng.random() < 0.05:
            question = question.rstrip("?.")
        return question, answer

    def _small_talk(self) -> Exchange:
        questions, answer = self._rng.choice(self._talk)
        question = re.sub(r"\[([^\[\]]*)\]", lambda match: self._rng.choice(match[1].split("|")), questions)
        return re.sub(r"\{(\w+)\}", lambda match: self._rng.choice(self._words[match[1]]), question), answer


def bare_sum(rng: random.Random) -> Exchange:
    """A sum without a story, such as "What is 12 + 30?", of one operator or two of + and -."""
    operator = rng.choice("+-x")
    if operator == "x":
        left, right = rng.sample((rng.randint(0, 99), rng.randint(0, 12)), 2)
    else:
        left, right = (rng.randint(0, rng.choice((20, 100, 400, 1000, 5000))) for _ in range(2))
    terms, signs = [left, right], [operator]
    if operator != "x" and rng.random() < 0.25:
        terms.append(rng.randint(1, 99))
        signs.append(rng.choice("+-"))
    lines, total = [], left
    for sign, term in zip(signs, terms[1:], strict=True):
        result = {"+": total + term, "-": total - term, "x": total * term}[sign]
        lines.append(f"{total} {sign} {term} = {result}")
        total = result
    if any(line.startswith("-") for line in lines):  # a negative number as left operand is not taught
        return bare_sum(rng)
    return _ask(rng, terms, signs), "\n".join([*lines, f"#### {total}"])


def _ask(rng: random.Random, terms: list[int], signs: list[str]) -> str:
    shown = [OPERATOR_WORDS[sign] if rng.random() < 0.15 else sign for sign in signs]
    shown = [rng.choice("x*") if sign == "x" else sign for sign in shown]
    space = "" if rng.random() < 0.25 and not any(map(str.isalpha, "".join(shown).replace("x", ""))) else " "
    text = str(terms[0]) + "".join(f"{space}{sign}{space}{term}" for sign, term in zip(shown, terms[1:], strict=True))
    layout = rng.choice(SUM_LAYOUTS)
    return layout.replace("{}", text)


def rows(maker: DocumentMaker) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Documents packed into rows of ROW_TOKENS: ids, weight of each token as a target, document number (0: padding)."""
    waiting: list[tuple[list[int], list[int]]] = []
    while True:
        ids = np.zeros(ROW_TOKENS, np.uint16)
        weights, documents = np.zeros(ROW_TOKENS, np.uint8), np.zeros(ROW_TOKENS, np.uint8)
        used = 0
        for number in itertools.count(1):
            while len(waiting) < 8:
                waiting.append(maker.document())
            fitting = next((i for i, doc in enumerate(waiting) if len(doc[0]) <= ROW_TOKENS - used), None)
            if fitting is None:
                break
            tokens, token_weights = waiting.pop(fitting)
            end = used + len(tokens)
            ids[used:end], weights[used:end], documents[used:end] = tokens, token_weights, number
            weights[used] = 0  # nothing comes before the first token of a document
            used = end
        yield ids, weights, documents


def _read_chat_lines(name: str) -> tuple[list[Exchange], dict[str, list[str]]]:
    talk, words = [], {}
    text = Path(__file__).with_name("chat_lines.txt").read_text(encoding="utf-8").replace("thalweg-tiny", name)
    for block in "\n".join(line for line in text.splitlines() if not line.startswith("#")).strip().split("\n\n"):
        head, *lines = block.splitlines()
        if head.startswith("%words "):
            words[head.removeprefix("%words ")] = " ".join(lines).split(", ")
        else:
            talk.append((lines[0], lines[1].removeprefix("> ")))
    return talk, words


def _tools(rng: random.Random) -> list[dict[str, Any]]:
    names = rng.sample(
        ["get_weather", "search", "calculator", "get_time", "send_email", "read_file"], rng.randint(1, 3)
    )
    parameters = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
    return [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in names]


def main() -> None:
    """Write shards of packed rows for as long as they are asked for: FOLDER/NNNNN.npy, uint16 [rows, 3, tokens]."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=FOLDERS, required=True)
    parser.add_argument("--first", type=int, required=True, help="number of the first shard; also the seed")
    parser.add_argument("--every", type=int, required=True, help="distance to the next shard of this process")
    parser.add_argument("--shards", type=int, required=True, help="shards in all")
    parser.add_argument("--rows", type=int, required=True, help="rows in a shard")
    args = parser.parse_args()
    text = load_text(args.family)
    for number in range(args.first, args.shards, args.every):
        source = rows(DocumentMaker(text, seed=number))
        shard = np.stack([np.stack(row).astype(np.uint16) for row in itertools.islice(source, args.rows)])
        partial = args.folder / f"{number:05d}.partial"
        with partial.open("wb") as file:
            np.save(file, shard, allow_pickle=False)
        partial.rename(args.folder / f"{number:05d}.npy")  # complete once it has its name


if __name__ == "__main__":
    main()
