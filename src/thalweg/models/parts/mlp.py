"""Dense feed-forward blocks: SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass

from thalweg.models.parts.part import Cost, Names, PlanContext, Step, all_reduce, product
from thalweg.weights.plan import Source, Target

WIDTH = "intermediate_size"


@dataclass(frozen=True, slots=True)
class MlpDims:
    """down(silu(gate x) * up x), `inner` wide."""

    inner: int

    def targets(self, ours: str, names: Names, ctx: PlanContext) -> list[Target]:
        """gate_up [2*I, D], gate rows first; down [D, I]. Names: norm, gate, up, down."""
        part, width = ctx.shards.even(self.inner, WIDTH), ctx.width
        gate_up = [Source(names[x], (self.inner, width), 0, part) for x in ("gate", "up")]
        return [
            ctx.norm(f"{ours}.gate_up.norm.weight", names["norm"], ctx.width),
            *ctx.linear(f"{ours}.gate_up", *gate_up),
            *ctx.linear(f"{ours}.down", Source(names["down"], (width, self.inner), 1, part)),
        ]

    def costs(self, width: int, step: Step) -> list[Cost]:
        inner = step.shards.count(self.inner, WIDTH)
        return [
            product("MLP gate and up", 2 * width * inner, step),
            product("MLP down", width * inner, step),
            *all_reduce("MLP sum over ranks", width, step),
        ]
