"""A server's own profiler, under a benchmark's load: /start_profile and /stop_profile, as several servers have them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from thalweg.errors import ThalwegError
from thalweg.http_client import HttpClient, HttpError, error_message


class ProfiledServer:
    """`outcome` is what came of it, one line, or None if it was not `wanted`."""

    def __init__(self, wanted: bool, num_steps: int | None) -> None:
        self._wanted, self._num_steps = wanted, num_steps
        self.outcome: str | None = None

    @asynccontextmanager
    async def while_(self, http: HttpClient) -> AsyncIterator[None]:
        """Start the profiler, and stop it at the end. Raises ThalwegError if it does not start; if it does not stop,
        the figures are worth keeping, and `outcome` says so."""
        if not self._wanted:
            yield
            return
        body = None if self._num_steps is None else {"num_steps": self._num_steps}
        async with http.request("POST", "/start_profile", body) as answer:
            content = await answer.read()
        if answer.status != 200:
            raise ThalwegError(f"--profile: POST /start_profile answered {answer.status}: {error_message(content)}")
        try:
            yield
        finally:
            self.outcome = await self._stop(http)

    async def _stop(self, http: HttpClient) -> str:
        try:
            async with http.request("POST", "/stop_profile") as answer:
                content = await answer.read()
        except HttpError as e:
            return f"profile: not written: {e}"
        if answer.status != 200:
            return f"profile: POST /stop_profile answered {answer.status}: {error_message(content)}"
        try:
            trace = json.loads(content)
            file, steps, ranks = trace["file"], trace["steps"], trace["ranks"]
        except (ValueError, LookupError, TypeError):
            return "profile: stopped; the server does not say where it wrote"  # as other engines' servers
        if file is None:
            return "profile: no step came, and nothing was written"
        what = f"{steps} steps, {ranks} rank{'s' * (ranks > 1)}"
        full = f", until --profiler-max-{trace['full_of']}" if trace.get("full_of") == "bytes" else ""
        return f"profile: {what}{full}: {file} on the server's machine"
