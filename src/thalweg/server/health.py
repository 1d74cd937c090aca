"""GET /health, /version, /metrics: for those who run the server rather than use it."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from thalweg import __version__
from thalweg.server.service import ServiceDep

router = APIRouter()


@router.get("/health")
async def health(service: ServiceDep) -> dict[str, str]:
    """200 when requests can be served; 503 while the engine starts and after it died."""
    service.check_alive()
    return {"status": "ok"}


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": __version__}


@router.get("/metrics")
async def metrics(service: ServiceDep) -> Response:
    if service.settings.expert_metrics:
        await service.metrics.count_experts()
    return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
