"""Puts the application together: routes, errors, guard, and the engine's life within the server's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from thalweg import __version__
from thalweg.engine.processes.client import EngineClient
from thalweg.server import chat, completions, docs, errors, health, models, page, profile, sessions, tokenization
from thalweg.server.anthropic import routes as anthropic
from thalweg.server.guard import Guard
from thalweg.server.manners import REQUEST_ID, Manners
from thalweg.server.responses_api import routes as responses_api
from thalweg.server.service import Service, StartListener
from thalweg.server.settings import Cors, ServerSettings


def create_app(client: EngineClient, settings: ServerSettings, on_started: StartListener | None = None) -> FastAPI:
    """The ASGI application. It starts `client`, which must be new, and closes it.

    It listens while the engine starts, with /health at 503. `on_started` hears when the engine is ready (None), or
    why it cannot be (the error); by default that error is only visible as /health staying so.
    """
    service = Service(client, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(service.start(on_started or (lambda error: None)))
        tasks = [starting, asyncio.create_task(service.tend())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await client.close()

    # The framework's documentation pages would load scripts from elsewhere; docs.py has one that does not.
    app = _App(settings.cors, title="Thalweg", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    errors.install(app)
    app.add_middleware(
        Guard,
        api_keys=settings.api_keys,
        max_body_bytes=settings.max_body_bytes,
        body_seconds=settings.body_seconds,
    )
    for room in (
        chat,
        completions,
        responses_api,
        anthropic,
        docs,
        models,
        sessions,
        tokenization,
        health,
        page,
        profile,
    ):
        app.include_router(room.router)
    return app


class _App(FastAPI):
    """FastAPI, with what every answer has around all of it, so that answers to unforeseen errors have it too."""

    def __init__(self, cors: Cors, **options: Any) -> None:
        super().__init__(**options)
        self._cors = cors

    def build_middleware_stack(self) -> ASGIApp:
        stack = super().build_middleware_stack()
        if self._cors.origins:
            stack = CORSMiddleware(
                stack,
                allow_origins=self._cors.origins,
                allow_methods=self._cors.methods,
                allow_headers=self._cors.headers,
                allow_credentials=self._cors.credentials,
                expose_headers=(REQUEST_ID.decode(), "Retry-After"),
            )
        return Manners(stack)
