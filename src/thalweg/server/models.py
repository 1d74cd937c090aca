"""GET /v1/models"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter

from thalweg.server.service import Service, ServiceDep

router = APIRouter()


@router.get("/v1/models")
@router.get("/v1/models/", include_in_schema=False)  # else the route below takes it for a name
async def list_models(service: ServiceDep) -> dict[str, Any]:
    """Every name the model is served under."""
    service.check_alive()
    ends = {"first_id": service.names[0], "last_id": service.names[-1], "has_more": False}
    return {"object": "list", "data": [_card(service, name) for name in service.names], **ends}


@router.get("/v1/models/{name:path}")
async def retrieve_model(name: str, service: ServiceDep) -> dict[str, Any]:
    service.check(name)
    return _card(service, name)


def _card(service: Service, name: str) -> dict[str, Any]:
    """A model as OpenAI's and Anthropic's clients read it, in one."""
    longest = service.client.info.max_model_len
    return {
        "id": name,
        "object": "model",
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(service.created, UTC).isoformat().replace("+00:00", "Z"),
        "max_input_tokens": longest,
        "max_tokens": longest,
        "created": service.created,
        "owned_by": "thalweg",
        "max_model_len": longest,
        "default_sampling_params": dict(service.suggested),
    }
