"""The rates that floors are made of."""

from __future__ import annotations

import pytest
import torch

from thalweg.bench import ceilings


@pytest.mark.parametrize("slow", ["mm", "linear"])
def test_a_cpus_matrix_rate_is_the_faster_products(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def seconds(call: object, device: torch.device) -> float:
        code = call.__code__.co_names + call.__code__.co_freevars  # type: ignore[attr-defined]
        name = next((name for name in ("mm", "linear") if name in code), "copy")
        calls.append(name)
        return 2.0 if name == slow else 1.0

    monkeypatch.setattr(ceilings, "_seconds", seconds)
    found = ceilings.measure_ceilings(torch.device("cpu"), torch.float32)
    assert calls == ["copy", "mm", "linear"]
    assert found.flops_per_s == 2 * 1024**3
