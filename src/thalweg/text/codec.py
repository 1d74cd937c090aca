"""What turns text into token ids and back: the tokenizer and chat template of a model folder. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thalweg.assembly.source import ModelSource, open_source
from thalweg.config.engine import EngineConfig
from thalweg.errors import CheckpointError, InvalidRequest
from thalweg.tokenizer.base import Tokenizer
from thalweg.tokenizer.load import has_tokenizer, load_tokenizer
from thalweg.tokenizer.template import ChatTemplate, load_template


@dataclass(frozen=True, slots=True)
class TextCodec:
    """What turns text into requests and back: tokenizer and chat template, either of which a folder may lack."""

    source: ModelSource
    tokenizer: Tokenizer | None
    template: ChatTemplate | None

    def chat_template(self) -> ChatTemplate:
        """The folder's chat template. Raises InvalidRequest where there is none, or no tokenizer to go with it."""
        if self.tokenizer is None or self.template is None:
            missing = "tokenizer" if self.tokenizer is None else "chat template"
            raise InvalidRequest(f"{self.source.folder} has no {missing}, which chat needs; use completions instead")
        return self.template

    def chat_ids(self, messages: Sequence[Mapping[str, Any]], /, **options: Any) -> list[int]:
        """Token ids of a conversation, ready for the assistant's turn. Raises InvalidRequest."""
        return self.chat_template().encode_chat(messages, **options)


def load_codec(config: EngineConfig) -> TextCodec:
    """Read tokenizer and template. A folder without a tokenizer works with token ids; a damaged one raises."""
    source = open_source(config)
    folder = source.folder if config.tokenizer is None else Path(config.tokenizer).expanduser()
    tokenizer = load_tokenizer(folder) if config.tokenizer is not None or has_tokenizer(folder) else None
    if tokenizer is not None and tokenizer.vocab_size > source.config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids; expected at most {source.config.vocab_size},"
            " config.json's vocab_size"
        )
    template = load_template(folder, tokenizer) if tokenizer is not None else None
    return TextCodec(source, tokenizer, template)
