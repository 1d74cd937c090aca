"""A tokenizer and its chat templates as a GGUF file's metadata, and back as the files of a model folder."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from thalweg.config.gguf.model import is_gguf, open_gguf
from thalweg.errors import UnsupportedError
from thalweg.tokenizer.base import Tokenizer
from thalweg.tokenizer.files import TOKENIZER_CONFIG, parse_json_object, read_text
from thalweg.tokenizer.gguf import (
    CONTROL,
    KIMI,
    MERGES,
    MODEL,
    NORMAL,
    PATTERNS,
    PRE,
    TEMPLATE,
    TOKENS,
    TYPES,
    UNUSED,
    USER_DEFINED,
    byte_level_data,
    load_gguf_tokenizer,
)
from thalweg.tokenizer.hf import MAX_TOKENIZER_BYTES, TOKENIZER_FILE, HFTokenizer, byte_level_text
from thalweg.tokenizer.kimi import RANKS_FILE, KimiTokenizer
from thalweg.tokenizer.load import has_tokenizer, load_tokenizer
from thalweg.tokenizer.template import TEMPLATE_FILE, template_sources


def tokenizer_metadata(folder: Path, vocab_size: int, end_ids: tuple[int, ...]) -> dict[str, Any]:
    """The keys of the tokenizer of a model folder or GGUF file, with a token for every row of the vocabulary.

    Raises UnsupportedError if llama.cpp has no name for how it splits text.
    """
    if is_gguf(folder):
        return {key: value for key, value in open_gguf(folder).metadata.items() if key.startswith("tokenizer.")}
    if not has_tokenizer(folder):
        return {MODEL: "no_vocab"}
    tokenizer = load_tokenizer(folder)
    keys = _kimi(tokenizer) if isinstance(tokenizer, KimiTokenizer) else _byte_level(folder / TOKENIZER_FILE)
    for i in range(len(keys[TOKENS]), vocab_size):
        keys[TOKENS].append(f"[PAD{i}]")
        keys[TYPES].append(UNUSED)
    template, of_tools = template_sources(folder)
    templates = {TEMPLATE: template, f"{TEMPLATE}.tool_use": of_tools}
    return {
        **keys,
        **_ids(tokenizer, end_ids),
        "tokenizer.ggml.add_bos_token": False,
        **{key: text for key, text in templates.items() if text is not None},
    }


def _ids(tokenizer: Tokenizer, end_ids: tuple[int, ...]) -> dict[str, int]:
    """What begins a text and what ends one: the first id ends a document for llama.cpp, the others a turn."""
    named = dict(zip(("eos", "eot", "eom"), end_ids, strict=False))
    if tokenizer.bos_id is not None:
        named["bos"] = tokenizer.bos_id
    return {f"tokenizer.ggml.{key}_token_id": value for key, value in named.items()}


def _kimi(tokenizer: KimiTokenizer) -> dict[str, Any]:
    first = min(tokenizer.special_tokens.values())
    ranks = {tokenizer.token_bytes(i): i for i in range(first)}
    special = sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
    return {
        MODEL: "gpt2",
        PRE: KIMI,
        TOKENS: [byte_level_text(token) for token in ranks] + [text for text, _ in special],
        TYPES: [NORMAL] * first + [CONTROL if tokenizer.is_special(i) else USER_DEFINED for _, i in special],
        MERGES: [" ".join(map(byte_level_text, pair)) for token in ranks if (pair := _last_merge(token, ranks))],
    }


def _last_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that merge into `token` last, when pairs are merged by rank; None for a byte, or if a token can
    only be met whole."""
    parts, limit = [token[i : i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        ranked = [(ranks.get(a + b, limit), i) for i, (a, b) in enumerate(pairwise(parts))]
        rank, i = min(ranked)
        if rank >= limit:
            return None
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _byte_level(path: Path) -> dict[str, Any]:
    """From tokenizer.json. Added tokens stand at their ids; ids without a token are padding."""
    data = parse_json_object(read_text(path, MAX_TOKENIZER_BYTES), path)
    vocab, added = data["model"]["vocab"], data.get("added_tokens", [])
    size = max([*vocab.values(), *(token["id"] for token in added)]) + 1
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for text, i in vocab.items():
        tokens[i], types[i] = text, NORMAL
    for token in added:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]]
    return {MODEL: "gpt2", PRE: _name_of_pattern(data, path), TOKENS: tokens, TYPES: types, MERGES: merges}


def _name_of_pattern(data: Mapping[str, Any], path: Path) -> str:
    """What llama.cpp calls the way the file splits text."""
    splits = data.get("pre_tokenizer") or {}
    patterns = [part.get("pattern", {}).get("Regex") for part in splits.get("pretokenizers", [splits])]
    for name, known in PATTERNS.items():
        if tuple(filter(None, patterns)) == known:
            return name
    raise UnsupportedError(
        f"{path}: llama.cpp has no name for its split pattern; expected Qwen's, DeepSeek-V3's or Kimi's"
    )


def write_tokenizer_files(path: Path, folder: Path) -> None:
    """The tokenizer of the GGUF file at `path` as the files of a model folder."""
    metadata, tokenizer = open_gguf(path).metadata, load_gguf_tokenizer(path)
    named = {f"{key}_token": i for key, i in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)) if i is not None}
    config: dict[str, Any] = {key: metadata[TOKENS][i] for key, i in named.items()}
    if isinstance(tokenizer, HFTokenizer):
        data = byte_level_data(metadata, path)
        (folder / TOKENIZER_FILE).write_text(json.dumps(data, ensure_ascii=False))
    else:
        first = min(tokenizer.special_tokens.values())
        ranks = [base64.b64encode(tokenizer.token_bytes(i)) + b" %d\n" % i for i in range(first)]
        (folder / RANKS_FILE).write_bytes(b"".join(ranks))
        config["added_tokens_decoder"] = {
            str(i): {"content": text, "special": tokenizer.is_special(i)}
            for text, i in tokenizer.special_tokens.items()
        }
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, ensure_ascii=False, indent=2))
    template, of_tools = template_sources(path)
    if of_tools is not None:
        config["chat_template"] = [
            {"name": "default", "template": template},
            {"name": "tool_use", "template": of_tools},
        ]
        (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, ensure_ascii=False, indent=2))
    elif template is not None:
        (folder / TEMPLATE_FILE).write_text(template)
