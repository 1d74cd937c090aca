"""Thalweg: an inference engine for hybrid linear-attention language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "Grammar", "SamplingParams", "ThinkingLimit", "__version__"]

if TYPE_CHECKING:
    from thalweg.core import Grammar, SamplingParams, ThinkingLimit
    from thalweg.engine.llm import LLM


def __getattr__(name: str) -> Any:
    # Lazy: `import thalweg` and `thalweg --help` must not pay for torch.
    if name == "LLM":
        from thalweg.engine.llm import LLM

        return LLM
    if name in ("Grammar", "SamplingParams", "ThinkingLimit"):
        from thalweg import core

        return getattr(core, name)
    raise AttributeError(f"module 'thalweg' has no attribute {name!r}")
