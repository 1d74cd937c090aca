"""Chat templates: messages to the ids a model was trained on, with no text in them able to pass for a token.

A special token, or another mark such as <think>, counts only where the template itself writes it. The strings of
a request are rendered with stand-ins (thalweg.tokenizer.stand_ins) in them; after rendering, the stretches that
hold stand-ins get their characters back and are encoded as plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError

from thalweg.config.gguf.model import is_gguf
from thalweg.errors import CheckpointError, InvalidRequest
from thalweg.tokenizer.base import Tokenizer, literal_pattern, split_literals
from thalweg.tokenizer.files import TOKENIZER_CONFIG, read_text, read_tokenizer_config
from thalweg.tokenizer.final_message import FinalMessage
from thalweg.tokenizer.gguf import gguf_templates
from thalweg.tokenizer.messages import plain_data, plain_list, plain_messages
from thalweg.tokenizer.sandbox import Sandbox
from thalweg.tokenizer.stand_ins import free_chars, mark, private_chars, restore, risky_pattern
from thalweg.tokenizer.template_forms import Form, content_form, prints_arguments
from thalweg.tokenizer.template_limits import RefusedError, limits
from thalweg.tokenizer.tool_arguments import with_arguments

TEMPLATE_FILE = "chat_template.jinja"
MAX_TEMPLATE_BYTES = 1 << 20

JSONObject = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Compiled:
    jinja: jinja2.Template
    form: Form
    prints_arguments: bool


class ChatTemplate:
    """A chat template bound to a tokenizer.

    `source` is Jinja; `tool_source`, where a checkpoint has one, takes its place when tools are given. Raises
    CheckpointError when one does not compile.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, tool_source: str | None = None) -> None:
        self.source, self.tool_source = source, source if tool_source is None else tool_source
        self._tokenizer = tokenizer
        self._environment = Sandbox()
        self._template = self._compile(source)
        self._tool_template = self._template if tool_source is None else self._compile(tool_source)
        self._own_private_chars = private_chars(source + (tool_source or ""))
        marks = tokenizer.marks
        self._mark_ids = frozenset(marks.values())
        self._mark_pattern = literal_pattern(marks)
        self._first_chars = sorted({text[0] for text in marks})
        self._risky = risky_pattern(marks)
        # A model writes tokens such as <think> into its own turns as text, so there they stay tokens.
        self._risky_in_assistant = risky_pattern(s for s, i in marks.items() if tokenizer.is_special(i))

    def render(
        self,
        messages: Sequence[JSONObject],
        /,
        tools: Sequence[JSONObject] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> str:
        """The prompt as text, for people; encode_chat gives what the model reads.

        messages: see thalweg.tokenizer.messages.plain_messages. With continue_final_message, which needs
        add_generation_prompt to be false, the last message is the assistant's, and the prompt ends exactly
        where its content does, for the model to continue from there. template_kwargs are further variables for
        the template, such as enable_thinking. Raises InvalidRequest when the messages are not of that form,
        when the template refuses them or goes over a limit, and CheckpointError when it tries what the
        sandbox forbids.
        """
        text, stand_ins = self._render(messages, tools, add_generation_prompt, continue_final_message, template_kwargs)
        return restore(text, stand_ins)

    def encode_chat(
        self,
        messages: Sequence[JSONObject],
        /,
        tools: Sequence[JSONObject] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> list[int]:
        """The prompt's ids, special tokens by the template alone. Arguments and errors are render's."""
        text, stand_ins = self._render(messages, tools, add_generation_prompt, continue_final_message, template_kwargs)
        pieces = list(split_literals(self._mark_pattern, text))
        ids = self._encode(pieces, literal_pattern(stand_ins.values()), stand_ins)
        if sum(i in self._mark_ids for i in ids) > sum(is_mark for _, is_mark in pieces):
            # A normalizer made a mark out of other characters.
            strict = (
                [self._tokenizer.marks[piece]] if is_mark else self._tokenizer.encode_text(restore(piece, stand_ins))
                for piece, is_mark in pieces
            )
            ids = [i for part in strict for i in part]
        return ids

    @cached_property
    def system_comes_first(self) -> bool:
        """Whether the template refuses a system message anywhere but at the beginning."""
        usual = [{"role": role, "content": "x"} for role in ("system", "user", "assistant", "system", "user")]
        return self._refuses(usual) and not self._refuses([usual[0], usual[1]])

    def _refuses(self, messages: Sequence[JSONObject]) -> bool:
        try:
            self.render(messages)
        except InvalidRequest:
            return True
        return False

    def _encode(
        self, pieces: list[tuple[str, bool]], has_stand_in: re.Pattern[str], stand_ins: dict[str, str]
    ) -> list[int]:
        """Ids of the rendered text; what has no stand-in in it is encoded with the marks around it."""
        ids: list[int] = []
        trusted = ""
        for piece, is_mark in pieces:
            if is_mark or not has_stand_in.search(piece):
                trusted += piece
            else:
                ids += self._tokenizer.encode(trusted, allow_special=True)
                ids += self._tokenizer.encode_text(restore(piece, stand_ins))
                trusted = ""
        return ids + self._tokenizer.encode(trusted, allow_special=True)

    def _compile(self, source: str) -> _Compiled:
        try:
            tree = self._environment.parse(source)
            compiled = self._environment.compile_template(source)
            return _Compiled(compiled, content_form(tree), prints_arguments(tree))
        except jinja2.TemplateError as error:
            line = f" at line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise CheckpointError(f"the chat template does not compile{line}: {_one_line(error)}") from None
        except (RecursionError, SyntaxError, MemoryError, ValueError) as error:
            kind = type(error).__name__
            raise CheckpointError(f"the chat template does not compile ({kind}); expected less nesting") from None

    def _render(
        self,
        messages: Sequence[JSONObject],
        tools: Sequence[JSONObject] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        template_kwargs: JSONObject,
    ) -> tuple[str, dict[str, str]]:
        """The rendered text with stand-ins in it, and {character: the stand-in for it}."""
        tool_list = plain_list(tools, "tools") if tools else None
        template = self._tool_template if tool_list else self._template
        turns = [with_arguments(turn, template.prints_arguments) for turn in plain_messages(messages, template.form)]
        extra = plain_data(template_kwargs, "chat_template_kwargs")

        free = free_chars(self._own_private_chars, [turns, tool_list, extra])
        stand_ins = dict(zip(self._first_chars, free, strict=False))

        marked = [
            mark(turn, self._risky_in_assistant if turn["role"] == "assistant" else self._risky, stand_ins)
            for turn in turns
        ]
        final = FinalMessage(marked, next(free)) if continue_final_message else None
        if final is not None and add_generation_prompt:
            raise InvalidRequest(
                "add_generation_prompt and continue_final_message are both true; expected one of them: the"
                " assistant's turn is either begun or continued"
            )
        own = {
            "messages": marked,
            "tools": mark(tool_list, self._risky, stand_ins),
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self._tokenizer.bos_token,
            "eos_token": self._tokenizer.eos_token,
        }
        for name in extra:
            if name in own or name in self._environment.globals:
                raise InvalidRequest(f"chat_template_kwargs has {name!r}; expected variables of the template's own")
        variables: dict[str, Any] = {"documents": None}  # as transformers has it; given in chat_template_kwargs
        variables |= mark(extra, self._risky, stand_ins)
        variables |= {name: value for name, value in own.items() if value is not None or name == "tools"}
        try:
            with limits():
                text = self._environment.concat(template.jinja.root_render_func(template.jinja.new_context(variables)))
        except RefusedError as error:
            raise InvalidRequest(f"the chat template refused: {_one_line(error, stand_ins)}") from None
        except SecurityError as error:
            raise CheckpointError(f"the chat template is not safe to run: {_one_line(error, stand_ins)}") from None
        except Exception as error:  # noqa: BLE001 - a template can raise whatever an expression can
            raise InvalidRequest(f"the chat template failed on these messages: {_one_line(error, stand_ins)}") from None
        # A template that asks for ASCII JSON has the stand-ins written as escapes.
        for stand_in in stand_ins.values():
            text = text.replace(json.dumps(stand_in)[1:-1], stand_in)
        return text if final is None else final.cut(text), stand_ins


def _one_line(error: Exception, stand_ins: dict[str, str] | None = None) -> str:
    text = " ".join((str(error) or type(error).__name__).split())[:300]
    return restore(text, stand_ins or {})


def load_template(folder: str | Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """A model folder's template: chat_template.jinja, else tokenizer_config.json's chat_template, else None; or the one
    in a GGUF file.

    Of a list of named templates, "default" is taken, and "tool_use" for requests with tools.
    """
    source, tool_source = template_sources(Path(folder))
    return None if source is None else ChatTemplate(source, tokenizer, tool_source)


def template_sources(folder: Path) -> tuple[str | None, str | None]:
    """The text of the template, and of the one for requests with tools, where there are any."""
    if is_gguf(folder):
        return gguf_templates(folder)
    path = folder / TEMPLATE_FILE
    if path.is_file():
        return read_text(path, MAX_TEMPLATE_BYTES), None
    source, tool_source = read_tokenizer_config(folder).get("chat_template"), None
    if source is None:
        return None, None
    if isinstance(source, list):
        named = {str(t.get("name")): t.get("template") for t in source if isinstance(t, dict)}
        source, tool_source = named.get("default"), named.get("tool_use")
    if not isinstance(source, str) or not isinstance(tool_source, str | None):
        raise CheckpointError(
            f"{folder / TOKENIZER_CONFIG}: chat_template is neither a string nor a list with one named default"
        )
    return source, tool_source
