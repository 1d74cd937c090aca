"""The Kimi tokenizer against its reference encodings, and against damaged and hostile files."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures.tokenizer_folders import FIRST_SPECIAL, kimi_config, rank_lines, write_kimi
from thalweg.errors import CheckpointError, InvalidRequest
from thalweg.tokenizer.base import Tokenizer, literal_pattern, valid_unicode
from thalweg.tokenizer.kimi import KIMI_PATTERN, MAX_RUN_CHARS, KimiTokenizer, load_kimi_tokenizer
from thalweg.tokenizer.load import has_tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_kimi(tmp_path_factory.mktemp("kimi")))


def test_reference_encodings(shared_dir: Path) -> None:
    folder = shared_dir / "tokenizers" / "kimi_like"
    reference = json.loads((folder / "encodings.json").read_text())
    tokenizer = load_tokenizer(folder)
    assert reference["pat_str"] == KIMI_PATTERN
    assert tokenizer.vocab_size == reference["n_ranks"] + 256
    assert len(reference["cases"]) == 51
    for case in reference["cases"]:
        assert tokenizer.encode(case["text"]) == case["ids_plain"]
        assert tokenizer.encode(case["text"], allow_special=True) == case["ids_special_allowed"]
        assert tokenizer.decode(case["ids_special_allowed"]) == case["text"]
    for text, token_id in reference["special_tokens"].items():
        assert tokenizer.special_tokens[text] == token_id


def test_special_ids_are_named_from_the_config_and_gaps_are_reserved(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.special_tokens) == 256
    assert tokenizer.special_tokens["<|im_end|>"] == FIRST_SPECIAL + 2
    assert tokenizer.special_tokens[f"<|reserved_token_{FIRST_SPECIAL + 5}|>"] == FIRST_SPECIAL + 5
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("[BOS]", "<|im_end|>")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (FIRST_SPECIAL, FIRST_SPECIAL + 2)


def test_thinking_marks_are_kept_where_control_tokens_are_skipped(tokenizer: Tokenizer) -> None:
    text = "<|im_user|><think>hello</think><|im_end|>"
    ids = tokenizer.encode(text, allow_special=True)
    assert len(ids) == 5
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special=True) == "<think>hello</think>"
    assert not set(tokenizer.encode(text)) & set(tokenizer.special_tokens.values())


def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer) -> None:
    for token_id in (-1, tokenizer.vocab_size, 10**12):
        with pytest.raises(InvalidRequest, match=f"expected 0 to {tokenizer.vocab_size - 1}"):
            tokenizer.decode([token_id])
    assert tokenizer.decode_bytes([]) == b""
    assert tokenizer.token_bytes(257) == b"hello"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(st.characters(), max_size=60), st.booleans())
def test_every_text_survives_the_round_trip(tokenizer: Tokenizer, text: str, special: bool) -> None:
    assert tokenizer.decode(tokenizer.encode(text, allow_special=special)) == valid_unicode(text)


def test_surrogates_become_text() -> None:
    assert valid_unicode("a\ud83d") == "a\ufffd"
    assert valid_unicode("\ud83d\udc4d") == "👍"
    assert valid_unicode("\udc4d\ud83d") == "\ufffd\ufffd"


@pytest.mark.parametrize(
    "text",
    [
        "x" + " " * 20_000,
        " " + "x" * 20_000,
        "a",
        " ",
        "A",
        "\n",
        "<",
        "模",
        "\u0301",
        " \n",
        "<|im_",
        "👨",
        "1",
        "!",
        "aA",
    ],
)
def test_long_inputs_take_little_time(tokenizer: Tokenizer, text: str) -> None:
    text = text * (400_000 // len(text)) + "x"
    began = time.perf_counter()
    ids = tokenizer.encode(text, allow_special=True)
    assert time.perf_counter() - began < 5
    assert tokenizer.decode(ids) == text


def test_runs_are_cut_where_the_published_tokenizer_cuts_them(tokenizer: Tokenizer) -> None:
    # "he" is one token, so a cut shows where it falls inside one.
    pairs = MAX_RUN_CHARS // 2
    assert tokenizer.encode("he" * pairs) == [256] * pairs
    assert tokenizer.encode("x" + "he" * pairs) == [ord("x"), *[256] * (pairs - 1), ord("h"), ord("e")]
    assert tokenizer.encode("x " + "he" * pairs) == [ord("x"), ord(" "), *[256] * pairs]
    # Counting begins anew after a cut.
    assert tokenizer.encode("he" * pairs * 3) == [256] * pairs * 3
    assert tokenizer.encode("x" + "he" * pairs * 2).count(256) == 2 * pairs - 2


def test_literal_pattern_takes_the_longest() -> None:
    pattern = literal_pattern(["<a>", "<a>b", "[", "a" * 128, *("a" * n for n in range(2, 40))])
    assert [m.group() for m in pattern.finditer("<a><a>bc[ aaa a")] == ["<a>", "<a>b", "[", "aaa"]
    assert literal_pattern([]).search("anything") is None


def test_no_tokenizer_names_what_was_looked_for(tmp_path: Path) -> None:
    assert not has_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"expected tiktoken\.model or tokenizer\.json"):
        load_tokenizer(tmp_path)
    assert has_tokenizer(write_kimi(tmp_path))


def test_remote_code_is_not_run(tmp_path: Path) -> None:
    write_kimi(tmp_path)
    (tmp_path / "tokenization_kimi.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert isinstance(load_tokenizer(tmp_path), KimiTokenizer)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"aGVs 256 7", "line 257"),
        (b"aGVs 9", "then 256"),
        (b"aGVs -1", "line 257"),
        (b"aGVs", "line 257"),
        (b"!!!! 256", "line 257"),
        (b" 256", "line 257"),
        (b"AA== 256", "new token"),
        (b"YWFh" * 2000 + b" 256", "1 to 1024 bytes"),
    ],
)
def test_damaged_ranks_are_refused(tmp_path: Path, line: bytes, message: str) -> None:
    write_kimi(tmp_path, lines=[*rank_lines()[:256], line])
    with pytest.raises(CheckpointError, match=message) as caught:
        load_kimi_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_vocabulary_without_every_byte_is_refused(tmp_path: Path) -> None:
    write_kimi(tmp_path, lines=rank_lines()[:255])
    with pytest.raises(CheckpointError, match="no token for 1 of the 256 single bytes, first 0xff"):
        load_kimi_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("key", "entry", "message"),
    [
        (str(FIRST_SPECIAL + 256), {"content": "<x>"}, "expected ids 262 to 517"),
        ("5", {"content": "<x>"}, "expected ids 262 to 517"),
        ("1e3", {"content": "<x>"}, "expected ids"),
        (str(FIRST_SPECIAL + 9), {"content": "[BOS]"}, "names a token twice"),
        (str(FIRST_SPECIAL + 9), {"content": ""}, "1 to 128 characters"),
        (str(FIRST_SPECIAL + 9), {"content": "x" * 129}, "1 to 128 characters"),
        (str(FIRST_SPECIAL + 9), {"content": 3}, "1 to 128 characters"),
        (str(FIRST_SPECIAL + 9), "<x>", "1 to 128 characters"),
    ],
)
def test_bad_special_tokens_are_refused(tmp_path: Path, key: str, entry: object, message: str) -> None:
    config = kimi_config()
    config["added_tokens_decoder"][key] = entry
    with pytest.raises(CheckpointError, match=message):
        load_kimi_tokenizer(write_kimi(tmp_path, config))


def test_bad_configs_are_refused(tmp_path: Path) -> None:
    path = write_kimi(tmp_path) / "tokenizer_config.json"
    for text, message in [
        ("[]", "expected an object"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"added_tokens_decoder": []}', "expected an object"),
        ('{"eos_token": "<|nope|>"}', "eos_token is '<|nope|>'"),
    ]:
        path.write_text(text)
        with pytest.raises(CheckpointError, match=message.replace("|", r"\|")):
            load_kimi_tokenizer(tmp_path)
    path.write_bytes(b"\xff{}")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        load_kimi_tokenizer(tmp_path)


def test_files_are_read_no_further_than_their_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_kimi(tmp_path)
    monkeypatch.setattr("thalweg.tokenizer.kimi.MAX_RANKS_BYTES", 1000)
    with pytest.raises(CheckpointError, match="larger than 1000 bytes"):
        load_kimi_tokenizer(tmp_path)
