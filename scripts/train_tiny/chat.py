"""What a family's text is made of: the interface that documents and evaluation use."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

Pieces = list[tuple[str | int, bool]]  # a text or a special id; whether it is part of an answer
Exchange = tuple[str, str]  # a question and its answer


class Text(ABC):
    """Encodes text, and lays out chats as the family's chat template does. Pieces are encoded one by one."""

    name: str  # what the model calls itself
    vocab_size: int
    special: dict[str, int]  # ids of special tokens, which text never encodes to
    text_end: int  # ends a text that is no chat
    end_ids: frozenset[int]  # where generation stops

    @abstractmethod
    def __init__(self, folder: Path) -> None:
        """Reads the tokenizer of the model in `folder`."""

    @abstractmethod
    def encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Without special tokens."""

    @abstractmethod
    def chat(
        self, exchanges: list[Exchange], system: str | None, tools: list[dict[str, Any]], rng: random.Random
    ) -> Pieces:
        """A whole conversation."""

    @abstractmethod
    def chat_prompts(self, earlier: list[Exchange], question: str) -> dict[str, Pieces]:
        """Prompts that end where the answer to `question` begins, by a name such as "chat"."""

    def ids(self, pieces: Pieces) -> list[int]:
        encoded = (piece if isinstance(piece, int) else self.encode(piece) for piece, _ in pieces)
        return [i for ids in encoded for i in ([ids] if isinstance(ids, int) else ids)]
