"""/v1/responses: OpenAI's Responses API over the same generation as chats, and what is kept of its answers."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request, Response

from thalweg.server.bodies import BodyRoute
from thalweg.server.conversation import converse, encode_prompt, translated
from thalweg.server.dialects import unsupported
from thalweg.server.errors import ApiError
from thalweg.server.guard import caller
from thalweg.server.responses import encode, new_id
from thalweg.server.responses_api.answer import ResponseAnswer
from thalweg.server.responses_api.schemas import ResponsesBody
from thalweg.server.responses_api.store import Stored
from thalweg.server.responses_api.translate import chat_fields, spelling_of
from thalweg.server.schemas import ChatBody
from thalweg.server.service import Service, ServiceDep, maybe_in_thread
from thalweg.server.spelling import Spelling
from thalweg.server.streaming import NamedEvents, stream, whole

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/responses")
async def responses(body: ResponsesBody, request: Request, service: ServiceDep) -> Response:
    """Answer a text or a conversation with items: messages, reasoning, function calls.

    The answer is kept for a while, unless `store` is false; `previous_response_id` continues from one that is kept.
    """
    chat, size, spelling = await _chat(body, request, service)
    talk = await converse(chat, size, service, new_id("resp", "_"), spelling)
    keep, owner = body.store is not False and service.stored.keeps, caller(request)

    async def finished(response: dict[str, Any], message: dict[str, Any]) -> bool:
        if not keep:
            return False
        first = 0 if body.instructions is None else 1
        messages = [*chat.messages[first:], message]
        # In JSON's own escapes, in which halves of surrogate pairs stay as they came.
        kept = await maybe_in_thread(size, lambda: json.dumps(messages).encode())
        return service.stored.put(talk.id, owner, encode(response), kept)

    with spelling.applied():
        answer = await maybe_in_thread(size, lambda: ResponseAnswer(service, talk, body, keep, finished))
    if not body.stream:
        return await whole(request, answer.whole())
    wire = NamedEvents(answer.failed)
    return await stream(request, answer.events(), talk.taken, service.settings.ping_seconds, wire)


@router.post("/v1/responses/input_tokens")
async def count_input_tokens(body: ResponsesBody, request: Request, service: ServiceDep) -> dict[str, Any]:
    """How many tokens the prompt of such a response has."""
    chat, size, spelling = await _chat(body, request, service)
    with spelling.applied():
        prompt_ids, _ = await encode_prompt(chat, size, service)
    return {"object": "response.input_tokens", "input_tokens": len(prompt_ids)}


@router.get("/v1/responses/{response_id}")
async def retrieve_response(response_id: str, request: Request, service: ServiceDep, stream: bool = False) -> Response:
    """An answer that is kept, for the caller whose API key asked for it."""
    if stream:  # of answers that are made in the background, whose events are kept
        raise unsupported("stream", stream, (False,))
    return Response(_stored(response_id, request, service).response, media_type="application/json")


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, request: Request, service: ServiceDep) -> dict[str, Any]:
    """Forget an answer."""
    if not service.stored.delete(response_id, caller(request)):
        raise _unknown(response_id)
    return {"id": response_id, "object": "response", "deleted": True}


async def _chat(body: ResponsesBody, request: Request, service: Service) -> tuple[ChatBody, int, Spelling]:
    """The request as a chat with what it continues from, how many bytes these are, and how the request says it."""
    service.check(body.model)
    size, kept = len(await request.body()), b"[]"
    if body.previous_response_id is not None:
        kept = _stored(body.previous_response_id, request, service, "previous_response_id").messages
        size += len(kept)
    spelling = spelling_of(body)
    return await translated(size, lambda: chat_fields(body, json.loads(kept)), spelling), size, spelling


def _stored(response_id: str, request: Request, service: Service, param: str | None = None) -> Stored:
    stored = service.stored.get(response_id, caller(request))
    if stored is None:
        raise _unknown(response_id, param)
    return stored


def _unknown(response_id: str, param: str | None = None) -> ApiError:
    reason = "it was not stored (store, --max-stored-responses), was larger than --stored-responses-memory, has expired"
    reason += " (--stored-response-ttl), gave way to newer ones, or belongs to another API key"
    message = f"no response {response_id[:80]!r} is kept here: {reason}"
    return ApiError(404, message, param=param, code="response_not_found")
