"""Blocks of a matrix that share a scale, as DeepSeek's float8 checkpoints have them."""

from __future__ import annotations

BLOCK = 128


def blocks(size: int) -> int:
    """How many blocks a dimension of `size` has; the last may be partial."""
    return -(-size // BLOCK)
