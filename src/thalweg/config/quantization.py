"""How weights may be quantized when they are loaded. Known to the options, the weight plans and the ops alike."""

from __future__ import annotations

from thalweg.errors import ConfigError

QUANTIZATIONS = ("fp8",)
"""fp8: the experts' matrices as float8_e4m3fn, with one float32 scale for each block of BLOCK x BLOCK."""

BLOCK = 128


def blocks(size: int) -> int:
    """How many blocks a dimension of `size` has; the last may be partial."""
    return -(-size // BLOCK)


def need_experts(quantization: str | None, has_experts: bool, architecture: str) -> None:
    """Raise ConfigError where there is nothing that `quantization` could quantize."""
    if quantization is not None and not has_experts:
        what = f"--quantization is {quantization!r}, which quantizes experts"
        raise ConfigError(f"{what}, and this {architecture} has none; leave it out")
