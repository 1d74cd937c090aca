"""Streaming text: deltas add up to the whole, characters stay whole, and stop strings cut exactly."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures.tokenizer_folders import (
    FIRST_SPECIAL,
    byte_level_tokenizer,
    metaspace_tokenizer,
    write_hf,
    write_kimi,
)
from thalweg.errors import InvalidRequest
from thalweg.tokenizer.base import Tokenizer
from thalweg.tokenizer.detokenizer import IncrementalDetokenizer
from thalweg.tokenizer.load import load_tokenizer


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_kimi(tmp_path_factory.mktemp("kimi")))


@pytest.fixture(scope="module")
def tokenizers(kimi: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    folders = [write_hf(tmp_path_factory.mktemp("hf"), tok) for tok in (byte_level_tokenizer(), metaspace_tokenizer())]
    return [kimi, *map(load_tokenizer, folders)]


def chunks(items: list[int], sizes: list[int]) -> list[list[int]]:
    cut, start = [], 0
    for size in sizes:
        cut.append(items[start : start + size])
        start += size
    return [*cut, items[start:]]


def expected_cut(text: str, stop: list[str], include: bool) -> tuple[str, str | None]:
    """Where the first stop string to be complete cuts `text`, by trying every end."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_deltas_add_up_to_the_decoded_whole(tokenizers: list[Tokenizer], data: st.DataObject) -> None:
    tokenizer = data.draw(st.sampled_from(tokenizers))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    skip = data.draw(st.booleans())
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    text = ""
    for chunk in chunks(ids, data.draw(st.lists(st.integers(0, 3), max_size=20))):
        text += detokenizer.push(chunk)
    assert text + detokenizer.flush() == tokenizer.decode(ids, skip_special=skip)
    assert detokenizer.finished
    assert detokenizer.flush() == ""
    assert detokenizer.push([1]) == ""


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text("abé模 ", max_size=24))
def test_only_whole_characters_come_out(tokenizers: list[Tokenizer], text: str) -> None:
    for tokenizer in tokenizers:
        detokenizer = IncrementalDetokenizer(tokenizer)
        deltas = [detokenizer.push([i]) for i in tokenizer.encode(text)]
        assert "".join(deltas) == text  # nothing is left for flush
        assert detokenizer.flush() == ""


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    text=st.text("abc", max_size=24),
    stop=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
    include=st.booleans(),
    sizes=st.lists(st.integers(0, 4), max_size=12),
)
def test_stop_strings_cut_the_same_however_the_ids_come(
    kimi: Tokenizer, text: str, stop: list[str], include: bool, sizes: list[int]
) -> None:
    detokenizer = IncrementalDetokenizer(kimi, stop=stop, include_stop_str_in_output=include)
    expected, matched = expected_cut(text, stop, include)
    shown = ""
    for chunk in chunks(kimi.encode(text), sizes):
        shown += detokenizer.push(chunk)
        assert expected.startswith(shown)  # nothing is shown that is taken back
    shown += detokenizer.flush()
    assert (shown, detokenizer.matched_stop) == (expected, matched)


def test_a_possible_stop_is_held_back_and_released_when_it_is_not_one(kimi: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(kimi, stop=["END."])
    assert detokenizer.push(kimi.encode("the E")) == "the "
    assert detokenizer.push(kimi.encode("N")) == ""
    assert detokenizer.push(kimi.encode("EN")) == "EN"
    assert detokenizer.push(kimi.encode("D")) == ""
    assert not detokenizer.finished
    assert detokenizer.flush() == "END"


def test_a_stop_ends_the_text(kimi: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(kimi, stop=["lo w", "wor"])
    assert detokenizer.push(kimi.encode("hello world")) == "hel"
    assert detokenizer.matched_stop == "lo w"
    assert detokenizer.finished
    assert detokenizer.push(kimi.encode("more")) == ""
    assert detokenizer.flush() == ""


def test_a_stop_may_be_a_special_token_only_when_those_are_shown(kimi: Tokenizer) -> None:
    ids = kimi.encode("a<|im_end|>b", allow_special=True)
    hidden = IncrementalDetokenizer(kimi, stop=["<|im_end|>"])
    assert hidden.push(ids) + hidden.flush() == "ab"
    shown = IncrementalDetokenizer(kimi, skip_special_tokens=False, stop=["<|im_end|>"])
    assert shown.push(ids) == "a"
    assert shown.matched_stop == "<|im_end|>"


def test_broken_bytes_become_replacement_characters_and_swallow_nothing(kimi: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(kimi)
    first_two = kimi.encode("模")[:1]
    assert kimi.token_bytes(first_two[0]) == "模".encode()[:2]
    assert detokenizer.push(first_two) == ""
    assert detokenizer.push(kimi.encode("ok")) == "\ufffdok"
    assert detokenizer.push(first_two) == ""
    assert detokenizer.flush() == "\ufffd"


def test_a_stop_string_may_match_what_flush_completes(kimi: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(kimi, stop=["\ufffd"])
    assert detokenizer.push([*kimi.encode("a"), 0xE6]) == "a"
    assert detokenizer.flush() == ""
    assert detokenizer.matched_stop == "\ufffd"


def test_ids_beyond_the_vocabulary_have_no_text(kimi: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(kimi)
    assert detokenizer.push([FIRST_SPECIAL + 256, 10**9, *kimi.encode("a")]) == "a"
    with pytest.raises(InvalidRequest):
        detokenizer.push([-1])


def test_time_per_token_does_not_grow(kimi: Tokenizer, tmp_path: Path) -> None:
    # The worst case for a search from the start: everything so far begins a stop string.
    stop = ["a" * 1023 + chr(ord("b") + i) for i in range(20)]
    detokenizer = IncrementalDetokenizer(kimi, stop=stop)
    (token,) = kimi.encode("a")

    def seconds(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            detokenizer.push([token])
        return time.perf_counter() - began

    seconds(2000)
    early = min(seconds(2000) for _ in range(5))
    seconds(100_000)
    late = min(seconds(2000) for _ in range(5))
    assert late < 3 * early + 0.01
