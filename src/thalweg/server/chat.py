"""POST /v1/chat/completions"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from thalweg.server.bodies import BodyRoute
from thalweg.server.chat_answer import ChatAnswer
from thalweg.server.conversation import converse
from thalweg.server.errors import ApiError
from thalweg.server.responses import new_id
from thalweg.server.schemas import ChatBody
from thalweg.server.service import ServiceDep
from thalweg.server.streaming import stream, whole

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatBody, request: Request, service: ServiceDep) -> Response:
    """Answer a conversation; max_tokens defaults to the model's max_new_tokens, or what the context has room for.

    Reasoning comes apart from the answer, as `reasoning_content`, and calls of the request's tools as `tool_calls`,
    where the server knows how the model marks them.
    """
    service.check(body.model)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs is given and logprobs is not true; expected both", param="top_logprobs")
    talk = await converse(body, len(await request.body()), service, new_id("chatcmpl"))
    answer = ChatAnswer(service, talk, body.n or 1, bool(body.return_token_ids))
    if not body.stream:
        return await whole(request, answer.whole())
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return await stream(request, answer.chunks(usage), talk.taken, service.settings.ping_seconds)
