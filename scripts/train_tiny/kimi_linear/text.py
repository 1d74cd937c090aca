"""The tokenizer and chat layout of Kimi-Linear's tiny model."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import tiktoken
from chat import Exchange, Pieces, Text

RESERVED = 256  # ids after the ranks
# Runs of Han, words by letter case with their contractions, digits by three, punctuation, white space.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


class ModelText(Text):
    name = "thalweg-tiny"

    def __init__(self, folder: Path) -> None:
        lines = (folder / "tiktoken.model").read_text(encoding="ascii").split("\n")
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
        added = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["added_tokens_decoder"]
        self.special = {entry["content"]: int(number) for number, entry in added.items()}
        self.vocab_size = len(ranks) + RESERVED
        self.text_end = self.special["<|im_end|>"]
        self.end_ids = frozenset({self.text_end})
        self._encoding = tiktoken.Encoding("tiny", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
        self._ranks = len(ranks)

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        return self._encoding.decode([i for i in ids if i < self._ranks])

    def chat(
        self, exchanges: list[Exchange], system: str | None, tools: list[dict[str, Any]], rng: random.Random
    ) -> Pieces:
        pieces: Pieces = []
        if tools:
            pieces += self._message("system", "tool_declare", json.dumps(tools, separators=(",", ":")))
        if system is not None:
            pieces += self._message("system", "system", system)
        for question, answer in exchanges:
            pieces += self._message("user", "user", question)
            pieces += self._message("assistant", "assistant", answer)
        return pieces

    def chat_prompts(self, earlier: list[Exchange], question: str) -> dict[str, Pieces]:
        asked = [*self.chat(earlier, None, [], random.Random()), *self._message("user", "user", question)]
        return {"chat": [*asked, *self._open("assistant", "assistant")]}

    def _message(self, role: str, name: str, text: str) -> Pieces:
        said = role == "assistant"
        return [*self._open(role, name), (text, said), (self.special["<|im_end|>"], said)]

    def _open(self, role: str, name: str) -> Pieces:
        return [(self.special[f"<|im_{role}|>"], False), (name, False), (self.special["<|im_middle|>"], False)]
