"""Trains the byte-pair tokenizer of a family's tiny model and writes the family's tokenizer files.

Merges never hold a digit or a line break: every digit is one token, which makes arithmetic learnable, and a prompt
that ends before a line break is encoded like the same text inside a document.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import regex
from documents import SYSTEM_MESSAGES
from families import FOLDERS, part

from thalweg.evals.arith_problems import problems

Merges = list[tuple[bytes, bytes]]


def corpus(split_pattern: str, layout: str) -> Counter[str]:
    """Pieces of the split pattern with their counts: problems, chat lines, common English, the words of `layout`."""
    split = regex.compile(split_pattern, regex.V1)
    counts: Counter[str] = Counter()
    for problem in problems("train", seed=0, n=40_000):
        counts.update(split.findall(f"Question: {problem.question}\nAnswer: {problem.answer_text}\n\n"))
    chat_lines = Path(__file__).with_name("chat_lines.txt").read_text(encoding="utf-8")
    common = Path(__file__).with_name("common_words.txt").read_text(encoding="utf-8").split()
    english = " ".join(common) + " " + " ".join(word.capitalize() for word in common[:150])
    for text, times in ((layout, 10_000), (chat_lines, 600), (" ".join(SYSTEM_MESSAGES), 600), (english, 150)):
        for piece, count in Counter(split.findall(text)).items():
            counts[piece] += count * times
    return counts


def byte_order() -> list[bytes]:
    """The 256 bytes in the order of GPT-2's table, as in Kimi's file: printable ones first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [bytes([b]) for b in [*printable, *(b for b in range(256) if b not in printable)]]


def train(counts: Counter[str], ranks: int) -> tuple[list[bytes], Merges]:
    """Byte-pair encoding: merge the most frequent pair (ties: the smaller bytes) until there are `ranks` tokens."""
    tokens, merges = byte_order(), []
    words = [([bytes([b]) for b in piece.encode()], count) for piece, count in sorted(counts.items())]
    pairs: Counter[tuple[bytes, bytes]] = Counter()
    where: defaultdict[tuple[bytes, bytes], set[int]] = defaultdict(set)
    for index, (parts, count) in enumerate(words):
        for pair in pairwise(parts):
            pairs[pair] += count
            where[pair].add(index)
    while len(tokens) < ranks:
        best = min((pair for pair in pairs if _may_merge(pair)), key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] <= 0:
            raise SystemExit(f"the corpus has only {len(tokens)} tokens to offer, expected {ranks}")
        merges.append(best)
        if best[0] + best[1] not in tokens:
            tokens.append(best[0] + best[1])
        for index in sorted(where.pop(best)):
            parts, count = words[index]
            merged = _merge(parts, best)
            for pair in pairwise(parts):
                pairs[pair] -= count
            for pair in pairwise(merged):
                pairs[pair] += count
                where[pair].add(index)
            words[index] = (merged, count)
        del pairs[best]
    return tokens, merges


def _may_merge(pair: tuple[bytes, bytes]) -> bool:
    return not any(byte in b"0123456789\r\n" for byte in pair[0] + pair[1])


def _merge(parts: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    merged, i = [], 0
    while i < len(parts):
        both = i + 1 < len(parts) and (parts[i], parts[i + 1]) == pair
        merged.append(parts[i] + parts[i + 1] if both else parts[i])
        i += 2 if both else 1
    return merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=FOLDERS, default="kimi_linear")
    args = parser.parse_args()
    family, folder = part(args.family, "tokenizer"), FOLDERS[args.family]
    folder.mkdir(parents=True, exist_ok=True)
    family.write(folder, *train(corpus(family.SPLIT_PATTERN, family.LAYOUT), family.RANKS))
    print(f"{family.RANKS} ranks written to {folder}")


if __name__ == "__main__":
    main()
