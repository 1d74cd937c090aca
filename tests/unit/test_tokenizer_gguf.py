"""Tokenizers and chat templates from GGUF files: the same ids as the files that they were made of."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models

from tests.fixtures.tokenizer_folders import SPECIAL_NAMES, rank_lines, write_kimi
from thalweg.config.gguf.write import write_gguf
from thalweg.config.model_source import model_folder
from thalweg.errors import CheckpointError, UnsupportedError
from thalweg.tokenizer.gguf import CONTROL, NORMAL, USER_DEFINED
from thalweg.tokenizer.gguf_write import tokenizer_metadata
from thalweg.tokenizer.load import has_tokenizer, load_tokenizer
from thalweg.tokenizer.template import load_template

TEXTS = ["hello world", " he  wor模型é\n\n x", "It's 12345 THINGS<|im_end|>", "日本語 and ünïcode", ""]


def byte_chars() -> list[str]:
    """The byte-level alphabet, by byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def kimi_metadata() -> dict[str, Any]:
    chars = byte_chars()
    ranked = [base64.b64decode(line.split()[0]) for line in rank_lines()]
    first = len(ranked)
    names = [SPECIAL_NAMES.get(i, f"<|reserved_token_{first + i}|>") for i in range(256)]
    kinds = [USER_DEFINED if "think" in name else CONTROL for name in names]
    return {
        "general.architecture": "kimi-linear",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "kimi-k2",
        "tokenizer.ggml.tokens": ["".join(chars[byte] for byte in token) for token in ranked] + names,
        "tokenizer.ggml.token_type": [NORMAL] * first + kinds,
        "tokenizer.ggml.bos_token_id": first,
        "tokenizer.ggml.eos_token_id": first + 2,
        "tokenizer.chat_template": "{% for m in messages %}<|im_user|>{{ m.content }}<|im_end|>{% endfor %}",
    }


def written(path: Path, metadata: dict[str, Any]) -> Path:
    write_gguf(path, metadata, [])
    return path


def test_kimi_tokenizers_give_the_same_ids(tmp_path: Path) -> None:
    ours = load_tokenizer(written(tmp_path / "m.gguf", kimi_metadata()))
    folder = tmp_path / "folder"
    folder.mkdir()
    theirs = load_tokenizer(write_kimi(folder))
    assert ours.vocab_size == theirs.vocab_size
    assert ours.special_tokens == theirs.special_tokens
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_id, theirs.eos_id)
    for text in TEXTS:
        for allow in (False, True):
            assert ours.encode(text, allow) == theirs.encode(text, allow)
    ids = list(range(ours.vocab_size))
    assert ours.decode(ids, skip_special=True) == theirs.decode(ids, skip_special=True)
    assert [ours.token_bytes(i) for i in ids] == [theirs.token_bytes(i) for i in ids]


def test_merges_of_ranks_give_the_same_ids(tmp_path: Path) -> None:
    """What is written for readers that merge by pairs: each token comes of its bytes, and words as by rank."""
    folder = model_folder(None)
    keys, tokenizer = tokenizer_metadata(folder, 1280, (1026,)), load_tokenizer(folder)
    vocab = {token: i for i, token in enumerate(keys["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in keys["tokenizer.ggml.merges"]]
    by_pairs = tokenizers.Tokenizer(models.BPE(vocab, merges))
    chars = byte_chars()

    def spelt(data: bytes) -> str:
        return "".join(chars[byte] for byte in data)

    for i in range(1024):
        assert by_pairs.encode(spelt(tokenizer.token_bytes(i))).ids == [i]
    for word in (" apples", " nineteen", " Thursday", "####", " 模型é", "unbelievable"):
        assert by_pairs.encode(spelt(word.encode())).ids == tokenizer.encode(word)
    written(tmp_path / "m.gguf", {"general.architecture": "kimi-linear", **keys})
    again = load_tokenizer(tmp_path / "m.gguf")
    assert [again.token_bytes(i) for i in range(1280)] == [tokenizer.token_bytes(i) for i in range(1280)]


def test_the_template_is_the_files(tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf", kimi_metadata())
    tokenizer = load_tokenizer(path)
    template = load_template(path, tokenizer)
    assert template is not None
    ids = template.encode_chat([{"role": "user", "content": "he<|im_end|>"}], add_generation_prompt=False)
    assert tokenizer.decode(ids) == "<|im_user|>he<|im_end|><|im_end|>"
    assert ids.count(tokenizer.special_tokens["<|im_end|>"]) == 1  # the user's is text


QWEN = {
    "general.architecture": "qwen35",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": [*byte_chars(), "he", "ll", "Ġw", "<|endoftext|>", "<|im_end|>", "<think>", "[PAD262]"],
    "tokenizer.ggml.token_type": [NORMAL] * 259 + [CONTROL, CONTROL, USER_DEFINED, 5],
    "tokenizer.ggml.merges": ["h e", "l l", "Ġ w"],
    "tokenizer.ggml.eos_token_id": 259,
}


@pytest.mark.parametrize(("pre", "words"), [("qwen2", ["ก", "ีhe"]), ("qwen35", ["กีhe"])])
def test_qwen_tokenizers(tmp_path: Path, pre: str, words: list[str]) -> None:
    """The newer pattern keeps combining marks in their word."""
    tokenizer = load_tokenizer(written(tmp_path / "m.gguf", QWEN | {"tokenizer.ggml.pre": pre}))
    assert tokenizer.decode(tokenizer.encode("hello wกี 12")) == "hello wกี 12"
    assert tokenizer.encode("hello w")[:2] == [256, 257]
    assert tokenizer.encode("<|im_end|>", allow_special=True) == [260]
    assert len(tokenizer.encode("<|im_end|>")) > 1
    assert tokenizer.encode("<think>") == [261]
    assert tokenizer.eos_id == 259
    assert not tokenizer.is_special(261)
    pieces = tokenizer._encoder.pre_tokenizer.pre_tokenize_str("กีhe")  # type: ignore[attr-defined]
    spelt = dict(zip(byte_chars(), range(256), strict=True))
    assert [bytes(spelt[char] for char in piece).decode() for piece, _ in pieces] == words


def test_deepseek_splits_digits_by_three_and_does_not_normalise(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(written(tmp_path / "m.gguf", QWEN | {"tokenizer.ggml.pre": "deepseek-v3"}))
    text = "ab12345 カナ漢字x .foo(bar) e\u0301\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text  # NFC would have made one character of the accent
    pieces = tokenizer._encoder.pre_tokenizer.pre_tokenize_str(text)  # type: ignore[attr-defined]
    spelt = dict(zip(byte_chars(), range(256), strict=True))
    split = [bytes(spelt[char] for char in piece).decode() for piece, _ in pieces]
    assert split == ["ab", "123", "45", " ", "カナ漢字", "x", " .", "foo", "(bar", ")", " e\u0301", "\n"]


def test_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf", {"general.architecture": "x", "tokenizer.ggml.model": "no_vocab"})
    assert not has_tokenizer(path)
    assert not has_tokenizer(written(tmp_path / "n.gguf", {"general.architecture": "x"}))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, UnsupportedError, "'llama'; expected 'gpt2'"),
        ({"tokenizer.ggml.pre": "falcon"}, UnsupportedError, "'falcon', whose split pattern is not known"),
        ({"tokenizer.ggml.pre": ["qwen2"]}, UnsupportedError, "whose split pattern is not known"),
        ({"tokenizer.ggml.tokens": [1, 2]}, CheckpointError, "not an array of strings"),
        ({"tokenizer.ggml.token_type": [1]}, CheckpointError, "a number for each"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, CheckpointError, "eos_token_id is 1000000; expected an id below"),
        ({"tokenizer.ggml.tokens": ["a"] * 518}, CheckpointError, "twice"),
        ({"tokenizer.ggml.tokens": [f"t{i}" for i in range(518)]}, CheckpointError, "lacks a byte"),
    ],
)
def test_damaged_vocabularies_are_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    path = written(tmp_path / "m.gguf", kimi_metadata() | changes)
    with pytest.raises(error, match=message):
        load_tokenizer(path)
    assert "\n" not in json.dumps(message)


def test_a_template_of_another_kind_or_size_is_refused(tmp_path: Path) -> None:
    for template in (7, "x" * ((1 << 20) + 1)):
        path = written(tmp_path / "m.gguf", kimi_metadata() | {"tokenizer.chat_template": template})
        with pytest.raises(CheckpointError, match=r"tokenizer.chat_template"):
            load_template(path, load_tokenizer(path))
