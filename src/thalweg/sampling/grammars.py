"""Grammars compiled for a vocabulary: on threads of their own, under limits, those used last kept.

llguidance compiles lazily and within budgets of its own (symbols, lexer states, work per step), so that what a schema
can cost is bounded before it is known what the schema says.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from thalweg.core import JSON_WHITESPACE, Grammar
from thalweg.errors import InvalidRequest
from thalweg.tokenizer.base import Tokenizer

if TYPE_CHECKING:  # imported where the first grammar is: most engines never see one
    import llguidance

STACK_BYTES = 512 << 20  # of address space; a rule takes up to 32 KB, if one comes to be compiled within another
MAX_COMPILED = 32  # each may come to hold MAX_LEXER_STATES of 1 to 2 KB
MAX_LEXER_STATES = 20_000
MAX_ROW_ITEMS = 20_000  # an object takes 4 for each property that may come next; all of a step come to 50,000
COMPILE_THREADS = 2

_GBNF = re.compile(r"^[ \t]*root[ \t]*::=", re.MULTILINE)
_UNICODE_ESCAPE = re.compile(r"(?<!\\)((?:\\\\)*)\\u([0-9a-fA-F]{4})")
# Lines of a grammar with their numbers, or an expression that was made of a schema.
_LISTING = re.compile(r"^\s*\d+ \||: +\((?:And|Or|Not|Concat|Regex|SearchRegex)\b", re.MULTILINE)

Vocabulary = tuple[Tokenizer | None, int, frozenset[int]]  # tokenizer, rows of the logits, ids that end an output


_stack_size = threading.Lock()
T = TypeVar("T")


class Grammars:
    """`load` gives the vocabulary; it is called at the first grammar, on a compiling thread."""

    def __init__(self, load: Callable[[], Vocabulary]) -> None:
        self._load = load
        self._loading = threading.Lock()
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._pool = ThreadPoolExecutor(COMPILE_THREADS, thread_name_prefix="thalweg-grammar")
        self._lock = threading.Lock()
        self._compiled: OrderedDict[Grammar, Future[llguidance.LLMatcher]] = OrderedDict()

    def compiled(self, grammar: Grammar) -> Future[llguidance.LLMatcher]:
        """A future of the grammar's matcher before its first token; InvalidRequest for one that cannot be used."""
        with self._lock:
            future = self._compiled.get(grammar)
            if future is None:
                with _deep_stacks():
                    future = self._pool.submit(self._compile, grammar)
                self._compiled[grammar] = future
            self._compiled.move_to_end(grammar)
            while len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return future

    def matcher(self, grammar: Grammar) -> llguidance.LLMatcher:
        """A matcher of one's own; raises InvalidRequest. A grammar that is not kept (any more) is compiled here and
        now: the caller may be a step, which must not wait for all that the threads have yet to do."""
        with self._lock:
            future = self._compiled.get(grammar)
        if future is None or not future.done():
            return on_a_deep_stack(lambda: self._compile(grammar)).deep_copy()
        return future.result().deep_copy()

    def close(self) -> None:
        """Compile no more. What is being compiled is finished for nobody."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, grammar: Grammar) -> llguidance.LLMatcher:
        import llguidance

        limits = llguidance.LLParserLimits(
            max_items_in_row=MAX_ROW_ITEMS,
            initial_lexer_fuel=1_000_000,
            step_lexer_fuel=200_000,
            step_max_items=50_000,
            max_lexer_states=MAX_LEXER_STATES,
            max_grammar_size=200_000,
            verbose_errors=False,
        )
        tokenizer = self._vocabulary()
        matcher = llguidance.LLMatcher(tokenizer, _guidance(grammar), log_level=0, limits=limits)
        if not matcher.is_error():
            first = matcher.deep_copy()
            first.compute_bitmask()  # some grammars match nothing, which shows here
            if not first.is_error():
                return matcher
            matcher = first
        raise InvalidRequest(f"the grammar cannot be used: {_reason(matcher.get_error())}")

    def _vocabulary(self) -> llguidance.LLTokenizer:
        with self._loading:
            if self._tokenizer is None:
                self._tokenizer = _vocabulary(*self._load())
        return self._tokenizer


@contextmanager
def _deep_stacks() -> Iterator[None]:
    """Threads begun meanwhile have room for grammars whose rules lead to rules by the thousand."""
    with _stack_size:
        before = threading.stack_size(STACK_BYTES)
        try:
            yield
        finally:
            threading.stack_size(before)


def on_a_deep_stack(function: Callable[[], T]) -> T:
    """function(), where llguidance may go as deep as a grammar leads it, which elsewhere may end the process."""
    with ThreadPoolExecutor(1, thread_name_prefix="thalweg-grammar") as pool:
        with _deep_stacks():
            future = pool.submit(function)
        return future.result()


def _guidance(grammar: Grammar) -> str:
    """The grammar in llguidance's own JSON."""
    import llguidance

    if grammar.kind == "json_schema":
        try:
            schema = json.loads(grammar.text)
        except (ValueError, RecursionError):
            raise InvalidRequest("the grammar is not a JSON schema: it is not JSON, or nests too deep") from None
        try:
            text = llguidance.LLMatcher.grammar_from_json_schema(
                schema, overrides={"whitespace_pattern": JSON_WHITESPACE}
            )
        except ValueError as error:
            raise InvalidRequest(f"the grammar is not a JSON schema: {' '.join(str(error).split())[:200]}") from None
    elif grammar.kind == "regex":
        text = llguidance.LLMatcher.grammar_from_regex(grammar.text)
    else:
        text = json.dumps({"grammars": [{"lark_grammar": _lark(grammar.text)}]})
    if grammar.before:
        [body] = json.loads(text)["grammars"]
        start = {"lark_grammar": f"start: {grammar.before} @body"}
        text = json.dumps({"grammars": [start, body | {"name": "body"}]})
    return text


def _lark(text: str) -> str:
    """`text` in llguidance's Lark, if it is GBNF as llama.cpp has it."""
    if not _GBNF.search(text):
        return text
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(_UNICODE_ESCAPE.sub(_character, text))
    except Exception as error:  # noqa: BLE001 -- it raises whatever parsing comes upon
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InvalidRequest(f"the grammar is not GBNF: {reason}") from None


def _character(escape: re.Match[str]) -> str:
    """A character for its \\uXXXX, which gbnf_to_lark does not pass on, if it needs no escape."""
    char = chr(int(escape[2], 16))
    return escape[1] + char if char.isprintable() and char not in '"\\[]/^-' else escape[0]


def _reason(error: str) -> str:
    """What went wrong in one line, without the listing of a grammar that may be none of the caller's."""
    said = _LISTING.split(error, maxsplit=1)[0]
    return " ".join(said.split())[:300].removesuffix(" <non-verbose/>")


class _Words:
    """A tokenizer in the form that llguidance asks for. No token named by its text is ever part of a text."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, eos_token_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(set(tokenizer.added_tokens.values()))

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode("utf-8", errors="replace"))


def _vocabulary(tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: frozenset[int]) -> llguidance.LLTokenizer:
    if tokenizer is None:
        raise InvalidRequest("the grammar needs the tokens' texts and the model folder has no tokenizer")
    import llguidance

    ends = sorted(i for i in eos_token_ids if i < vocab_size)
    if not ends:
        raise InvalidRequest("the grammar needs an end-of-sequence token and config.json names none")
    words: Any = _Words(tokenizer, ends[0])
    return llguidance.LLTokenizer(words, n_vocab=vocab_size, eos_token=ends)
