"""Fixtures every suite shares."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of oracles, tokenizers and published configs that lies beside a developer's checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared test data folder beside the checkout ({SHARED.name}/), which is absent")
    return SHARED


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a tiny model with random weights."""
    from tests.e2e.tiny_model import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def tmp() -> Iterator[Path]:
    """For temporary files of processes, with a path short enough for sockets."""
    path = Path(tempfile.mkdtemp())
    yield path
    shutil.rmtree(path)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _leave_out_exhaustive(config, items)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Give a device's memory back: others' tests run on it at the same time."""
    if item.get_closest_marker("gpu"):
        import torch

        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _leave_out_exhaustive(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `exhaustive`, unless -m names the mark or the command line names single tests."""
    if "exhaustive" in config.option.markexpr or any("::" in argument for argument in config.args):
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
