"""Quantising to blocks: small errors, exact where the type can be, and bytes that decode to what was meant."""

from __future__ import annotations

import pytest
import torch

from thalweg.ops.linear.reference import linear_ggml
from thalweg.quant import GgmlRows, scheme_named
from thalweg.quant.ggml_blocks import dequantize
from thalweg.quant.ggml_quantize import WRITTEN, quantize
from thalweg.quant.ggml_types import TYPES

# Relative errors on normal numbers: those of the gguf package's own quantiser where it has one (Q8_0 0.0053, Q4_0
# 0.0859, Q5_0 0.0427), and for K types what their bits allow.
ERRORS = {"Q8_0": 0.0055, "Q4_0": 0.087, "Q5_0": 0.0435, "Q4_K": 0.074, "Q5_K": 0.037, "Q6_K": 0.018}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_those_of_the_type(name: str) -> None:
    torch.manual_seed(0)
    for scale in (1e-3, 0.02, 30.0):
        values = torch.randn(64, 512) * scale
        blocks = quantize(values, TYPES[name])
        assert blocks.shape == (64, TYPES[name].row_bytes(512))
        error = dequantize(blocks, TYPES[name], torch.float32) - values
        assert error.square().mean().sqrt() < ERRORS[name] * values.square().mean().sqrt()


@pytest.mark.parametrize("name", ERRORS)
def test_blocks_of_odd_contents(name: str) -> None:
    """Zeros stay zeros; constants, single spikes and one-sided blocks stay close."""
    kind = TYPES[name]
    zeros = torch.zeros(1, 256)
    spike = zeros.clone()
    spike[0, 77] = -3.0
    ones, random = torch.ones(1, 256), torch.rand(1, 256)
    for values in (zeros, ones, spike, random, -random - 1, ones * 1e-30):
        got = dequantize(quantize(values, kind), kind, torch.float32)
        assert got.isfinite().all()
        assert (got - values).abs().max() <= 0.07 * values.abs().max() + 1e-7
    assert not dequantize(quantize(zeros, kind), kind, torch.float32).any()


@pytest.mark.parametrize("name", ERRORS)
def test_what_was_decoded_is_encoded_again_alike(name: str) -> None:
    kind = TYPES[name]
    once = dequantize(quantize(torch.randn(32, 256), kind), kind, torch.float32)
    again = dequantize(quantize(once, kind), kind, torch.float32)
    assert (again - once).square().mean().sqrt() < 0.35 * ERRORS[name] * once.square().mean().sqrt()


def test_types_that_are_written_are_read() -> None:
    assert set(WRITTEN) <= set(TYPES)


def test_a_scheme_keeps_rows_of_several_types() -> None:
    """Segments of a fused matrix lie one below the other; names are spelt and read alike."""
    scheme = GgmlRows.of([("Q4_K", 3), ("Q4_K", 1), ("F16", 2), ("Q8_0", 4)])
    assert scheme.name == "Q4_K 4 + F16 2 + Q8_0 4"
    assert scheme_named(scheme.name) == scheme
    (stored,) = scheme.stored((10, 512), 1)
    blocks = torch.zeros(stored.shape, dtype=torch.uint8)
    values = torch.randn(10, 512)
    for kind, rows in (("Q4_K", (0, 3)), ("Q4_K", (3, 4)), ("F16", (4, 6)), ("Q8_0", (6, 10))):
        scheme.put(quantize(values[slice(*rows)], TYPES[kind]), (rows,), [blocks])
    widened = scheme.widened([blocks], 1, torch.float32)
    assert (widened - values).square().mean().sqrt() < 0.07
    assert torch.equal(widened[4:6], values[4:6].half().float())
    assert scheme.bytes_per_weight(4) == pytest.approx(len(blocks) / values.numel())
    slices = list(scheme.slices(blocks, torch.float32))
    assert torch.equal(torch.cat(slices), widened)
    experts = torch.stack([blocks, blocks])
    assert torch.equal(scheme.widened([experts], 1, torch.float32)[1], widened)


def test_a_large_matrix_is_never_whole_in_float32() -> None:
    scheme = GgmlRows.of([("Q8_0", 3000), ("Q4_0", 1000)])
    (stored,) = scheme.stored((4000, 1024), 1)
    blocks = torch.zeros(stored.shape, dtype=torch.uint8)
    slices = list(scheme.slices(blocks, torch.float32))
    assert sum(len(rows) for rows in slices) == 4000
    assert max(rows.numel() for rows in slices) <= 1 << 20
    x = torch.randn(3, 1024)
    assert linear_ggml(scheme, x, blocks).shape == (3, 4000)
