"""Matrices in fp8: how close they are, that scales are powers of two, and what becomes of odd values and sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thalweg.quant.fp8_blocks import dequantize, quantize


@settings(max_examples=30, derandomize=True, deadline=None)
@given(rows=st.integers(1, 260), cols=st.integers(1, 260), power=st.integers(-20, 20), seed=st.integers(0, 99))
def test_an_element_is_within_its_bound(rows: int, cols: int, power: int, seed: int) -> None:
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    q, scales = quantize(w)
    assert q.shape == w.shape
    assert q.dtype == torch.float8_e4m3fn
    assert scales.shape == (-(-rows // 128), -(-cols // 128))
    assert (torch.frexp(scales).mantissa == 0.5).all()  # powers of two
    by_row = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
    bound = torch.maximum(w.abs() / 16, by_row / 1024)
    assert ((dequantize(q, scales, torch.float32) - w).abs() <= bound).all()
    assert torch.equal(dequantize(q, scales, torch.bfloat16).float(), dequantize(q, scales, torch.float32))


def test_what_fp8_holds_is_kept_and_so_is_its_second_quantization() -> None:
    w = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    once = dequantize(*quantize(w), torch.float32)
    assert torch.equal(dequantize(*quantize(once), torch.float32), once)
    assert (once - w).norm() / w.norm() < 0.03


def test_a_part_has_the_values_of_the_whole() -> None:
    w = torch.randn(256, 160, generator=torch.Generator().manual_seed(0)) * 0.02
    whole, (top, bottom) = dequantize(*quantize(w), torch.float32), w.split(100)[:2]
    assert torch.equal(dequantize(*quantize(top), torch.float32), whole[:100])
    assert torch.equal(dequantize(*quantize(bottom), torch.float32), whole[100:200])


@pytest.mark.parametrize("value", [0.0, 448.0, 448.001, 449.0, 3e38, 1e-38])
def test_extremes_stay_finite(value: float) -> None:
    back = dequantize(*quantize(torch.full((3, 5), value)), torch.float32)
    assert (back - value).abs().max() <= max(value / 16, 1e-30)


def test_nan_and_infinity_spoil_their_block_alone() -> None:
    w = torch.ones(130, 260)
    w[0, 0], w[129, 259] = torch.nan, torch.inf
    back = dequantize(*quantize(w), torch.float32)
    assert back[:128, :128].isnan().all()
    assert back[128:, 256:].isnan().all()
    assert (back[:128, 128:] == 1).all()
