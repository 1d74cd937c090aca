"""Sums over two ranks by peer memory, each in a process: the bits, graphs, ranks that are late, one that dies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist import gpu_ranks

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("check", [check.__name__ for check in gpu_ranks.CHECKS])
def test_sums_over_ranks(check: str, tmp_path: Path) -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, not {torch.cuda.device_count()}")
    command = [sys.executable, "-m", "tests.dist.gpu_ranks"]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "meet"), check], cwd=ROOT) for rank in range(2)]
    try:
        assert [rank.wait(120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
