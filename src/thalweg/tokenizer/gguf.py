"""The tokenizer and chat templates inside a GGUF file. Split patterns are not stored there: `pre` names one, and a name
that is not known here is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thalweg.config.gguf.model import open_gguf
from thalweg.errors import CheckpointError, UnsupportedError
from thalweg.tokenizer.base import Tokenizer
from thalweg.tokenizer.hf import MAX_IDS, HFTokenizer, byte_level_bytes
from thalweg.tokenizer.kimi import MAX_SPECIAL_CHARS, MAX_TOKEN_BYTES, KimiTokenizer

TOKENS, TYPES, MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"
MODEL, PRE = "tokenizer.ggml.model", "tokenizer.ggml.pre"
TEMPLATE = "tokenizer.chat_template"
MAX_TEMPLATE_CHARS = 1 << 20
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

KIMI = "kimi-k2"
_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?"
_ASCII_MARKS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
PATTERNS: dict[str, tuple[str, ...]] = {
    "qwen2": (rf"{_WORD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_END}",),
    "qwen35": (rf"{_WORD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_END}",),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        rf"{_ASCII_MARKS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_END}",
    ),
}
"""Splits by what `pre` calls them, one after another."""
_NFC = ("qwen2", "qwen35")  # whose texts are normalised


def has_gguf_tokenizer(path: Path) -> bool:
    """Whether the file holds a tokenizer, sound or not."""
    return bool(open_gguf(path).metadata.get(MODEL, "no_vocab") != "no_vocab")


def gguf_templates(path: Path) -> tuple[str | None, str | None]:
    """The chat template, and the one for requests with tools if there is another."""
    metadata = open_gguf(path).metadata
    template, of_tools = (metadata.get(key) for key in (TEMPLATE, f"{TEMPLATE}.tool_use"))
    if not isinstance(template, str | None) or not isinstance(of_tools, str | None):
        raise CheckpointError(f"{path}: {TEMPLATE} is a {type(template or of_tools).__name__}; expected a string")
    if max(len(template or ""), len(of_tools or "")) > MAX_TEMPLATE_CHARS:
        raise CheckpointError(f"{path}: {TEMPLATE} has over {MAX_TEMPLATE_CHARS} characters, the most expected of one")
    return template, of_tools


def load_gguf_tokenizer(path: Path) -> Tokenizer:
    """Raises CheckpointError if the vocabulary is damaged, UnsupportedError if it is of another kind."""
    metadata = open_gguf(path).metadata
    model, pre = metadata.get(MODEL), metadata.get(PRE)
    if model != "gpt2":
        raise UnsupportedError(f"{path}: {MODEL} is {model!r:.80}; expected 'gpt2', a byte-level BPE vocabulary")
    if not isinstance(pre, str) or (pre != KIMI and pre not in PATTERNS):
        known = ", ".join((KIMI, *PATTERNS))
        raise UnsupportedError(
            f"{path}: {PRE} is {pre!r:.80}, whose split pattern is not known; expected one of {known}"
        )
    tokens, types = _strings(metadata, TOKENS, path), metadata.get(TYPES)
    if types is None:
        types = [NORMAL] * len(tokens)
    if not isinstance(types, list) or len(types) != len(tokens) or not 0 < len(tokens) <= MAX_IDS:
        raise CheckpointError(f"{path}: {TYPES} does not have a number for each of {len(tokens)} tokens; expected that")
    tokenizer: Tokenizer
    if pre == KIMI:
        tokenizer = _kimi(tokens, types, path)
    else:
        data = byte_level_data(metadata, path)
        tokenizer = HFTokenizer(json.dumps(data), data, path)
    tokenizer.bos_id, tokenizer.eos_id = (
        _token_id(metadata, f"tokenizer.ggml.{key}_token_id", len(tokens), path) for key in ("bos", "eos")
    )
    return tokenizer


def _kimi(tokens: list[str], types: list[Any], path: Path) -> KimiTokenizer:
    """Ids are ranks up to the first token that is named and not merged."""
    count = next((i for i, kind in enumerate(types) if kind not in (NORMAL, BYTE)), len(tokens))
    ranks = {byte_level_bytes(token): i for i, token in enumerate(tokens[:count])}
    special = {token: count + i for i, token in enumerate(tokens[count:])}
    if len(ranks) != count or len(special) != len(tokens) - count:
        raise CheckpointError(f"{path}: {TOKENS} has a token twice; expected every one once")
    if any(bytes([byte]) not in ranks for byte in range(256)) or max(map(len, ranks)) > MAX_TOKEN_BYTES:
        raise CheckpointError(f"{path}: {TOKENS} lacks a byte, or has a token of over {MAX_TOKEN_BYTES} bytes")
    if b"" in ranks or any(not 0 < len(text) <= MAX_SPECIAL_CHARS for text in special):
        raise CheckpointError(f"{path}: a special token is empty or longer than {MAX_SPECIAL_CHARS} characters")
    texts = frozenset(i for i in special.values() if types[i] in (NORMAL, USER_DEFINED, BYTE))
    return KimiTokenizer(ranks, special, texts)


def byte_level_data(metadata: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What a tokenizer.json with the file's tokens and merges would be."""
    tokens = _strings(metadata, TOKENS, path)
    types = metadata.get(TYPES) or [NORMAL] * len(tokens)
    merges = [merge.split(" ") for merge in _strings(metadata, MERGES, path)]
    if any(len(pair) != 2 for pair in merges):
        raise CheckpointError(f"{path}: {MERGES} has an entry that is not a pair; expected two tokens and a space")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CheckpointError(f"{path}: {TOKENS} has a token twice; expected every one once")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    pre = metadata[PRE]
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in PATTERNS[pre]
    ]
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": tokens[i], "special": kind != USER_DEFINED, **flags}
            for i, kind in enumerate(types)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ],
        "normalizer": {"type": "NFC"} if pre in _NFC else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def _strings(metadata: Mapping[str, Any], key: str, path: Path) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(token, str) for token in value):
        raise CheckpointError(f"{path}: {key} is missing or not an array of strings; expected one")
    return value


def _token_id(metadata: Mapping[str, Any], key: str, size: int, path: Path) -> int | None:
    value = metadata.get(key)
    if value is not None and (not isinstance(value, int) or not 0 <= value < size):
        raise CheckpointError(f"{path}: {key} is {value!r:.40}; expected an id below {size}")
    return value
