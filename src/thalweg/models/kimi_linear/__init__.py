"""Kimi-Linear (arXiv:2510.26692): KDA layers with NoPE MLA between them, dense and mixture-of-experts MLPs.

What every family package gives: Config, cut, plan, ignored, decode_cost, prefill_cost, build.
None but `build` needs torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from thalweg.models.kimi_linear.config import KimiLinearConfig as Config
from thalweg.models.kimi_linear.config import cut
from thalweg.models.kimi_linear.cost import decode_cost, prefill_cost
from thalweg.models.kimi_linear.weights import ignored, plan

if TYPE_CHECKING:
    from thalweg.layers.context import BuildContext
    from thalweg.models.kimi_linear.model import KimiLinearModel

__all__ = ["Config", "build", "cut", "decode_cost", "ignored", "plan", "prefill_cost"]


def build(ctx: BuildContext, config: Config) -> KimiLinearModel:
    """The model on one rank, its parameters not filled yet."""
    from thalweg.models.kimi_linear.model import KimiLinearModel

    return KimiLinearModel(ctx, config)
