"""What every Triton kernel's package asks before it offers itself. Importable where triton is not."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

from thalweg.ops.registry import Refusal, Where


def why_not(where: Where, dims: object = None) -> Refusal:
    """Why Triton kernels cannot serve there, or None. They need a Hopper GPU or later, for dependent launch."""
    if where.device != "cuda":
        return f"needs cuda, not {where.device}"
    if find_spec("triton") is None:
        return "triton is not installed"
    major = _compute_capability_major()
    if major < 9:
        return f"needs compute capability 9.0 or later, not {major}.x"
    if where.dtype not in ("bfloat16", "float32"):
        return f"needs bfloat16 or float32, not {where.dtype}"
    return None


def why_not_hopper() -> Refusal:
    """Why kernels cut to Hopper's shared memory, or made of its instructions, cannot serve on this GPU, or None."""
    major = _compute_capability_major()
    return None if major == 9 else f"needs compute capability 9 (Hopper), not {major}.x"


HOPPER = 132  # multiprocessors of an H100 or H200


def processors_here() -> int:
    """Multiprocessors of the current GPU; if there is none, those that tables of a Hopper GPU are made for."""
    return multiprocessors(torch.device("cuda")) if torch.cuda.is_available() else HOPPER


@cache
def _compute_capability_major() -> int:
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 4 for the CPU, where only the interpreter runs kernels."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
