"""Which formats of reasoning and tool calls a model writes, and what reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thalweg.core import SamplingParams
from thalweg.errors import ConfigError
from thalweg.sampling.thinking import ThinkingCount
from thalweg.server.parsers import hermes, kimi_k2, qwen3_coder, thinking
from thalweg.server.parsers.calls import CallParser, NewId, new_call_id
from thalweg.server.parsers.marks import CALL, KIMI_CALL, THINK, THINK_END, marks_by_id
from thalweg.server.parsers.reader import Reader
from thalweg.server.parsers.thinking import Thinking
from thalweg.text.codec import TextCodec
from thalweg.tokenizer.base import Tokenizer

_THINK_TOKENS = 2 * len(THINK)  # of a prompt's end hold "<think>" and white space after it

Tools = Sequence[Mapping[str, Any]]  # as requests bring them, checked


@dataclass(frozen=True, slots=True)
class CallFormat:
    name: str
    markers: tuple[str, ...]
    signs: tuple[str, ...]  # all of which a chat template of this format has in it
    parser: Callable[[NewId, Tools], CallParser]
    lark: Callable[[Tools, Mapping[str, int], bool], str]  # rules of a grammar: `calls`, of one call or of several


def _parameters(tools: Tools) -> dict[str, Mapping[str, Any]]:
    """{function: the schema of its parameters}"""
    return {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}


# In the order in which a template's text is searched for their signs.
CALL_FORMATS = (
    CallFormat("kimi_k2", kimi_k2.MARKERS, (KIMI_CALL,), lambda new_id, tools: kimi_k2.KimiK2(new_id), kimi_k2.lark),
    CallFormat(
        "qwen3_coder",
        qwen3_coder.MARKERS,
        (CALL, "<function="),
        lambda new_id, tools: qwen3_coder.Qwen3Coder(new_id, _parameters(tools)),
        qwen3_coder.lark,
    ),
    CallFormat("hermes", hermes.MARKERS, (CALL,), lambda new_id, tools: hermes.Hermes(new_id), hermes.lark),
)
_OTHER_FORMATS = ("<arg_key>",)  # signs of formats that share markers with these and are not read here
TOOL_CALL_PARSERS = ("auto", "none", *(f.name for f in CALL_FORMATS))
REASONING_PARSERS = ("auto", "none", "think")


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """What to look for in a model's chat answers."""

    calls: CallFormat | None
    thinking: bool
    tokenizer: Tokenizer | None

    @classmethod
    def of(cls, codec: TextCodec, tool_call_parser: str, reasoning_parser: str) -> OutputFormat:
        """By name, or for "auto" by what the chat template writes itself. Raises ConfigError."""
        for option, value, names in (
            ("--tool-call-parser", tool_call_parser, TOOL_CALL_PARSERS),
            ("--reasoning-parser", reasoning_parser, REASONING_PARSERS),
        ):
            if value not in names:
                raise ConfigError(f"{option} is {value!r}; expected one of {', '.join(names)}")
        template = "" if codec.template is None else codec.template.tool_source
        if tool_call_parser == "auto":
            known = () if any(sign in template for sign in _OTHER_FORMATS) else CALL_FORMATS
            calls = next((f for f in known if all(sign in template for sign in f.signs)), None)
        else:
            calls = next((f for f in CALL_FORMATS if f.name == tool_call_parser), None)
        reasons = reasoning_parser == "think"
        if reasoning_parser == "auto":  # some templates begin reasoning in the prompt, and know nothing of its end
            reasons = THINK in template or THINK_END in template
        return cls(calls, reasons, codec.tokenizer)

    @property
    def added_tokens(self) -> Mapping[str, int]:
        return {} if self.tokenizer is None else self.tokenizer.added_tokens

    def describe(self) -> str:
        """For people, in one line."""
        calls = "without tool calls" if self.calls is None else f"tool calls as {self.calls.name} writes them"
        return f"{calls}, reasoning {'between <think> and </think>' if self.thinking else 'not looked for'}"

    def reader(
        self, prompt_ids: Sequence[int], tools: Tools, params: SamplingParams, new_id: NewId = new_call_id
    ) -> Reader | None:
        """A reader for one choice; calls are looked for where there are tools. None: the text is the content."""
        calls = self.calls if tools else None
        if calls is None and not self.thinking:
            return None
        markers = (*(thinking.MARKERS if self.thinking else ()), *(calls.markers if calls is not None else ()))
        return Reader(
            Thinking(self.begins_thinking(prompt_ids)) if self.thinking else None,
            None if calls is None else calls.parser(new_id, tools),
            marks_by_id(markers, self.added_tokens),
            [marker for marker in markers if marker not in self.added_tokens],
            params.stop,
            params.include_stop_str_in_output,
        )

    @property
    def thinking_tokens(self) -> tuple[int, int] | None:
        """The marks of reasoning; None if it is not looked for, or they are not tokens."""
        begin, end = self.added_tokens.get(THINK), self.added_tokens.get(THINK_END)
        return None if not self.thinking or begin is None or end is None else (begin, end)

    def thinking_count(self, prompt_ids: Sequence[int]) -> ThinkingCount | None:
        """What counts the tokens of reasoning in one output; None if they cannot be told apart."""
        marks = self.thinking_tokens
        return None if marks is None else ThinkingCount(*marks, self.begins_thinking(prompt_ids))

    def reasoning_lark(self, begun: bool) -> str:
        """What may come before an answer that is held to a grammar: nothing where reasoning is not marked by tokens."""
        if (marks := self.thinking_tokens) is None:
            return ""
        begin, end = marks
        rest = rf"/(.|\n)*/ <[{end}]> /[ \n]{{0,4}}/"
        return rest if begun else f"(<[{begin}]> {rest})?"

    def begins_thinking(self, prompt_ids: Sequence[int]) -> bool:
        """Whether the prompt ends within reasoning: of the tokens named by their text, the last one begins it.

        Where <think> is not a token, the prompt ends with its letters.
        """
        begin, added = self.added_tokens.get(THINK), frozenset(self.added_tokens.values())
        if begin is not None:
            return next((i for i in reversed(prompt_ids) if i in added), None) == begin
        if self.tokenizer is None:
            return False
        end = [i for i in prompt_ids[-_THINK_TOKENS:] if i < self.tokenizer.vocab_size]
        return self.tokenizer.decode(end).rstrip().endswith(THINK)
