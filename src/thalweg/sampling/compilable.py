"""Whether a JSON schema compiles, without a vocabulary: for those who make one and may make another."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

from thalweg.core import JSON_WHITESPACE
from thalweg.sampling.grammars import on_a_deep_stack


@lru_cache(256)
def problem_of(leaf: str) -> str | None:
    """Why llguidance does not take a schema, given as JSON, in one line without any grammar; None if it does."""
    import llguidance

    limits = llguidance.LLParserLimits(initial_lexer_fuel=1_000_000, max_grammar_size=200_000, verbose_errors=False)
    try:
        text = llguidance.LLMatcher.grammar_from_json_schema(leaf, overrides={"whitespace_pattern": JSON_WHITESPACE})
        wrong = llguidance.LLMatcher.validate_grammar(text, None, limits=limits)
    except ValueError as error:
        wrong = str(error)
    if not wrong:
        return None
    said: list[str] = re.findall(r"^error: (.*)", wrong, re.MULTILINE) or [
        wrong.split("\n", maxsplit=1)[0].split(":")[0]
    ]
    return said[0].split(";")[0][:200]


def compiles(schema: dict[str, Any]) -> bool:
    """Whether llguidance takes `schema`."""
    return on_a_deep_stack(lambda: problem_of(json.dumps(schema))) is None
