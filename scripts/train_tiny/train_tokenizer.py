"""Trains the byte-pair tokenizer of thalweg-tiny and writes tiktoken.model and tokenizer_config.json.

Merges never hold a digit or a line break: every digit is one token, which makes arithmetic learnable, and a prompt
that ends before a line break is encoded like the same text inside a document.
"""

from __future__ import annotations

import base64
import json
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import regex
from documents import BUNDLED, SPLIT_PATTERN, SYSTEM_MESSAGES

from thalweg.evals.arith_problems import problems

RANKS = 1024
SPECIALS = 256
# Kimi's names, by distance from the last rank; the gaps are reserved tokens.
SPECIAL_NAMES = {
    0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>", 12: "<|tool_calls_section_end|>", 13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>", 15: "<|tool_call_end|>", 17: "<|im_middle|>", 22: "<think>", 23: "</think>",
    254: "[UNK]", 255: "[PAD]",
}  # fmt: skip
NOT_SPECIAL = ("<think>", "</think>")  # shown when special tokens are skipped, as in Kimi's files


def corpus() -> Counter[str]:
    """Pieces of the split pattern with their counts: generated problems, the chat lines and common English."""
    split = regex.compile(SPLIT_PATTERN, regex.V1)
    counts: Counter[str] = Counter()
    for problem in problems("train", seed=0, n=40_000):
        counts.update(split.findall(f"Question: {problem.question}\nAnswer: {problem.answer_text}\n\n"))
    chat_lines = Path(__file__).with_name("chat_lines.txt").read_text(encoding="utf-8")
    common = Path(__file__).with_name("common_words.txt").read_text(encoding="utf-8").split()
    english = " ".join(common) + " " + " ".join(word.capitalize() for word in common[:150])
    layout = "user\nassistant\nsystem\ntool_declare\n"
    for text, times in ((layout, 10_000), (chat_lines, 600), (" ".join(SYSTEM_MESSAGES), 600), (english, 150)):
        for piece, count in Counter(split.findall(text)).items():
            counts[piece] += count * times
    return counts


def byte_order() -> list[bytes]:
    """The 256 bytes in the order of GPT-2's table, as in Kimi's file: printable ones first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [bytes([b]) for b in [*printable, *(b for b in range(256) if b not in printable)]]


def train(counts: Counter[str], ranks: int) -> list[bytes]:
    """Byte-pair encoding: merge the most frequent pair (ties: the smaller bytes) until there are `ranks` tokens."""
    tokens = byte_order()
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
    return tokens


def _may_merge(pair: tuple[bytes, bytes]) -> bool:
    return not any(byte in b"0123456789\r\n" for byte in pair[0] + pair[1])


def _merge(parts: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    merged, i = [], 0
    while i < len(parts):
        both = i + 1 < len(parts) and (parts[i], parts[i + 1]) == pair
        merged.append(parts[i] + parts[i + 1] if both else parts[i])
        i += 2 if both else 1
    return merged


def tokenizer_config(ranks: int) -> dict[str, object]:
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    added = {
        str(ranks + offset): {"content": name, "special": name not in NOT_SPECIAL, **flags}
        for offset, name in SPECIAL_NAMES.items()
    }
    return {
        "tokenizer_class": "TikTokenTokenizer",
        "added_tokens_decoder": added,
        "bos_token": "[BOS]",
        "eos_token": "<|im_end|>",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
    }


def main() -> None:
    tokens = train(corpus(), RANKS)
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    BUNDLED.mkdir(parents=True, exist_ok=True)
    (BUNDLED / "tiktoken.model").write_text("".join(lines), encoding="ascii")
    config = json.dumps(tokenizer_config(len(tokens)), indent=2)
    (BUNDLED / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
    print(f"{len(tokens)} ranks and {SPECIALS} special ids written to {BUNDLED}")


if __name__ == "__main__":
    main()
