"""The tokenizer files of Qwen3.5: tokenizer.json, and tokenizer_config.json with the chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen3_5.text import SPLIT_PATTERN

__all__ = ["LAYOUT", "RANKS", "SPLIT_PATTERN", "tokenizer_config", "write"]

RANKS = 1248
LAYOUT = "user\nassistant\nsystem\n"  # what every chat holds
# In the published order, after the ranks; config.json's vocab_size is larger than all, as published ones are.
SPECIAL_NAMES = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>"),
    *("<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>"),
    *("<think>", "</think>"),
)


def write(folder: Path, tokens: list[bytes], merges: list[tuple[bytes, bytes]]) -> None:
    for name, content in (
        ("tokenizer.json", tokenizer(tokens, merges)),
        ("tokenizer_config.json", tokenizer_config(len(tokens))),
    ):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def tokenizer(tokens: list[bytes], merges: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    """Byte-level BPE after NFC, as the tokenizers library reads it; bytes are written as its alphabet has them."""
    written = _written_bytes(tokens[:256])

    def write_token(token: bytes) -> str:
        return "".join(written[byte] for byte in token)

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": int(i), **entry} for i, entry in _added_tokens(len(tokens)).items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False},
                byte_level,
            ],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {write_token(token): i for i, token in enumerate(tokens)},
            "merges": [[write_token(left), write_token(right)] for left, right in merges],
        },
    }


def tokenizer_config(ranks: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "Qwen2TokenizerFast",
        "added_tokens_decoder": _added_tokens(ranks),
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "add_bos_token": False,
        "add_prefix_space": False,
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "chat_template": Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8"),
    }


def _added_tokens(ranks: int) -> dict[str, dict[str, Any]]:
    """By id. Those without bars show when special tokens are skipped."""
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {
        str(ranks + offset): {"content": name, "special": name.startswith("<|"), **flags}
        for offset, name in enumerate(SPECIAL_NAMES)
    }


def _written_bytes(tokens: list[bytes]) -> dict[int, str]:
    """The first 188 of the 256 byte tokens are printable and written as they are, the others from U+0100 on."""
    printable = 188
    return {
        token[0]: chr(token[0]) if place < printable else chr(0x100 + place - printable)
        for place, token in enumerate(tokens)
    }
