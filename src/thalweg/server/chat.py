"""POST /v1/chat/completions"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from thalweg.server.chat_answer import ChatAnswer
from thalweg.server.errors import ApiError
from thalweg.server.generation import generate, jobs_of, naming_fields
from thalweg.server.params import refuse_unsupported, sampling_params
from thalweg.server.responses import new_id
from thalweg.server.schemas import ChatBody
from thalweg.server.service import ServiceDep
from thalweg.server.streaming import stream, whole
from thalweg.server.structured import held_to, wanted
from thalweg.server.tools import tool_use

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatBody, request: Request, service: ServiceDep) -> Response:
    """Answer a conversation; max_tokens defaults to what the context has room for.

    Reasoning comes apart from the answer, as `reasoning_content`, and calls of the request's tools as `tool_calls`,
    where the server knows how the model marks them.
    """
    arrived = time.perf_counter()
    service.check(body.model)
    _refuse_unsupported(body)
    use, text = tool_use(body, service.output), wanted(body)
    messages = [_message(m) for m in body.messages]
    prompt_ids = await service.encode_chat(request, messages, tools=use.tools or None, **body.template_options())
    held = held_to(service.output, use, text, service.output.begins_thinking(prompt_ids))
    params = sampling_params(
        body,
        service.suggested,
        max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=None if held is None else held.grammar,
    )
    answer = ChatAnswer(service, new_id("chatcmpl"), len(prompt_ids), use, body.n or 1)
    reader = partial(service.output.reader, prompt_ids, use.tools, params)
    jobs = jobs_of(answer.id, [prompt_ids], params, body.n or 1, reader)
    fields = {"prompt": "messages", "grammar": "" if held is None else held.field}
    news = naming_fields(generate(service, jobs, arrived), fields)
    if not body.stream:
        return await whole(request, answer.whole(news))
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return await stream(request, answer.chunks(news, usage))


def _message(message: dict[str, Any]) -> dict[str, Any]:
    # "developer" is OpenAI's newer word for the same role; templates mostly know only the older one.
    return {**message, "role": "system"} if message.get("role") == "developer" else message


def _refuse_unsupported(body: ChatBody) -> None:
    refuse_unsupported(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs is given and logprobs is not true; expected both", param="top_logprobs")
