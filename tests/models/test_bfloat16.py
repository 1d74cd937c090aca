"""What computing in bfloat16 costs: mean KL divergence of next-token distributions from the float32 oracles."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models.oracle_kl import TRANSFORMERS, bound, compare, divergences


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_bfloat16_moves_distributions_little(shared_dir: Path, name: str) -> None:
    kl, _ = compare(shared_dir / "oracles" / name, "bfloat16", "cpu")
    assert kl.shape == (2, 70)
    assert 0 < kl.mean() <= bound(name)


def test_float32_moves_them_not_at_all(shared_dir: Path) -> None:
    kl, same = compare(shared_dir / "oracles" / "qwen3_5_moe", "float32", "cpu")
    assert kl.max() < 1e-9
    assert same == 1


def test_divergence_is_that_of_distributions() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    expected = 0.5 * torch.log(torch.tensor(2.0)) - 0.25 * torch.log(torch.tensor(2.0))
    assert divergences(p.log() + 3, q.log() - 1) == pytest.approx(float(expected))
