"""Experts in int4 in CUDA C++: `few` for decode, `many` for prompts."""

from __future__ import annotations

from thalweg.ops.registry import Refusal


def many_refusal(D: int, I: int) -> Refusal:
    """Why `many` does not serve experts I wide of a model D wide."""
    if D % 256 or I % 128 or not D or not I:
        return f"needs D to be a multiple of 256 and I of 128, not {D} and {I}"
    return None
