"""GET /v1/models"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from thalweg.server.service import Service, ServiceDep

router = APIRouter()


@router.get("/v1/models")
@router.get("/v1/models/", include_in_schema=False)  # else the route below takes it for a name
async def list_models(service: ServiceDep) -> dict[str, Any]:
    """Every name the model is served under."""
    service.check_alive()
    return {"object": "list", "data": [_card(service, name) for name in service.names]}


@router.get("/v1/models/{name:path}")
async def retrieve_model(name: str, service: ServiceDep) -> dict[str, Any]:
    service.check(name)
    return _card(service, name)


def _card(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "thalweg",
        "max_model_len": service.client.info.max_model_len,
        "default_sampling_params": dict(service.suggested),
    }
