"""The tokenizer files of Kimi-Linear: tiktoken.model and tokenizer_config.json."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from kimi_linear.text import SPLIT_PATTERN

__all__ = ["LAYOUT", "RANKS", "SPLIT_PATTERN", "tokenizer_config", "write"]

RANKS = 1024
LAYOUT = "user\nassistant\nsystem\ntool_declare\n"  # what every chat holds
# Kimi's names, by distance from the last rank; the gaps are reserved tokens.
SPECIAL_NAMES = {
    0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>", 12: "<|tool_calls_section_end|>", 13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>", 15: "<|tool_call_end|>", 17: "<|im_middle|>", 22: "<think>", 23: "</think>",
    254: "[UNK]", 255: "[PAD]",
}  # fmt: skip
NOT_SPECIAL = ("<think>", "</think>")  # shown when special tokens are skipped, as in Kimi's files


def write(folder: Path, tokens: list[bytes], merges: list[tuple[bytes, bytes]]) -> None:
    """A tiktoken file needs no merges: ranks say them."""
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (folder / "tiktoken.model").write_text("".join(lines), encoding="ascii")
    config = json.dumps(tokenizer_config(len(tokens)), indent=2)
    (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")


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
