"""/v1/sessions: named sequences, which completions continue, and which can be forked and rolled back."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response

from thalweg.core import SamplingParams
from thalweg.engine.sessions import Point, SavedSession
from thalweg.server.bodies import BodyRoute
from thalweg.server.errors import ApiError
from thalweg.server.generation import Job, News, generate
from thalweg.server.guard import caller
from thalweg.server.responses import json_response, new_id
from thalweg.server.schemas import CompletionBody, ForkBody, RollBackBody, SessionBody, SessionPromptBody
from thalweg.server.service import Service, ServiceDep

SALT = "x-cache-salt"

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/sessions")
async def create(body: SessionBody, request: Request, service: ServiceDep) -> Response:
    """Compute a prompt and save it under a name."""
    service.check(body.model)
    if body.prompt is None:
        raise ApiError(400, "prompt is missing; expected a text or token ids", param="prompt")
    owner, salt = caller(request), body.cache_salt or ""
    service.sessions.check_seconds(body.ttl)
    ids = (await service.encode_prompts([body.prompt]))[0]
    service.sessions.check_new([body.name], len(ids), 1, owner)
    await _compute(service, ids, salt)
    session = service.sessions.add(body.name, ids, owner, salt, body.ttl)
    await _keep(service, session, session.points[-1])
    return json_response(_described(service, session))


@router.get("/v1/sessions")
async def every(request: Request, service: ServiceDep) -> Response:
    """The sessions of this API key and cache salt."""
    service.check_alive()
    found = service.sessions.all(caller(request), _salt(request))
    return json_response({"object": "list", "data": [_described(service, each) for each in found]})


@router.get("/v1/sessions/{name:path}")
async def one(name: str, request: Request, service: ServiceDep) -> Response:
    service.check_alive()
    return json_response(_described(service, _of(service, request, name, _salt(request))))


@router.delete("/v1/sessions/{name:path}")
async def delete(name: str, request: Request, service: ServiceDep) -> Response:
    service.check_alive()
    service.sessions.delete(_of(service, request, name, _salt(request)))
    return json_response({"id": name, "object": "session.deleted", "deleted": True})


@router.post("/v1/sessions/{name:path}/save")
async def save(name: str, body: SessionPromptBody, request: Request, service: ServiceDep) -> Response:
    """Go on by a prompt, to a new point."""
    service.check(body.model)
    session = _of(service, request, name, body.cache_salt)
    new = (await service.encode_prompts([body.prompt]))[0]
    version = session.version
    with service.sessions.extending(session, version, len(new)) as extension:
        await _compute(service, session.ids + new, session.salt)
        await _keep(service, session, service.sessions.extend(session, version, new, extension))
    return json_response(_described(service, session))


@router.post("/v1/sessions/{name:path}/fork")
async def fork(name: str, body: ForkBody, request: Request, service: ServiceDep) -> Response:
    service.check(body.model)
    forks = service.sessions.fork(_of(service, request, name, body.cache_salt), body.names)
    return json_response({"object": "list", "data": [_described(service, each) for each in forks]})


@router.post("/v1/sessions/{name:path}/rollback")
async def roll_back(name: str, body: RollBackBody, request: Request, service: ServiceDep) -> Response:
    service.check(body.model)
    session = _of(service, request, name, body.cache_salt)
    service.sessions.roll_back(session, body.point)
    return json_response(_described(service, session))


def session_of(service: Service, request: Request, body: CompletionBody, choices: int) -> SavedSession | None:
    """The session that a completion continues from, if any. Raises ApiError."""
    if body.session is None:
        if body.session_save:
            raise ApiError(400, "session_save is given without session; expected both", param="session_save")
        return None
    for name in ("echo", "truncate_prompt_tokens"):
        if getattr(body, name):
            raise ApiError(400, f"{name} is given with session; expected one of them", param=name)
    if body.session_save and choices != 1:
        raise ApiError(400, f"session_save is given for {choices} choices; expected one", param="session_save")
    return _of(service, request, body.session, body.cache_salt)


async def saving(
    service: Service, session: SavedSession, version: int, news: News, prompt_token_ids: list[int], answer: int
) -> News:
    """`news` of one choice, with its tokens added to the session, which had `version`, before the last of them is
    passed on. Nothing is begun without room for `prompt_token_ids` and the `answer`, of at most so many tokens."""
    new = list(prompt_token_ids)
    async with aclosing(news):
        with service.sessions.extending(session, version, len(new) + answer) as extension:
            async for index, delta in news:
                new += delta.token_ids
                if delta.finish_reason is not None:
                    await _keep(service, session, service.sessions.extend(session, version, new, extension))
                yield index, delta


async def _compute(service: Service, ids: list[int], salt: str) -> None:
    """Run a prompt, so that the prefix cache has it."""
    job = Job(new_id("session"), ids, SamplingParams(max_tokens=0, cache_salt=salt))
    async with aclosing(generate(service, [job], time.perf_counter(), asyncio.Event())) as news:
        async for _ in news:
            pass


async def _keep(service: Service, session: SavedSession, point: Point) -> None:
    point.cached = await service.client.keep(point.key, session.salt, session.ids[: point.tokens])
    if point.shares < 1:  # it was deleted meanwhile
        service.client.release(point.key)


def _salt(request: Request) -> str:
    """The header's salt, in UTF-8 as bodies are. Raises ApiError."""
    try:
        return request.headers.get(SALT, "").encode("latin-1").decode()  # servers give a header's bytes as latin-1
    except UnicodeDecodeError:
        raise ApiError(400, "X-Cache-Salt is not UTF-8", param="X-Cache-Salt") from None


def _of(service: Service, request: Request, name: str, salt: str | None) -> SavedSession:
    return service.sessions.get(name, caller(request), salt or "")


def _described(service: Service, session: SavedSession) -> dict[str, Any]:
    return {
        "id": session.name,
        "object": "session",
        "created": session.created,
        "model": service.names[0],
        "tokens": len(session.token_ids),
        "points": [{"index": i, "tokens": p.tokens, "cached": p.cached} for i, p in enumerate(session.points)],
        "ttl": session.seconds,
    }
