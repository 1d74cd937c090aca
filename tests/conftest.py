"""Fixtures every suite shares."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of oracles, tokenizers and published configs that lies beside a developer's checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared test data folder beside the checkout ({SHARED.name}/), which is absent")
    return SHARED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
