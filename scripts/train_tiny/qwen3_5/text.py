"""The tokenizer and chat layout of Qwen3.5's tiny model: ChatML, with and without reasoning."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tokenizers
from chat import Exchange, Pieces, Text

THINKING_SHARE = 0.35  # of the training chats
# Contractions, words with their combining marks, single digits, punctuation, line breaks, white space.
SPLIT_PATTERN = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


class ModelText(Text):
    """The worked steps of an answer are its reasoning, where a chat reasons; its last line is then the answer.

    Only the last answer of a chat shows reasoning, empty or not, because the chat template drops it from earlier ones.
    """

    name = "thalweg-tiny-gdn"

    def __init__(self, folder: Path) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = {token.content: number for number, token in added.items()}
        self.vocab_size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]["vocab_size"]
        self.text_end = self.special["<|endoftext|>"]
        self.end_ids = frozenset({self.text_end, self.special["<|im_end|>"]})

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode([i for i in ids if i not in self.special.values()])

    def chat(
        self, exchanges: list[Exchange], system: str | None, tools: list[dict[str, Any]], rng: random.Random
    ) -> Pieces:
        thinking = rng.random() < THINKING_SHARE
        pieces = self._system(system, tools)
        for question, answer in exchanges[:-1]:
            final = answer.rpartition("\n")[2] if thinking else answer
            pieces += [*self._user(question), *self._open("assistant"), *self._said(final, answering=not thinking)]
        question, answer = exchanges[-1]
        return [*pieces, *self._user(question), *self._open("assistant"), *self._last_answer(answer, thinking)]

    def chat_prompts(self, earlier: list[Exchange], question: str) -> dict[str, Pieces]:
        asked: Pieces = []
        for old_question, old_answer in earlier:
            asked += [*self._user(old_question), *self._open("assistant"), *self._said(old_answer, answering=False)]
        asked += [*self._user(question), *self._open("assistant")]
        think, end = self.special["<think>"], self.special["</think>"]
        return {
            "chat": [*asked, (think, False), ("\n\n", False), (end, False), ("\n\n", False)],
            "chat, thinking": [*asked, (think, False), ("\n", False)],
        }

    def _last_answer(self, answer: str, thinking: bool) -> Pieces:
        think, end = self.special["<think>"], self.special["</think>"]
        if not thinking:
            empty: Pieces = [(think, False), ("\n\n", False), (end, False), ("\n\n", False)]
            return [*empty, *self._said(answer, answering=True)]
        worked, _, final = answer.rpartition("\n")
        reasoning: Pieces = [(think, False), ("\n", False), (worked + "\n", True), (end, True), ("\n\n", True)]
        return [*reasoning, *self._said(final, answering=True)]

    def _system(self, system: str | None, tools: list[dict[str, Any]]) -> Pieces:
        parts = [] if system is None else [system]
        if tools:
            listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
            parts.insert(0, f"{TOOLS_HEAD}\n<tools>\n{listed}\n</tools>\n\n{TOOLS_FORM}")
        return [*self._open("system"), *self._said("\n\n".join(parts), answering=False)] if parts else []

    def _user(self, text: str) -> Pieces:
        return [*self._open("user"), *self._said(text, answering=False)]

    def _open(self, role: str) -> Pieces:
        return [(self.special["<|im_start|>"], False), (f"{role}\n", False)]

    def _said(self, text: str, answering: bool) -> Pieces:
        return [(text, answering), (self.special["<|im_end|>"], answering), ("\n", False)]


# As chat_template.jinja has them.
TOOLS_HEAD = "# Tools\n\nThese functions may be called, one JSON object per line:"
TOOLS_FORM = """\
Write a call in this form, with one parameter block per argument:
<tool_call>
<function=NAME>
<parameter=KEY>
VALUE
</parameter>
</function>
</tool_call>"""
