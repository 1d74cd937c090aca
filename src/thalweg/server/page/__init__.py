"""GET / is a page to chat with the model in a browser, /dashboard one of its metrics. Plain files, nothing from
elsewhere, nothing to build."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Response

from thalweg.server.errors import ApiError

router = APIRouter(include_in_schema=False)

_FOLDER = Path(__file__).parent
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_FILES = frozenset(file.name for file in _FOLDER.iterdir() if file.suffix in _TYPES)
# The pages may load and call this server alone, no string may become markup or script in them, and no other site may
# frame them.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


@router.get("/")
async def index() -> Response:
    return _file("index.html")


@router.get("/dashboard")
async def dashboard() -> Response:
    return _file("dashboard.html")


@router.get("/page/{name}")
async def part(name: str) -> Response:
    return _file(name)


def _file(name: str) -> Response:
    if name not in _FILES:
        raise ApiError(404, f"the page has no part {name[:80]!r}")
    kind = _TYPES[Path(name).suffix]
    return Response((_FOLDER / name).read_bytes(), media_type=f"{kind}; charset=utf-8", headers=_HEADERS)
