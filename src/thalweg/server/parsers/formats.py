"""Which formats of reasoning and tool calls a model writes, and what reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thalweg.errors import ConfigError
from thalweg.server.parsers import hermes, kimi_k2, qwen3_coder, thinking
from thalweg.server.parsers.calls import CallParser, NewId
from thalweg.server.parsers.marks import CALL, KIMI_CALL, THINK, THINK_END, marks_by_id
from thalweg.server.parsers.reader import Reader
from thalweg.server.parsers.thinking import Thinking
from thalweg.text.codec import TextCodec

Tools = Sequence[Mapping[str, Any]]  # as requests bring them, checked


@dataclass(frozen=True, slots=True)
class CallFormat:
    name: str
    markers: tuple[str, ...]
    sign: str  # what a chat template of this format has in it
    parser: Callable[[NewId, Tools], CallParser]
    lark: Callable[[Tools, Mapping[str, int], bool], str]  # rules of a grammar: `calls`, of one call or of several


def _types(tools: Tools) -> dict[str, dict[str, Any]]:
    """{function: {parameter: its schema's "type"}}"""
    types: dict[str, dict[str, Any]] = {}
    for tool in tools:
        parameters = tool["function"].get("parameters") or {}
        properties = parameters.get("properties")
        if isinstance(properties, dict):
            known = {key: s.get("type") for key, s in properties.items() if isinstance(s, dict)}
            types[tool["function"]["name"]] = known
    return types


# In the order in which a template's text is searched for their signs.
CALL_FORMATS = (
    CallFormat("kimi_k2", kimi_k2.MARKERS, KIMI_CALL, lambda new_id, tools: kimi_k2.KimiK2(new_id), kimi_k2.lark),
    CallFormat(
        "qwen3_coder",
        qwen3_coder.MARKERS,
        "<function=",
        lambda new_id, tools: qwen3_coder.Qwen3Coder(new_id, _types(tools)),
        qwen3_coder.lark,
    ),
    CallFormat("hermes", hermes.MARKERS, CALL, lambda new_id, tools: hermes.Hermes(new_id), hermes.lark),
)
TOOL_CALL_PARSERS = ("auto", "none", *(f.name for f in CALL_FORMATS))
REASONING_PARSERS = ("auto", "none", "think")


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """What to look for in a model's chat answers."""

    calls: CallFormat | None
    thinking: bool
    added_tokens: Mapping[str, int]

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
            calls = next((f for f in CALL_FORMATS if f.sign in template), None)
        else:
            calls = next((f for f in CALL_FORMATS if f.name == tool_call_parser), None)
        reasons = THINK_END in template if reasoning_parser == "auto" else reasoning_parser == "think"
        return cls(calls, reasons, {} if codec.tokenizer is None else codec.tokenizer.added_tokens)

    def describe(self) -> str:
        """For people, in one line."""
        calls = "without tool calls" if self.calls is None else f"tool calls as {self.calls.name} writes them"
        return f"{calls}, reasoning {'between <think> and </think>' if self.thinking else 'not looked for'}"

    def markers(self, with_calls: bool) -> tuple[str, ...]:
        calls = self.calls.markers if with_calls and self.calls is not None else ()
        return (*(thinking.MARKERS if self.thinking else ()), *calls)

    def marks(self, with_calls: bool) -> dict[int, str] | None:
        """For the detokeniser; None where nothing is to be marked."""
        return marks_by_id(self.markers(with_calls), self.added_tokens) or None

    def reader(self, prompt_ids: Sequence[int], tools: Tools, new_id: NewId) -> Reader | None:
        """A reader for one choice; calls are looked for where there are tools. None: the text is the content."""
        calls = self.calls.parser(new_id, tools) if tools and self.calls is not None else None
        if calls is None and not self.thinking:
            return None
        spelled = [marker for marker in self.markers(bool(tools)) if marker not in self.added_tokens]
        return Reader(Thinking(self.begins_thinking(prompt_ids)) if self.thinking else None, calls, spelled)

    def reasoning_lark(self, begun: bool) -> str:
        """What may come before an answer that is held to a grammar: nothing where reasoning is not marked by tokens."""
        begin, end = self.added_tokens.get(THINK), self.added_tokens.get(THINK_END)
        if not self.thinking or begin is None or end is None:
            return ""
        rest = rf"/(.|\n)*/ <[{end}]> /[ \n]{{0,4}}/"
        return rest if begun else f"(<[{begin}]> {rest})?"

    def begins_thinking(self, prompt_ids: Sequence[int]) -> bool:
        """Whether the prompt ends within reasoning: of the tokens named by their text, the last one begins it."""
        begin, added = self.added_tokens.get(THINK), frozenset(self.added_tokens.values())
        return begin is not None and next((i for i in reversed(prompt_ids) if i in added), None) == begin
