"""Kimi's tokenizer: tiktoken ranks and 256 special ids, read without any code of the checkpoint."""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiktoken

from thalweg.errors import CheckpointError
from thalweg.tokenizer.base import Tokenizer, literal_pattern, split_literals, valid_unicode
from thalweg.tokenizer.files import TOKENIZER_CONFIG, configured_token_id, read_bounded, read_tokenizer_config

RANKS_FILE = "tiktoken.model"
NUM_SPECIAL_IDS = 256
MAX_RANKS_BYTES = 64 << 20
MAX_RANKS = 1 << 21
MAX_TOKEN_BYTES = 1024
MAX_SPECIAL_CHARS = 128

_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# Unlike the generic pattern, runs of Han stand alone and a word breaks where a capital begins a new one.
KIMI_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

# The published tokenizer encodes long texts in these pieces, which bounds the pattern's backtracking and the
# merging of one endless word. Cutting at the same places gives the same ids.
MAX_PIECE_CHARS = 400_000
MAX_RUN_CHARS = 25_000
# Tried only where a run begins, so that many runs just short of the limit cost no more than their length.
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{MAX_RUN_CHARS + 1},}}|(?<!\s)\s{{{MAX_RUN_CHARS + 1},}}")


class KimiTokenizer(Tokenizer):
    """Byte-level BPE over `ranks` (bytes to rank, 0 to n-1) with special ids n to n+255.

    special_tokens names all 256; `text_ids` are those that decode keeps (`<think>`).
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        special_tokens: dict[str, int],
        text_ids: frozenset[int] = frozenset(),
        bos_id: int | None = None,
        eos_id: int | None = None,
    ) -> None:
        self._bpe = tiktoken.Encoding("kimi", pat_str=KIMI_PATTERN, mergeable_ranks=ranks, special_tokens={})
        self.special_tokens = self.added_tokens = special_tokens
        self._special_pattern = literal_pattern(special_tokens)
        self._special_ids = frozenset(special_tokens.values()) - text_ids
        self._bytes_by_id = [*ranks, *(text.encode() for text in special_tokens)]
        self.bos_id = bos_id
        self.eos_id = eos_id

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        text = valid_unicode(text)
        if not allow_special:
            return self._encode_plain(text)
        ids: list[int] = []
        for piece, special in split_literals(self._special_pattern, text):
            if special:
                ids.append(self.special_tokens[piece])
            else:
                ids.extend(self._encode_plain(piece))
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        if len(text) <= MAX_RUN_CHARS:
            return self._bpe.encode_ordinary(text)
        ids: list[int] = []
        for piece in _pieces(text):
            ids += self._bpe.encode_ordinary(piece)
        return ids


def _pieces(text: str) -> Iterator[str]:
    """`text` cut every MAX_PIECE_CHARS, and in there every MAX_RUN_CHARS of space alone or of no space."""
    for begin in range(0, len(text), MAX_PIECE_CHARS):
        block = text[begin : begin + MAX_PIECE_CHARS]
        start = 0
        for run in _LONG_RUN.finditer(block):
            for cut in range(run.start() + MAX_RUN_CHARS, run.end(), MAX_RUN_CHARS):
                yield block[start:cut]
                start = cut
        yield block[start:]


def load_kimi_tokenizer(folder: Path) -> KimiTokenizer:
    """Read tiktoken.model and tokenizer_config.json. Raises CheckpointError on a damaged or hostile file."""
    ranks = read_ranks(folder / RANKS_FILE)
    config = read_tokenizer_config(folder)
    special_tokens, text_ids = _special_tokens(config, len(ranks), folder / TOKENIZER_CONFIG)
    bos_id, eos_id = (configured_token_id(config, key, special_tokens, folder) for key in ("bos_token", "eos_token"))
    return KimiTokenizer(ranks, special_tokens, text_ids, bos_id, eos_id)


def read_ranks(path: Path) -> dict[bytes, int]:
    """{token bytes: rank} from lines of `base64 rank`: ranks 0, 1, 2, ... in order, every byte a token."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bounded(path, MAX_RANKS_BYTES).splitlines(), start=1):
        if not line:
            continue
        encoded, _, rank = line.partition(b" ")
        try:
            token = binascii.a2b_base64(encoded, strict_mode=True)
        except binascii.Error:
            token = b""
        if not 0 < len(token) <= MAX_TOKEN_BYTES or token in ranks or rank != b"%d" % len(ranks):
            raise CheckpointError(
                f"{path}: line {number} is {line[:60]!r}; expected base64 of a new token of 1 to"
                f" {MAX_TOKEN_BYTES} bytes, then {len(ranks)}"
            )
        ranks[token] = len(ranks)
        if len(ranks) > MAX_RANKS:
            raise CheckpointError(f"{path}: more than {MAX_RANKS} tokens; expected a vocabulary of at most that many")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise CheckpointError(f"{path}: no token for {len(missing)} of the 256 single bytes, first {missing[0]:#04x}")
    return ranks


def _special_tokens(config: dict[str, Any], first: int, path: Path) -> tuple[dict[str, int], frozenset[int]]:
    """Names of the ids first .. first+255 in order, and the ids that are text to a reader."""
    added = config.get("added_tokens_decoder", {})
    if not isinstance(added, dict):
        raise CheckpointError(f"{path}: added_tokens_decoder is a {type(added).__name__}; expected an object")
    last = first + NUM_SPECIAL_IDS - 1
    names = {i: f"<|reserved_token_{i}|>" for i in range(first, last + 1)}
    text_ids = set()
    for key, entry in added.items():
        token_id = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else -1
        content = entry.get("content") if isinstance(entry, dict) else None
        if token_id not in names or not isinstance(content, str) or not 0 < len(content) <= MAX_SPECIAL_CHARS:
            raise CheckpointError(
                f"{path}: added_tokens_decoder has {key[:40]!r}; expected ids {first} to {last},"
                f" each with a content of 1 to {MAX_SPECIAL_CHARS} characters"
            )
        names[token_id] = valid_unicode(content)
        if entry.get("special") is False:
            text_ids.add(token_id)
    special_tokens = {name: i for i, name in names.items()}
    if len(special_tokens) != NUM_SPECIAL_IDS:
        raise CheckpointError(f"{path}: added_tokens_decoder names a token twice; expected {NUM_SPECIAL_IDS} names")
    return special_tokens, frozenset(text_ids)
