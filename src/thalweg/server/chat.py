"""POST /v1/chat/completions"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from functools import partial

from fastapi import APIRouter, Request, Response

from thalweg.server.bodies import BodyRoute
from thalweg.server.chat_answer import ChatAnswer
from thalweg.server.errors import ApiError
from thalweg.server.functions import as_tools, in_older_words
from thalweg.server.generation import generate, jobs_of, naming_fields
from thalweg.server.params import refuse_unsupported, sampling_params, truncated
from thalweg.server.responses import new_id
from thalweg.server.schemas import ChatBody
from thalweg.server.service import Service, ServiceDep
from thalweg.server.streaming import stream, whole
from thalweg.server.structured import held_to, wanted
from thalweg.server.tools import ToolUse, tool_use

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatBody, request: Request, service: ServiceDep) -> Response:
    """Answer a conversation; max_tokens defaults to the model's max_new_tokens, or what the context has room for.

    Reasoning comes apart from the answer, as `reasoning_content`, and calls of the request's tools as `tool_calls`,
    where the server knows how the model marks them.
    """
    arrived = time.perf_counter()
    service.check(body.model)
    _refuse_unsupported(body, service)
    use, text = _tool_use(body, service), await wanted(body)
    max_tokens = body.limit(service.suggested.get("max_tokens"))
    prompt_ids = await service.encode_chat(request, body.messages, tools=use.tools or None, **body.template_options())
    prompt_ids = truncated(prompt_ids, body, service.client.info.max_model_len, max_tokens)
    held = await held_to(service.output, use, text, service.output.begins_thinking(prompt_ids))
    params = sampling_params(
        body,
        service.suggested,
        max_tokens=max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=None if held is None else held.grammar,
    )
    answer = ChatAnswer(service, new_id("chatcmpl"), prompt_ids, use, body.n or 1, bool(body.return_token_ids))
    reader = partial(service.output.reader, prompt_ids, use.tools, params)
    jobs = jobs_of(answer.id, [prompt_ids], params, body.n or 1, reader)
    grammar_of = "" if held is None else "functions" if use.functions and held.field == "tools" else held.field
    fields = body.spelled() | {"prompt": "messages", "grammar": grammar_of}
    taken = asyncio.Event()
    news = naming_fields(generate(service, jobs, arrived, taken), fields)
    if not body.stream:
        return await whole(request, answer.whole(news))
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return await stream(request, answer.chunks(news, usage), taken, service.settings.ping_seconds)


def _tool_use(body: ChatBody, service: Service) -> ToolUse:
    if body.functions is None and body.function_call is None:
        return tool_use(body, service.output)
    newer = as_tools(body)
    try:
        return replace(tool_use(newer, service.output), functions=True)
    except ApiError as error:
        raise in_older_words(error) from None


def _refuse_unsupported(body: ChatBody, service: Service) -> None:
    refuse_unsupported(body, service.client.codec.tokenizer)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs is given and logprobs is not true; expected both", param="top_logprobs")
