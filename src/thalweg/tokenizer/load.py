"""Which tokenizer a model folder, or a GGUF file, holds."""

from __future__ import annotations

from pathlib import Path

from thalweg.config.gguf.model import is_gguf
from thalweg.errors import CheckpointError
from thalweg.tokenizer.base import Tokenizer
from thalweg.tokenizer.gguf import has_gguf_tokenizer, load_gguf_tokenizer
from thalweg.tokenizer.hf import TOKENIZER_FILE, load_hf_tokenizer
from thalweg.tokenizer.kimi import RANKS_FILE, load_kimi_tokenizer


def has_tokenizer(folder: str | Path) -> bool:
    """Whether load_tokenizer would find one there, sound or not."""
    if is_gguf(Path(folder)):
        return has_gguf_tokenizer(Path(folder))
    return any((Path(folder) / name).is_file() for name in (RANKS_FILE, TOKENIZER_FILE))


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder or GGUF file; the checkpoint's own code (`auto_map`) is never run.

    Raises CheckpointError when there is none or a file is damaged, UnsupportedError when it is of another
    kind.
    """
    folder = Path(folder)
    if is_gguf(folder):
        return load_gguf_tokenizer(folder)
    if (folder / RANKS_FILE).is_file():
        return load_kimi_tokenizer(folder)
    if (folder / TOKENIZER_FILE).is_file():
        return load_hf_tokenizer(folder)
    raise CheckpointError(
        f"{folder}: no tokenizer found; expected {RANKS_FILE} or {TOKENIZER_FILE} there,"
        " or the folder that has one as --tokenizer"
    )
