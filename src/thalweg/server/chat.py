"""POST /v1/chat/completions"""

from __future__ import annotations

import time
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response

from thalweg.errors import InvalidRequest
from thalweg.server.chat_answer import ChatAnswer
from thalweg.server.errors import ApiError, as_api_error
from thalweg.server.generation import News, generate, jobs_of
from thalweg.server.params import refuse_unsupported, sampling_params
from thalweg.server.responses import new_id
from thalweg.server.schemas import ChatBody
from thalweg.server.service import ServiceDep
from thalweg.server.streaming import stream, whole
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
    use = tool_use(body, service.output)
    params = sampling_params(
        body,
        service.suggested,
        max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    messages = [_message(m) for m in body.messages]
    prompt_ids = await service.encode_chat(messages, tools=use.tools or None, **body.template_options())
    answer = ChatAnswer(service, new_id("chatcmpl"), prompt_ids, use, body.n or 1)
    jobs = jobs_of(answer.id, [prompt_ids], params, body.n or 1, service.output.marks(bool(use.tools)))
    news = _from_messages(generate(service, jobs, arrived))
    if not body.stream:
        return await whole(request, answer.whole(news))
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return await stream(request, answer.chunks(news, usage))


async def _from_messages(news: News) -> News:
    """`news`, with what is wrong with the prompt laid to the messages that it was made of."""
    async with aclosing(news):
        try:
            async for item in news:
                yield item
        except InvalidRequest as e:
            error = as_api_error(e)
            if error.param == "prompt":
                error.param = "messages"
            raise error from None


def _message(message: dict[str, Any]) -> dict[str, Any]:
    # "developer" is OpenAI's newer word for the same role; templates mostly know only the older one.
    return {**message, "role": "system"} if message.get("role") == "developer" else message


def _refuse_unsupported(body: ChatBody) -> None:
    refuse_unsupported(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs is given and logprobs is not true; expected both", param="top_logprobs")
