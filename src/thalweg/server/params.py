"""From a request's fields to SamplingParams, one for each choice."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from msgspec.structs import replace

from thalweg.config.hf import GenerationConfig
from thalweg.core import Grammar, SamplingParams
from thalweg.server.errors import ApiError
from thalweg.server.schemas import GenerationBody

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
)


def sampling_params(
    body: GenerationBody,
    suggested: GenerationConfig,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    grammar: Grammar | None = None,
) -> SamplingParams:
    """The request's parameters; where it is silent, what the checkpoint suggests for sampling, then OpenAI's defaults.

    Raises InvalidRequest or ApiError that names the field.
    """
    values: dict[str, Any] = {}
    if suggested.do_sample:
        hints = asdict(suggested)
        values = {name: hints[name] for name in _SAME_NAME if hints.get(name) is not None}
    elif suggested.do_sample is False:  # said, not merely left out: the checkpoint asks for greedy decoding
        values = {"temperature": 0.0}
    values |= {name: value for name in _SAME_NAME if (value := getattr(body, name)) is not None}
    if body.stop is not None:
        values["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if body.stop_token_ids is not None:
        values["stop_token_ids"] = tuple(body.stop_token_ids)
    if body.logit_bias is not None:
        values["logit_bias"] = {_token_id(key): bias for key, bias in body.logit_bias.items()}
    return SamplingParams(
        max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs, grammar=grammar, **values
    )


def per_choice(params: SamplingParams, n: int) -> list[SamplingParams]:
    """The same parameters n times, with seeds s, s + 1, ... when there is a seed."""
    if params.seed is None:
        return [params] * n
    # Seeds are 64 bits wide and go round at the end.
    seeds = [seed if (seed := params.seed + i) < 2**64 else seed - 2**64 for i in range(n)]
    return [replace(params, seed=seed) for seed in seeds]


def refuse_unsupported(body: GenerationBody) -> None:
    """Raise ApiError for what would change the answer and is not done."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is given and stream is not true; expected both", param="stream_options")


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise ApiError(400, f"logit_bias has the key {key[:40]!r}; expected token ids", param="logit_bias")
    return int(key)
