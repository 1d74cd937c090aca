"""GET /: a page to chat with the model in a browser. Plain files, nothing from elsewhere, nothing to build."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Response

from thalweg.server.errors import ApiError

router = APIRouter(include_in_schema=False)

_FOLDER = Path(__file__).parent
_TYPES = {"index.html": "text/html", "chat.css": "text/css", "chat.js": "text/javascript"}
# The page may load and call this server alone, and no other site may frame it.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/")
async def index() -> Response:
    return _file("index.html")


@router.get("/page/{name}")
async def part(name: str) -> Response:
    return _file(name)


def _file(name: str) -> Response:
    if name not in _TYPES:
        raise ApiError(404, f"the page has no part {name[:80]!r}")
    return Response((_FOLDER / name).read_bytes(), media_type=f"{_TYPES[name]}; charset=utf-8", headers=_HEADERS)
