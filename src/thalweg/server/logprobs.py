"""Log-probabilities in the two shapes OpenAI gives them: chat's list of tokens, completions' parallel lists."""

from __future__ import annotations

import codecs
from typing import Any

from thalweg.core import TokenLogprobs
from thalweg.server.responses import CompletionLogprobs
from thalweg.tokenizer.base import Tokenizer

LOWEST = -9999.0  # JSON has no -inf


def chat_logprobs(tokenizer: Tokenizer | None, entries: list[TokenLogprobs]) -> dict[str, Any]:
    """What a chat choice has under "logprobs". Every token has an entry, the one that ended the text too."""

    def token(token_id: int, logprob: float) -> dict[str, Any]:
        data = _token_bytes(tokenizer, token_id)
        return {
            "token": _token_text(token_id, data),
            "logprob": max(logprob, LOWEST),
            "bytes": list(data) if data else None,
        }

    content = []
    for entry in entries:
        top = [token(i, p) for i, p in zip(entry.top_ids, entry.top_logprobs, strict=True)]
        content.append({**token(entry.token_id, entry.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


class LogprobsBuilder:
    """Collects one completion's tokens in order and counts the characters of its text as they go by."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._chars = 0
        self._at_start = True
        self._lists = CompletionLogprobs()

    def add(self, token_id: int, entry: TokenLogprobs | None, *, skip_special: bool) -> None:
        """Append a token; `entry` None: nothing came before it, so it has no probability."""
        data, lists = _token_bytes(self._tokenizer, token_id), self._lists
        lists.text_offset.append(self._chars)
        lists.tokens.append(_token_text(token_id, data))
        if entry is None:
            lists.token_logprobs.append(None)
            lists.top_logprobs.append(None)
        else:
            lists.token_logprobs.append(max(entry.logprob, LOWEST))
            lists.top_logprobs.append(self._top(entry))
        if data and self._tokenizer is not None and not (skip_special and self._tokenizer.is_special(token_id)):
            if self._at_start:
                data, self._at_start = self._tokenizer.first_token_bytes(token_id), False
            self._chars += len(self._utf8.decode(data))

    def take(self) -> CompletionLogprobs:
        """What was added since the last take."""
        taken, self._lists = self._lists, CompletionLogprobs()
        return taken

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        pairs = [*zip(entry.top_ids, entry.top_logprobs, strict=True), (entry.token_id, entry.logprob)]
        return {_token_text(i, _token_bytes(self._tokenizer, i)): max(p, LOWEST) for i, p in pairs}


def _token_bytes(tokenizer: Tokenizer | None, token_id: int) -> bytes:
    """b"" for an id the tokenizer does not know; a model's output may have more rows than that."""
    return tokenizer.token_bytes(token_id) if tokenizer is not None and token_id < tokenizer.vocab_size else b""


def _token_text(token_id: int, data: bytes) -> str:
    """A text of its own for every token: part of a character is spelled in bytes."""
    if not data:
        return f"token_id:{token_id}"
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
