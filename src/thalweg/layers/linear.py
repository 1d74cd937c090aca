"""Projections, vocabulary embedding and output head, sharded over tensor-parallel ranks where that is said."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thalweg.layers.context import BuildContext


class Linear(nn.Module):
    """y = x W^T with W [out, in] of this rank. The caller reduces where `in` is sharded."""

    def __init__(self, ctx: BuildContext, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = ctx.weight(out_features, in_features)
        self._linear = ctx.op("linear", D=in_features, O=out_features)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self._linear(x_TD, self.weight)


class VocabEmbedding(nn.Module):
    """Rows of the vocabulary split evenly over ranks; a rank gives zeros for ids it does not hold, then all sum up."""

    def __init__(self, ctx: BuildContext, vocab_size: int, width: int) -> None:
        super().__init__()
        self.mesh = ctx.mesh
        self.rows = -(-vocab_size // ctx.mesh.tp_size)
        self.weight = ctx.weight(self.rows, width)

    def forward(self, ids_T: Tensor) -> Tensor:
        if self.mesh.tp_size == 1:
            return F.embedding(ids_T, self.weight)
        local_T = ids_T - self.mesh.tp_rank * self.rows
        here_T = (local_T >= 0) & (local_T < self.rows)
        x_TD = F.embedding(torch.where(here_T, local_T, 0), self.weight)
        return self.mesh.all_reduce(torch.where(here_T[:, None], x_TD, 0))


class VocabHead(nn.Module):
    """Hidden states to logits [R, vocab_size] in the model's dtype, gathered from all ranks."""

    def __init__(self, ctx: BuildContext, vocab_size: int, width: int) -> None:
        super().__init__()
        self.mesh = ctx.mesh
        self.vocab_size = vocab_size
        rows = -(-vocab_size // ctx.mesh.tp_size)
        self.weight = ctx.weight(rows, width)
        self._linear = ctx.op("linear", D=width, O=rows)

    def forward(self, x_RD: Tensor) -> Tensor:
        logits = self.mesh.all_gather_last(self._linear(x_RD, self.weight))
        return logits[:, : self.vocab_size]
