"""Every block type against what the gguf package's own reference makes of the same random bytes (recorded by
scripts/record_ggml_blocks.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from thalweg.quant.ggml_blocks import dequantize
from thalweg.quant.ggml_types import TYPES

RECORDED = np.load(Path(__file__).parents[1] / "fixtures" / "ggml_blocks.npz")
BLOCKS = [kind for kind in TYPES.values() if not kind.is_plain]


@pytest.mark.parametrize("kind", BLOCKS, ids=str)
def test_blocks_are_what_the_reference_makes_of_them(kind) -> None:  # type: ignore[no-untyped-def]
    blocks, expected = (torch.from_numpy(RECORDED[f"{kind}.{what}"]) for what in ("blocks", "values"))
    assert blocks.shape == (6, kind.bytes)
    assert expected.shape == (6, kind.elements)
    assert torch.equal(dequantize(blocks, kind, torch.float32), expected)
    assert torch.equal(dequantize(blocks, kind, torch.bfloat16), expected.bfloat16())
    rows = dequantize(blocks.view(2, 3 * kind.bytes), kind, torch.float32)
    assert torch.equal(rows, expected.view(2, 3 * kind.elements))
    # A slice of a mapped file may begin at any byte.
    moved = torch.cat([torch.zeros(1, dtype=torch.uint8), blocks.flatten()])[1:].view(blocks.shape)
    assert torch.equal(dequantize(moved, kind, torch.float32), expected)


@pytest.mark.parametrize(("name", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_plain_types_are_taken_as_they_are(name: str, dtype: torch.dtype) -> None:
    values = torch.randn(3, 5).to(dtype)
    rows = values.view(torch.uint8)
    moved = torch.cat([torch.zeros(1, dtype=torch.uint8), rows.flatten()])[1:].view(rows.shape)
    assert torch.equal(dequantize(rows, TYPES[name], dtype), values)
    assert torch.equal(dequantize(moved, TYPES[name], torch.float32), values.float())
