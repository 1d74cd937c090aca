"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}} and a fitting status."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from thalweg.errors import (
    EngineDeadError,
    InvalidRequest,
    ProfileConflict,
    QueueTimeout,
    RequestTimeout,
    SessionConflict,
    SessionNotFound,
    ThalwegError,
)
from thalweg.tokenizer.base import valid_unicode

MAX_MESSAGE_CHARS = 1000
RETRY_AFTER = "1"  # seconds, as a header
TOO_LONG = "context_length_exceeded"
ANTHROPIC = "/v1/messages"  # what the paths of Anthropic's API begin with

_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}

# Messages about a field begin with its name: "temperature is 200; expected 0 to 100".
_NAMED = re.compile(r"([a-z_]+)[\w.\[\]]* (?:is|has|names|nests)\b")

_TOO_LONG = re.compile(r"the prompt has \d+ tokens; expected at most")

# What the framework's reading of a body fails with, beside bad syntax; it tells the client only that it failed.
_UNREADABLE: dict[type, str] = {
    UnicodeDecodeError: "it is not UTF-8",
    RecursionError: "it nests too deep",
    ValueError: "it holds a number of too many digits",
}


# What pydantic expects, in terms of JSON.
_IN_JSON = {
    "a valid boolean": "true or false",
    "a valid dictionary": "an object",
    "a valid dictionary or object to extract fields from": "an object",
    "a valid integer": "an integer",
    "a valid list": "a list",
    "a valid number": "a number",
    "a valid string": "a string",
}


class ApiError(Exception):
    """An answer other than 200. `param` names the request's field, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        # Names out of a request may hold what has no UTF-8 form.
        message = valid_unicode(str(self)[:MAX_MESSAGE_CHARS])
        param = None if self.param is None else valid_unicode(self.param)
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def response(self, path: str = "") -> Response:
        """The answer to a request of `path`, in the shape of the API that the path belongs to."""
        body = self.anthropic_body() if path.startswith(ANTHROPIC) else self.body()
        return Response(msgspec.json.encode(body), self.status, self.headers, "application/json")

    def anthropic_body(self) -> dict[str, Any]:
        """The same in Anthropic's shape, which has no place for `param` and `code`."""
        kind = _ANTHROPIC_KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        message = self.body()["error"]["message"]
        if self.code == TOO_LONG:  # in the words by which clients know that they have to shorten the conversation
            message = f"prompt is too long: {message}"
        return {"type": "error", "error": {"type": kind, "message": message}}


def shown(value: Any) -> str:
    """A value of a request in a message about it: as JSON, its beginning; its type if it is nested too deep."""
    try:
        return json.dumps(value, ensure_ascii=False)[:80]
    except RecursionError:
        return type(value).__name__


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of any exception. Of one nobody foresaw it is only told that it happened."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineDeadError):
        return ApiError(503, str(error), code="engine_dead")
    if isinstance(error, QueueTimeout):
        return ApiError(503, str(error), code="queue_timeout", headers={"Retry-After": RETRY_AFTER})
    if isinstance(error, RequestTimeout):
        return ApiError(504, str(error), code="request_timeout")
    if isinstance(error, ProfileConflict):
        return ApiError(409, str(error), code="profile_conflict")
    if isinstance(error, SessionNotFound):
        return ApiError(404, str(error), code="session_not_found")
    if isinstance(error, SessionConflict):
        return ApiError(409, str(error), code="session_conflict")
    if isinstance(error, InvalidRequest):
        param = _param_of(str(error))
        code = TOO_LONG if _TOO_LONG.match(str(error)) else None
        return ApiError(400, str(error), param=param, code="invalid_grammar" if param == "grammar" else code)
    if isinstance(error, ThalwegError):  # the checkpoint's fault, such as a chat template that the sandbox stopped
        return ApiError(500, str(error), code="model_error")
    if isinstance(error, RequestValidationError):
        return _invalid_body(error)
    if isinstance(error, HTTPException):
        if error.status_code == 400 and (reason := _UNREADABLE.get(type(error.__cause__))) is not None:
            return ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json")
        return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    return ApiError(500, f"internal error ({type(error).__name__}); the server's log has more", code="internal_error")


def respelled(error: Exception, names: Mapping[str, str]) -> ApiError:
    """`error` as an ApiError with what it says of one of our names said of the request's name for it."""
    api_error = as_api_error(error)
    ours, message = api_error.param or "", str(api_error)
    if (theirs := names.get(ours)) is None:
        return api_error
    if message.startswith(ours):
        message = theirs + message.removeprefix(ours)
    return ApiError(api_error.status, message, param=theirs, code=api_error.code, headers=api_error.headers)


def told(request: Request, error: Exception) -> ApiError:
    """as_api_error of what ends `request`; a caller's mistake is counted as one, so call it once for each request."""
    api_error = as_api_error(error)
    if api_error.status in (400, 404):
        request.app.state.service.metrics.refused(api_error.code)
    return api_error


def install(app: FastAPI) -> None:
    """Have every failed request of `app` answered in the shape of its API."""

    async def handle(request: Request, error: Exception) -> Response:
        return told(request, error).response(request.scope["path"])

    async def handle_http(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code in (404, 405):
            message = f"{request.method} {request.url.path[:200]} is not a route of this server; {_nearest(request)}"
            headers = dict(error.headers or {})
            error = ApiError(error.status_code, message, code="unknown_route", headers=headers)
        return told(request, error).response(request.scope["path"])

    for kind in (ApiError, ThalwegError, RequestValidationError, Exception):
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(HTTPException, handle_http)


def _nearest(request: Request) -> str:
    """Where to look instead: clients differ in whether their base URL ends with /v1."""
    path = request.scope["path"]
    other = path.removeprefix("/v1") if path.startswith("/v1/v1/") else f"/v1{path}"
    scope = {**request.scope, "path": other}
    known = any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)
    return f"expected {other[:200]}" if known else "see /docs"


def _invalid_body(error: RequestValidationError) -> ApiError:
    """The first thing wrong with a body, and how many more there are."""
    errors = error.errors()
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    path = [str(part) for part in first["loc"][1:]]
    if not path:
        return ApiError(400, _not_an_object(error.body), code="invalid_json")
    place = "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in path)[1:]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return ApiError(400, f"{place[:200]}{_wrong(first)}{more}", param=path[0][:64])


def _not_an_object(body: Any) -> str:
    if isinstance(body, bytes):
        return "the body did not come as JSON; expected the header Content-Type: application/json"
    return f"the body is {'empty' if body is None else _came(body)}; expected a JSON object"


def _wrong(error: Mapping[str, Any]) -> str:
    """What pydantic says of a field, to follow its name: what came and what was expected."""
    reason, bounds = str(error["msg"]), error.get("ctx", {})
    if error["type"] == "missing":
        return " is missing; expected a value"
    if error["type"] in ("too_short", "too_long") and isinstance(bounds.get("actual_length"), int):
        bound = f"at least {bounds['min_length']}" if "min_length" in bounds else f"at most {bounds['max_length']}"
        return f" has {bounds['actual_length']} items; expected {bound}"
    expected = reason.removeprefix("Input should be ").removeprefix("expected ")
    if expected == reason:
        return f": {reason[:1].lower()}{reason[1:]}"
    if expected.startswith(("greater", "less")):
        expected = f"a number {expected}"
    return f" is {_came(error.get('input'))}; expected {_IN_JSON.get(expected, expected)}"


def _came(value: Any) -> str:
    """A value that may be large, in few words."""
    if isinstance(value, str):
        return shown(value[:80])
    if isinstance(value, (list, dict)) and value:
        return "a list" if isinstance(value, list) else "an object"
    return shown(value)


def _param_of(message: str) -> str | None:
    if message.startswith(("the prompt", "prompt token")):
        return "prompt"
    if message.startswith("the chat template"):
        return "messages"
    if message.startswith("the grammar"):
        return "grammar"
    named = _NAMED.match(message)
    return named[1] if named else None
