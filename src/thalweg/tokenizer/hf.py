"""tokenizer.json through the tokenizers library, for BPE vocabularies whose ids have bytes of their own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import tokenizers

from thalweg.errors import CheckpointError, UnsupportedError
from thalweg.tokenizer.base import Tokenizer, valid_unicode
from thalweg.tokenizer.files import configured_token_id, parse_json_object, read_text, read_tokenizer_config

TOKENIZER_FILE = "tokenizer.json"
MAX_TOKENIZER_BYTES = 256 << 20
MAX_IDS = 1 << 22
MAX_SPECIAL_CHARS = 128
BATCH_CHARS = 4096

# Added tokens that are marks although the file does not call them special: <think>, <tool_call>, [gMASK].
_MARK = re.compile(r"<.*>|\[.*\]", re.DOTALL)
_BYTE_TOKEN = re.compile(r"<0x([0-9a-fA-F]{2})>")


class HFTokenizer(Tokenizer):
    """A tokenizer.json. Added tokens not marked special are always recognised, as the format has it.

    `text` is the file and `data` what its JSON holds. Raises CheckpointError when the tokenizers library
    refuses it, UnsupportedError when its model is not BPE or its decoder does not work token by token.
    """

    def __init__(self, text: str, data: dict[str, Any], path: Path) -> None:
        kind = data["model"].get("type", "BPE") if isinstance(data.get("model"), dict) else None
        if kind != "BPE":
            raise UnsupportedError(f"{path}: the model is {kind!r}; expected a BPE vocabulary")
        # Two encoders, because whether special tokens are recognised is a mutable setting of one.
        self._encoder, self._plain_encoder = _encoder(text, path), _encoder(text, path)
        self._plain_encoder.encode_special_tokens = True
        self.surrounds = self._encoder.num_special_tokens_to_add(is_pair=False) > 0
        self._decoding = _Decoding(data.get("decoder"), path)

        self.ids_by_text: dict[str, int] = self._encoder.get_vocab(with_added_tokens=True)
        size = max(self.ids_by_text.values(), default=-1) + 1
        if not 0 < size <= MAX_IDS:
            raise CheckpointError(f"{path}: the highest token id is {size - 1}; expected 0 to {MAX_IDS - 1}")
        self._text_by_id = {i: text for text, i in self.ids_by_text.items()}
        self._bytes_by_id = [b""] * size
        for i, token in self._text_by_id.items():
            self._bytes_by_id[i] = self._decoding.token_bytes(token)

        added = self._encoder.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in added.items() if token.special}
        self.added_tokens = {token.content: i for i, token in added.items()}
        self._special_ids = frozenset(self.special_tokens.values())
        self._marks = {
            text: i for text, i in self.added_tokens.items() if i in self._special_ids or _MARK.fullmatch(text)
        }
        self._text_encoder = self._plain_encoder
        if len(self._marks) > len(self.special_tokens):
            tokens = [token | {"special": token["id"] in self._marks.values()} for token in data["added_tokens"]]
            self._text_encoder = _encoder(json.dumps(data | {"added_tokens": tokens}), path)
            self._text_encoder.encode_special_tokens = True
        longest = max(map(len, self.special_tokens), default=0)
        if longest > MAX_SPECIAL_CHARS:
            raise CheckpointError(
                f"{path}: a special token has {longest} characters; expected {MAX_SPECIAL_CHARS} at most"
            )

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        return _ids(self._encoder if allow_special else self._plain_encoder, valid_unicode(text))

    @property
    def marks(self) -> dict[str, int]:
        return self._marks

    def encode_text(self, text: str) -> list[int]:
        return _ids(self._text_encoder, valid_unicode(text))

    def first_token_bytes(self, token_id: int) -> bytes:
        plain = self.token_bytes(token_id)
        text = self._text_by_id.get(token_id)
        return plain if text is None else self._decoding.first_token_bytes(text)


def _ids(encoder: tokenizers.Tokenizer, text: str) -> list[int]:
    if len(text) < BATCH_CHARS:
        return list(encoder.encode(text, add_special_tokens=False).ids)
    # The library lets other threads run while it encodes a batch only; one text is one, too.
    return list(encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids)


def _encoder(text: str, path: Path) -> tokenizers.Tokenizer:
    try:
        encoder = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception
        raise CheckpointError(f"{path}: not a tokenizer ({' '.join(str(error).split())[:200]})") from None
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


class _Decoding:
    """The bytes of tokens under a tokenizer.json's decoder: byte-level, or words marked by a metaspace.

    Text is then made of the bytes of all ids, so where they are not UTF-8, what is broken becomes U+FFFD
    and no more; the tokenizers library gives up a whole run of byte tokens (<0xE4>) for one that is broken.
    """

    def __init__(self, decoder: Any, path: Path) -> None:
        self._byte_level = False
        self._byte_tokens = False
        self._replaced: list[tuple[str, str]] = []
        self._strips_space = False  # one leading space of the text goes
        self._drops_mark: str | None = None  # this mark goes wherever it is in the first token
        parts = (
            decoder.get("decoders") if isinstance(decoder, dict) and decoder.get("type") == "Sequence" else [decoder]
        )
        fused = False
        part: Any
        for part in parts if isinstance(parts, list) else [parts]:
            match part:
                case {"type": "ByteLevel"}:
                    self._byte_level = True
                case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old:
                    self._replaced.append((old, new))
                case {"type": "ByteFallback"}:
                    self._byte_tokens = True
                case {"type": "Fuse"}:
                    fused = True
                case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0} if fused:
                    self._strips_space = start == 1
                case {"type": "Metaspace", "replacement": str(mark)}:
                    self._replaced.append((mark, " "))
                    always = "always" if part.get("add_prefix_space", True) else "never"
                    if part.get("prepend_scheme", always) != "never":
                        self._drops_mark = mark
                case _:
                    kind = part.get("type") if isinstance(part, dict) else part
                    raise UnsupportedError(
                        f"{path}: the decoder has {str(kind)[:80]}; expected ByteLevel, Metaspace,"
                        " or Replace, ByteFallback, Fuse and Strip"
                    )

    def token_bytes(self, token: str) -> bytes:
        if self._byte_level:
            return byte_level_bytes(token)
        for old, new in self._replaced:
            token = token.replace(old, new)
        byte = _BYTE_TOKEN.fullmatch(token) if self._byte_tokens else None
        return bytes([int(byte[1], 16)]) if byte else token.encode()

    def first_token_bytes(self, token: str) -> bytes:
        if self._drops_mark is not None:
            token = token.replace(self._drops_mark, "")
        data = self.token_bytes(token)
        return data[1:] if self._strips_space and data.startswith(b" ") else data


def _byte_alphabet() -> dict[int, int]:
    """Byte-level BPE writes printable bytes as themselves and the others, in order, from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {0x100 + i: byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_alphabet()
_CHAR_OF_BYTE = {byte: chr(char) for char, byte in _BYTE_OF_CHAR.items()}
_ALPHABET = frozenset(map(chr, _BYTE_OF_CHAR))


def byte_level_bytes(token: str) -> bytes:
    """The bytes of a byte-level token. One with a character outside the alphabet was added as it is."""
    return token.translate(_BYTE_OF_CHAR).encode("latin-1") if set(token) <= _ALPHABET else token.encode()


def byte_level_text(data: bytes) -> str:
    """Bytes in the alphabet of byte-level tokens."""
    return "".join(map(_CHAR_OF_BYTE.__getitem__, data))


def load_hf_tokenizer(folder: Path) -> HFTokenizer:
    """Read tokenizer.json, and the names of bos and eos from tokenizer_config.json."""
    path = folder / TOKENIZER_FILE
    text = read_text(path, MAX_TOKENIZER_BYTES)
    tokenizer = HFTokenizer(text, parse_json_object(text, path), path)
    config = read_tokenizer_config(folder)
    tokenizer.bos_id, tokenizer.eos_id = (
        configured_token_id(config, key, tokenizer.ids_by_text, folder) for key in ("bos_token", "eos_token")
    )
    return tokenizer
