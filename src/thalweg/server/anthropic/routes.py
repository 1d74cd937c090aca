"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API over the same generation as chats."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from thalweg.server.anthropic.answer import MessageAnswer
from thalweg.server.anthropic.schemas import CountBody, MessagesBody
from thalweg.server.anthropic.translate import chat_fields, spelling_of
from thalweg.server.bodies import BodyRoute
from thalweg.server.conversation import converse, encode_prompt, translated
from thalweg.server.responses import new_id
from thalweg.server.service import ServiceDep
from thalweg.server.streaming import NamedEvents, stream, whole

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/messages")
async def messages(body: MessagesBody, request: Request, service: ServiceDep) -> Response:
    """Answer a conversation in Anthropic's form: content in blocks of text, thinking and tool_use.

    Where the request is silent, sampling is as in chats. A conversation that ends with the assistant's message is
    gone on with from there.
    """
    service.check(body.model)
    size, spelling = len(await request.body()), spelling_of(body)
    chat = await translated(size, lambda: chat_fields(body, service.output.thinking), spelling)
    talk = await converse(chat, size, service, new_id("msg", "_"), spelling)
    answer = MessageAnswer(service, talk, body.thinking is not None and body.thinking.display == "omitted")
    if not body.stream:
        return await whole(request, answer.whole())
    wire = NamedEvents(lambda error: [error.anthropic_body()])
    return await stream(request, answer.events(), talk.taken, service.settings.ping_seconds, wire)


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountBody, request: Request, service: ServiceDep) -> dict[str, Any]:
    """How many tokens the prompt of such a message has."""
    service.check(body.model)
    size, spelling = len(await request.body()), spelling_of(body)
    chat = await translated(size, lambda: chat_fields(body, service.output.thinking), spelling)
    with spelling.applied():
        prompt_ids, _ = await encode_prompt(chat, size, service)
    return {"input_tokens": len(prompt_ids)}
