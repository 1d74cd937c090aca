"""tokenizer.json vocabularies: our encoding and decoding against the tokenizers library's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from tests.fixtures.tokenizer_folders import byte_level_tokenizer, metaspace_tokenizer, qwen_tokenizer, write_hf
from thalweg.errors import CheckpointError, UnsupportedError
from thalweg.tokenizer.load import load_tokenizer

TEXTS = ["", "hello world", "  two  spaces ", "naïve 模型 👍\n\n", "<|im_end|>x", "<think>so</think>", "\x00 é"]


def legacy_metaspace_tokenizer() -> tokenizers.Tokenizer:
    tok = metaspace_tokenizer()
    tok.decoder = decoders.Metaspace()
    return tok


KINDS = {
    "byte_level": byte_level_tokenizer,
    "qwen": qwen_tokenizer,
    "metaspace": metaspace_tokenizer,
    "legacy": legacy_metaspace_tokenizer,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_agrees_with_the_library(tmp_path: Path, kind: str, text: str) -> None:
    library = KINDS[kind]()
    ours = load_tokenizer(write_hf(tmp_path, library))
    ids = library.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, allow_special=True) == ids
    assert ours.vocab_size == library.get_vocab_size()
    for skip in (False, True):
        assert ours.decode(ids, skip_special=skip) == library.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
def test_any_ids_decode_as_in_the_library(tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    library = KINDS[kind]()
    ours = load_tokenizer(write_hf(tmp_path_factory.mktemp(kind), library))
    # Byte tokens are left out: where they are not UTF-8 the library gives up more of the text than is broken.
    usable = [i for i in range(ours.vocab_size) if not library.id_to_token(i).startswith("<0x")]

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(st.lists(st.sampled_from(usable), max_size=12), st.booleans())
    def check(ids: list[int], skip: bool) -> None:
        assert ours.decode(ids, skip_special=skip) == library.decode(ids, skip_special_tokens=skip)

    check()


def test_special_tokens_are_plain_text_unless_allowed(tmp_path: Path) -> None:
    ours = load_tokenizer(write_hf(tmp_path, byte_level_tokenizer(), eos_token="<|im_end|>"))
    text = "he<|im_end|>"
    assert ours.encode(text, allow_special=True) == [256, ours.special_tokens["<|im_end|>"]]
    plain = ours.encode(text)
    assert not set(plain) & set(ours.special_tokens.values())
    assert ours.decode(plain) == text
    assert ours.eos_token == "<|im_end|>"
    assert ours.bos_id is None
    # Added but not special: one id either way, and never left out.
    think = ours.encode("<think>")
    assert len(think) == 1
    assert "<think>" not in ours.special_tokens
    assert ours.decode(think, skip_special=True) == "<think>"


def test_qwens_words_take_marks_in_and_digits_stand_alone(tmp_path: Path) -> None:
    ours = load_tokenizer(write_hf(tmp_path, qwen_tokenizer(), eos_token="<|im_end|>"))

    def pieces(text: str) -> list[bytes]:
        return [ours.token_bytes(i) for i in ours.encode(text)]

    assert pieces("x\u030c") == ["x\u030c".encode()]  # a letter with a mark of its own: one word, so one token
    assert pieces("e\u0301") == ["é".encode()]  # NFC before anything else
    assert pieces("12") == [b"1", b"2"]  # whatever the merges say
    assert pieces("he he") == [b"he", b" he"]
    assert (ours.eos_id, ours.bos_id) == (ours.special_tokens["<|im_end|>"], None)
    assert ours.decode(ours.encode("x\u030c 12 \u65e5\u672c\n\n")) == "x\u030c 12 \u65e5\u672c\n\n"


def test_a_leading_space_is_dropped_from_the_first_token_alone(tmp_path: Path) -> None:
    ours = load_tokenizer(write_hf(tmp_path, metaspace_tokenizer()))
    ids = ours.encode("hello wow")
    assert ours.decode(ids) == "hello wow"
    assert ours.token_bytes(ids[0]) == b" h"
    assert ours.first_token_bytes(ids[0]) == b"h"


def test_broken_byte_tokens_lose_only_themselves(tmp_path: Path) -> None:
    library = metaspace_tokenizer()
    ours = load_tokenizer(write_hf(tmp_path, library))
    ids = [library.token_to_id(t) for t in ("a", "<0xC3>", "<0xA9>", "<0xE6>", "b")]
    assert ours.decode(ids) == "aé\ufffdb"


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path: Path) -> None:
    library = byte_level_tokenizer()
    library.enable_truncation(2)
    library.enable_padding(length=50)
    assert len(load_tokenizer(write_hf(tmp_path, library)).encode("abcdef")) == 6


def test_surrogates_and_long_runs(tmp_path: Path) -> None:
    ours = load_tokenizer(write_hf(tmp_path, byte_level_tokenizer()))
    assert ours.decode(ours.encode("a\ud83d")) == "a\ufffd"
    for char in "a ":
        assert ours.decode(ours.encode(char * 400_000)) == char * 400_000


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    library = byte_level_tokenizer()
    library.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedError, match="the decoder has WordPiece"):
        load_tokenizer(write_hf(tmp_path, library))
    with pytest.raises(UnsupportedError, match="the decoder has None"):
        load_tokenizer(write_hf(tmp_path, tokenizers.Tokenizer(models.BPE({"a": 0}, []))))
    with pytest.raises(UnsupportedError, match="the model is 'WordLevel'"):
        load_tokenizer(write_hf(tmp_path, tokenizers.Tokenizer(models.WordLevel({"a": 0}, "a"))))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    write_hf(tmp_path, byte_level_tokenizer())
    path = tmp_path / "tokenizer.json"
    good = json.loads(path.read_text())
    huge = json.loads(path.read_text())
    huge["model"]["vocab"]["zz"] = 4_000_000_000
    for data, message in [
        ({"model": {"type": "BPE"}}, "not a tokenizer"),
        (good | {"model": {"type": "BPE", "vocab": {}, "merges": [["q", "q"]]}}, "not a tokenizer"),
        (huge, "the highest token id is 4000000000"),
        ([], "expected an object"),
    ]:
        path.write_text(json.dumps(data))
        with pytest.raises(CheckpointError, match=message) as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)
