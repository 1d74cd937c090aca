"""Token embedding and output head: rows of the vocabulary, shared out over ranks in equal blocks."""

from __future__ import annotations

from dataclasses import dataclass

from thalweg.models.parts.part import Cost, Names, PlanContext, Step, all_reduce, product
from thalweg.quant import PLAIN
from thalweg.weights.plan import Target, placed


@dataclass(frozen=True, slots=True)
class VocabDims:
    """`size` token ids. With `tied` the head's matrix is the embedding's, in one memory."""

    size: int
    tied: bool

    def targets(self, names: Names, ctx: PlanContext) -> list[Target]:
        """Rows are blocks of ceil(V / ranks), zero past the end. Names: embed, norm, head."""
        rows, (start, stop) = ctx.shards.padded(self.size)
        width = ctx.width

        def matrix(ours: str, theirs: str) -> Target:
            piece = placed(theirs, (self.size, width), ((0, stop - start),), 0, (start, stop))
            return ctx.in_blocks(Target(ours, (rows, width), (piece,)))

        head = [] if self.tied else [matrix("lm_head.weight", names["head"])]
        norm = ctx.norm("lm_head.norm.weight", names["norm"], ctx.width)
        return [matrix("embed.weight", names["embed"]), *head, norm]

    def costs(self, width: int, step: Step) -> list[Cost]:
        """One row of logits per sequence; the rows that an embedding reads are left out."""
        rows, _ = step.shards.padded(self.size)
        n = step.shards.size
        scheme = step.linears if step.linears.as_stored else PLAIN  # blocks of a file; other schemes leave it out
        gathered = Cost("logits gathered", sent=(n - 1) * step.sequences * rows * step.dtype_bytes)
        return [
            *all_reduce("embedding's sum over ranks", width, step),
            product("head", rows * width, step, rows=step.sequences, scheme=scheme),
            *([gathered] if n > 1 else []),
        ]
