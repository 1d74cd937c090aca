"""POST /start_profile and /stop_profile: some steps of the engine as a trace, while it serves."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request, Response

from thalweg.engine.processes.client import EngineClient
from thalweg.server.errors import ApiError, shown
from thalweg.server.responses import json_response
from thalweg.server.service import Service, ServiceDep

router = APIRouter()


@router.post("/start_profile")
async def start_profile(request: Request, service: ServiceDep) -> Response:
    """Record the steps from the next one on: `num_steps` of them, --profiler-max-steps if not given, or until
    /stop_profile. A body is not needed. 409 while a profile is under way."""
    client = _profiled_client(service)
    await client.start_profile(_num_steps(await request.body()))
    return json_response({"message": "recording from the next step on; POST /stop_profile gives the trace"})


@router.post("/stop_profile")
async def stop_profile(service: ServiceDep) -> Response:
    """Where the trace lies on the server's machine (null if no step came), its bytes, and the steps and ranks in it;
    `full_of` is "steps" or "bytes" if that limit ended it. 409 if there is no profile to stop."""
    trace = await _profiled_client(service).stop_profile()
    return json_response({name: getattr(trace, name) for name in trace.__struct_fields__})


def _profiled_client(service: Service) -> EngineClient:
    service.check_alive()
    if service.client.profiler is None:
        raise ApiError(404, "this server has no profiler; start it with --enable-profiler DIR", code="profiler_off")
    return service.client


def _num_steps(body: bytes) -> int | None:
    """The body's only field. Other servers' fields are refused by name, unless they are null."""
    try:
        fields: Any = json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise ApiError(400, 'the body is not a JSON object; expected {"num_steps": N}, or no body', code="invalid_json")
    for name, value in fields.items():
        if name != "num_steps" and value is not None:
            reason = f"{name[:80]} is not supported here; expected num_steps alone (--enable-profiler says where to)"
            raise ApiError(400, reason, param=name[:64], code="unsupported")
    steps = fields.get("num_steps")
    if steps is not None and type(steps) is not int:
        raise ApiError(400, f"num_steps is {shown(steps)}; expected a number of steps", param="num_steps")
    return steps
