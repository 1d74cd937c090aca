"""From a request's fields to SamplingParams, one for each choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from thalweg.core import Grammar, SamplingParams, ThinkingLimit
from thalweg.errors import InvalidRequest
from thalweg.server import dialects
from thalweg.server.errors import ApiError, respelled
from thalweg.server.parsers.formats import OutputFormat
from thalweg.server.schemas import ChatBody, GenerationBody
from thalweg.tokenizer.base import Tokenizer

_SAME_NAME = (
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "cache_salt",
)


def sampling_params(
    body: GenerationBody,
    suggested: Mapping[str, Any],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    grammar: Grammar | None = None,
    thinking: ThinkingLimit | None = None,
) -> SamplingParams:
    """The request's parameters; where it is silent, what `suggested` says, then OpenAI's defaults.

    Raises InvalidRequest or ApiError that names the field.
    """
    values: dict[str, Any] = {name: suggested[name] for name in _SAME_NAME if name in suggested}
    values |= {name: value for name in _SAME_NAME if (value := getattr(body, name)) is not None}
    if body.stop is not None:
        values["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if body.stop_token_ids is not None:
        values["stop_token_ids"] = tuple(body.stop_token_ids)
    if body.logit_bias is not None:
        values["logit_bias"] = {_token_id(key): bias for key, bias in body.logit_bias.items()}
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=grammar,
            thinking=thinking,
            **values,
        )
    except InvalidRequest as error:
        raise respelled(error, body.spelled()) from None


def thinking_limit(body: ChatBody, output: OutputFormat, prompt_ids: list[int]) -> ThinkingLimit | None:
    """What max_thinking_tokens asks for; none at all where enable_thinking is false and the template begins reasoning
    all the same. Raises ApiError if this model's reasoning cannot be told from its answer."""
    most = -1 if body.max_thinking_tokens is None else body.max_thinking_tokens
    off = body.template_options().get("enable_thinking") is False
    if most < 0 and not off:
        return None
    if (marks := output.thinking_tokens) is None:
        if most < 0:
            return None
        raise dialects.unsupported(body.spelled().get("max_thinking_tokens", "max_thinking_tokens"), most, (-1,))
    begun = output.begins_thinking(prompt_ids)
    if most < 0:
        return ThinkingLimit(*marks, 0, begun) if begun else None
    return ThinkingLimit(*marks, most, begun)


def per_choice(params: SamplingParams, n: int) -> list[SamplingParams]:
    """The same parameters n times, with seeds s, s + 1, ... when there is a seed."""
    if params.seed is None:
        return [params] * n
    # Seeds are 64 bits wide and go round at the end.
    seeds = [seed if (seed := params.seed + i) < 2**64 else seed - 2**64 for i in range(n)]
    return [replace(params, seed=seed) for seed in seeds]


def truncated(prompt_ids: list[int], body: GenerationBody, max_model_len: int, max_tokens: int | None) -> list[int]:
    """The end of the prompt that truncate_prompt_tokens leaves."""
    keep = body.truncate_prompt_tokens
    if keep is None:
        return prompt_ids
    if keep < 0:
        keep = max(1, max_model_len - (1 if max_tokens is None else max_tokens))
    if keep == 0:
        raise ApiError(400, "truncate_prompt_tokens is 0; expected -1, or 1 or more", param="truncate_prompt_tokens")
    return prompt_ids[-keep:]


def refuse_unsupported(body: GenerationBody, tokenizer: Tokenizer | None) -> None:
    """Raise ApiError for what would change the answer, depends on other fields or the model, and is not done."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        reason = f"best_of is {body.best_of}; expected it left out or equal to n"
        raise ApiError(400, reason, param="best_of", code="unsupported")
    penalised = body.presence_penalty or body.frequency_penalty or body.repetition_penalty not in (None, 1)
    if penalised and body.repeat_last_n not in (None, -1):
        raise dialects.unsupported("repeat_last_n", body.repeat_last_n, (-1,))
    if penalised and body.penalize_nl is False:
        raise dialects.unsupported("penalize_nl", body.penalize_nl, (True,))
    refuse_special_tokens(body.add_special_tokens, tokenizer)
    if body.stream_options is not None and body.stream_options.include_usage and not body.stream:
        raise ApiError(400, "stream_options is given and stream is not true; expected both", param="stream_options")


def refuse_special_tokens(add: bool | None, tokenizer: Tokenizer | None) -> None:
    """Raise ApiError if special tokens are asked for around a text and there are any; none are ever added."""
    if add and tokenizer is not None and tokenizer.surrounds:
        raise dialects.unsupported("add_special_tokens", add, (False,))


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise ApiError(400, f"logit_bias has the key {key[:40]!r}; expected token ids", param="logit_bias")
    return int(key)
