"""Arithmetic word problems of one to three steps, with worked answers ended by `#### N` as in GSM8K.

Training and evaluation problems are disjoint by construction: a hash of the template and its numbers decides
the split, so no evaluation problem shares both with any training problem, whatever the names.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Literal

Split = Literal["train", "eval"]

EVAL_SHARE = 20  # of 256 hash values; the others are training problems
MAX_VALUE = 999  # no operand or result is larger
WORD_SHARE = 0.08  # of the questions write numbers up to twelve as words
_NUMBER_WORDS = (
    "",
    "",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
_OPERATORS = {"+": int.__add__, "-": int.__sub__, "x": int.__mul__}
_FIELD = re.compile(r"\{(\w+)\}")
_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_INSERT = re.compile(r"<(\w+)(?: (\w))?>")
_RANGE = re.compile(r"(\w)=(\d+)\.\.(\d+)")
_FINAL = re.compile(r"####\s*(-?\d[\d,]*)")


@dataclass(frozen=True)
class Problem:
    """One problem. `answer_text` is the worked answer, one line a step, its last line `#### {answer}`."""

    question: str
    answer_text: str
    answer: int
    steps: int
    key: str  # template and numbers: what the split is decided by


@dataclass(frozen=True)
class _Step:
    result: str
    left: str
    operator: str
    right: str
    sentence: str


@dataclass(frozen=True)
class _Template:
    question: str
    ranges: tuple[tuple[str, int, int], ...]
    steps: tuple[_Step, ...]


def _read_templates(text: str) -> tuple[dict[str, tuple[str, ...]], tuple[_Template, ...]]:
    """The word lists by name and the templates; arith_templates.txt describes the format."""
    words: dict[str, tuple[str, ...]] = {}
    texts: dict[str, str] = {}
    templates = []
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    for block in "\n".join(lines).strip().split("\n\n"):
        first, *rest = block.strip().splitlines()
        if first.startswith("%words "):
            words[first.removeprefix("%words ")] = tuple(" ".join(rest).split(", "))
        elif first.startswith("%text "):
            texts[first.removeprefix("%text ")] = rest[0]
        else:
            question = _INSERT.sub(lambda match: texts[match[1]].replace("{n}", f"{{{match[2]}}}"), first)
            templates.append(_Template(question, _parse_ranges(rest[0]), tuple(map(_parse_step, rest[1:]))))
    return words, tuple(templates)


def _parse_ranges(line: str) -> tuple[tuple[str, int, int], ...]:
    return tuple((name, int(low), int(high)) for name, low, high in _RANGE.findall(line))


def _parse_step(line: str) -> _Step:
    formula, sentence = line.split(": ", 1)
    result, _, left, operator, right = formula.split()
    return _Step(result, left, operator, right, sentence)


def _nouns(words: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """(singular, plural) of each noun of a word list."""
    pairs = (word.partition("/") for word in words)
    return tuple((singular, plural or singular + "s") for singular, _, plural in pairs)


_WORDS, _TEMPLATES = _read_templates(
    resources.files("thalweg.evals").joinpath("arith_templates.txt").read_text(encoding="utf-8")
)
_GIRLS, _BOYS = _WORDS["girls"], _WORDS["boys"]
_PLACES, _MONEY = _WORDS["places"], _WORDS["money"]
_THINGS, _CONTAINERS, _ANIMALS = (_nouns(_WORDS[name]) for name in ("things", "containers", "animals"))


def split_of(key: str) -> Split:
    """The split that a problem key belongs to, the same on every machine and in every Python version."""
    return "eval" if hashlib.sha256(key.encode()).digest()[0] < EVAL_SHARE else "train"


def final_answer(text: str) -> int | None:
    """The number after the last `####` of an answer, or None when there is none."""
    found = _FINAL.findall(text)
    return int(found[-1].replace(",", "")) if found else None


def stream(split: Split, seed: int, invented: float = 0.0) -> Iterator[Problem]:
    """Endless problems of one split, the same for the same seed.

    `invented` is the share of problems whose names, and the share whose things, are made-up words: training
    uses some, so that a model learns to copy words rather than to choose from a list.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split is {split!r}; expected 'train' or 'eval'")
    rng = random.Random(f"{split}:{seed}")
    while True:
        index = rng.randrange(len(_TEMPLATES))
        values = _draw_numbers(rng, _TEMPLATES[index])
        if values is None:
            continue
        key = f"{index}:" + ",".join(str(values[name]) for name, _, _ in _TEMPLATES[index].ranges)
        if split_of(key) == split:
            yield _render(rng, index, values, key, invented)


def problems(split: Split, seed: int, n: int) -> list[Problem]:
    """The first `n` problems of `stream(split, seed)` that differ in template or numbers."""
    chosen: dict[str, Problem] = {}
    for problem in stream(split, seed):
        if len(chosen) >= n:
            break
        chosen.setdefault(problem.key, problem)
    return list(chosen.values())


def _draw_numbers(rng: random.Random, template: _Template) -> dict[str, int] | None:
    """Numbers and step results, or None when a result is too small to be natural or too large to be easy."""
    values = {name: rng.randint(low, high) for name, low, high in template.ranges}
    for step in template.steps:
        result = _OPERATORS[step.operator](values[step.left], values[step.right])
        if not 2 <= result <= MAX_VALUE:
            return None
        values[step.result] = result
    return values


def _render(rng: random.Random, index: int, values: dict[str, int], key: str, invented: float) -> Problem:
    template = _TEMPLATES[index]
    fields = {name: str(value) for name, value in values.items()}
    fields |= _draw_words(rng, invented)
    question = _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), template.question)
    question = _FIELD.sub(lambda match: fields[match[1]], question)
    question = _vary_numbers(rng, question.replace(" ?", "?"))
    question = re.sub(r"\b([Aa])(?= [aeiou])", r"\1n", question)
    lines = []
    for step in template.steps:
        shown = f"{fields[step.left]} {step.operator} {fields[step.right]} = {fields[step.result]}"
        sentence = step.sentence.replace(f"{{{step.result}}}", shown)
        lines.append(_FIELD.sub(lambda match: fields[match[1]], sentence))
    answer = values[template.steps[-1].result]
    return Problem(question, "\n".join([*lines, f"#### {answer}"]), answer, len(lines), key)


def _vary_numbers(rng: random.Random, question: str) -> str:
    """Now and then "twice as many", and small numbers written as words."""
    if rng.random() < 0.5:
        question = re.sub(r"\b2 times as", "twice as", question)
    if rng.random() < WORD_SHARE:
        question = re.sub(r"\b([2-9]|1[0-2])\b", lambda match: _NUMBER_WORDS[int(match[1])], question)
        question = re.sub(r"([.?] )([a-z])", lambda match: match[1] + match[2].upper(), question)
    return question


def _draw_words(rng: random.Random, invented: float) -> dict[str, str]:
    girl = rng.random() < 0.5
    name = rng.choice(_GIRLS if girl else _BOYS)
    other = rng.choice(_GIRLS + _BOYS)
    while other == name:
        other = rng.choice(_GIRLS + _BOYS)
    if invented and rng.random() < invented:
        name, other = _invent_word(rng).capitalize(), _invent_word(rng).capitalize()
    (thing, things), (other_thing, other_things) = rng.sample(_THINGS, 2)
    if invented and rng.random() < invented:
        thing, other_thing = _invent_word(rng), _invent_word(rng)
        things, other_things = thing + "s", other_thing + "s"
    container, containers = rng.choice(_CONTAINERS)
    x, y, z = (plural for _, plural in rng.sample(_ANIMALS, 3))
    he, him, his = ("she", "her", "her") if girl else ("he", "him", "his")
    return {
        "A": name, "B": other, "He": he.capitalize(), "he": he, "him": him, "his": his,
        "o": things, "o1": thing, "p": other_things, "p1": other_thing, "x": x, "y": y, "z": z,
        "k": containers, "k1": container, "place": rng.choice(_PLACES), "m": rng.choice(_MONEY),
    }  # fmt: skip


def _invent_word(rng: random.Random) -> str:
    onsets, codas = "bcdfghjklmnprstvwxyz", ("", "", "n", "r", "s", "l", "th", "ck", "m", "st", "x", "ng")
    clusters = ("bl", "br", "ch", "cl", "dr", "fl", "gr", "pl", "qu", "sh", "st", "th", "tr", "sk", "sn", "")
    syllables = [
        (rng.choice(onsets) if rng.random() < 0.7 else rng.choice(clusters)) + rng.choice("aeiouaeiouy")
        for _ in range(rng.choice((1, 2, 2, 3, 4)))
    ]
    return "".join(syllables) + rng.choice(codas)
