"""GET /docs: the OpenAPI description as a page, written here, so that it loads nothing from anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from thalweg.server.schemas import MAX_INT

router = APIRouter(include_in_schema=False)

_STYLE = (
    ":root{color-scheme:light dark}"
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code{font-family:ui-monospace,monospace}table{border-collapse:collapse;width:100%}"
    "td{padding:.2rem .8rem .2rem 0;vertical-align:top;border-top:1px solid #8884}"
    "summary{cursor:pointer;padding:.4rem 0}b{display:inline-block;min-width:3.5rem}"
)

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


@router.get("/docs", response_class=HTMLResponse)
async def docs(request: Request) -> HTMLResponse:
    """Every route with its fields; the same as /openapi.json."""
    return HTMLResponse(page(request.app.openapi()), headers=_HEADERS)


def page(openapi: dict[str, Any]) -> str:
    """HTML without scripts of an OpenAPI description."""
    title = escape(f"{openapi['info']['title']} {openapi['info']['version']}")
    schemas = openapi.get("components", {}).get("schemas", {})
    body = "".join(
        _operation(method, path, operation, schemas)
        for path, operations in openapi["paths"].items()
        for method, operation in operations.items()
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f'<h1>{title}</h1><p>The same for programs: <a href="openapi.json">openapi.json</a></p>{body}</html>'
    )


def _operation(method: str, path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    says = "".join(f"<p>{escape(part)}</p>" for part in operation.get("description", "").split("\n\n"))
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    fields = "" if body is None else f"<table>{''.join(_fields(_resolved(body, schemas), schemas))}</table>"
    head = f"<b>{escape(method.upper())}</b> <code>{escape(path)}</code>"
    return f"<details><summary>{head}</summary>{says}{fields}</details>"


def _fields(schema: dict[str, Any], schemas: dict[str, Any]) -> Iterator[str]:
    required = schema.get("required", [])
    for name, field in sorted(schema.get("properties", {}).items(), key=lambda item: item[0] not in required):
        kind = _type(field, schemas) + (", required" if name in required else "")
        cells = (f"<code>{escape(name)}</code>", escape(kind), escape(field.get("description", "")))
        yield f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _type(schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    schema = _resolved(schema, schemas)
    if "anyOf" in schema:
        kinds = [_type(s, schemas) for s in schema["anyOf"] if s.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    kind = str(schema.get("type", "any"))
    if kind == "array":
        return f"list of {_type(schema.get('items', {}), schemas)}"
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is None or high is None:
        return kind
    return f"{kind}, {low:g} or more" if high >= MAX_INT else f"{kind}, {low:g} to {high:g}"


def _resolved(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    return schema if reference is None else schemas.get(reference.rsplit("/", 1)[-1], {})
