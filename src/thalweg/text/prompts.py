"""From what users pass to token ids, checked against the model before anything reaches the engine."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from thalweg.core import SamplingParams
from thalweg.errors import InvalidRequest
from thalweg.tokenizer.base import Tokenizer

Prompt = str | Sequence[int]

_PART = 32_768


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    """Token ids of a text (special tokens are not recognised in it) or of a list of ids, checked.

    Raises InvalidRequest where there is nothing to run, a wrong type, or an id outside the vocabulary.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InvalidRequest("the prompt is text and the model folder has no tokenizer; pass token ids")
        ids = tokenizer.encode(prompt)
    else:
        ids = check_token_ids(prompt, vocab_size)
    if not ids:
        raise InvalidRequest("the prompt is empty; expected at least one token")
    return ids


def check_token_ids(ids: Any, vocab_size: int) -> list[int]:
    """The same ids as a list of Python ints. Raises InvalidRequest naming the first bad one."""
    if isinstance(ids, (str, bytes, Mapping)) or not isinstance(ids, Iterable):
        raise InvalidRequest(f"the prompt is a {type(ids).__name__}; expected text or a list of token ids")
    # Prompts are long, and nearly all are right: the usual kind is checked without a step of Python for each token.
    if type(ids) is list and all(_are_ids(part, vocab_size) for part in _parts(ids)):
        return ids
    values = []
    for i, token in enumerate(ids):
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise InvalidRequest(f"prompt token {i} is {token!r}; expected an integer")
        try:
            value = token.__index__()
        except TypeError:  # an array or tensor of floats, or of more than one
            raise InvalidRequest(f"prompt token {i} is {token!r}; expected an integer") from None
        if not 0 <= value < vocab_size:
            raise InvalidRequest(f"prompt token {i} is {value}; expected 0 to {vocab_size - 1}, the model's vocabulary")
        values.append(value)
    return values


def check_params(params: SamplingParams, tokenizer: Tokenizer | None, vocab_size: int) -> SamplingParams:
    """What SamplingParams cannot check alone. Raises InvalidRequest."""
    if params.stop and tokenizer is None:
        raise InvalidRequest("stop has strings and the model folder has no tokenizer; use stop_token_ids")
    marks = () if params.thinking is None else (params.thinking.begin, params.thinking.end)
    named: tuple[tuple[str, Iterable[int]], ...] = (
        ("logit_bias", params.logit_bias),
        ("stop_token_ids", params.stop_token_ids),
        ("thinking", marks),
    )
    for name, ids in named:
        for token in ids:
            if not 0 <= token < vocab_size:
                raise InvalidRequest(f"{name} names token id {token}; expected 0 to {vocab_size - 1}")
    return params


def _are_ids(part: list[int], vocab_size: int) -> bool:
    import numpy as np  # here, since the command line is read without it

    if set(map(type, part)) != {int}:
        return False
    try:
        packed = array("I", part)
    except OverflowError:
        return False
    return bool(np.frombuffer(packed, dtype=np.uintc).max() < vocab_size)


def _parts(ids: list[int]) -> Iterator[list[int]]:
    """`ids` in pieces of which each takes about a millisecond, so that other threads get their turn between them."""
    return (ids[i : i + _PART] for i in range(0, len(ids), _PART))
