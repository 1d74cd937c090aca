"""Projections, vocabulary embedding and output head, sharded over tensor-parallel ranks where that is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from thalweg.layers.context import BuildContext
from thalweg.layers.norm import NormWeight
from thalweg.ops.activation import SILU_AND_MUL, SiluAndMulDims
from thalweg.ops.all_gather import ALL_GATHER, AllGather, AllGatherDims
from thalweg.ops.all_reduce import ALL_REDUCE_ADD, AllReduceAdd, AllReduceAddDims
from thalweg.ops.embedding import EMBEDDING, VOCAB_ROWS, Embedding, VocabRowsDims
from thalweg.ops.linear import (
    LINEAR,
    LINEAR_ADD,
    LINEAR_GGML,
    LINEAR_REDUCE_ADD,
    NORM_LINEAR,
    LinearDims,
    LinearGgmlDims,
    LinearReduceAdd,
    LinearReduceDims,
    NormLinearDims,
)
from thalweg.ops.linear.fp8 import LINEAR_ADD_FP8, LINEAR_FP8, NORM_LINEAR_FP8, Fp8LinearDims
from thalweg.ops.norm import RMS_NORM, NextNorm, Normed, RmsNormDims
from thalweg.ops.swiglu import NORM_SWIGLU, NormSwigluDims
from thalweg.quant import PLAIN


class Weights(nn.Module):
    """W [out, in] of this rank: one matrix in the model's dtype or, as a checkpoint stores it, a quantized one and,
    below it, what the checkpoint stores otherwise."""

    weight: nn.Parameter

    def __init__(self, ctx: BuildContext, in_features: int, out_features: int) -> None:
        super().__init__()
        stored = ctx.stored("weight", (out_features, in_features))
        for name, weight in stored.items():
            self.register_parameter(name, weight)
        self._names = tuple(stored)
        self.fp8: Fp8LinearDims | None = None
        self.ggml: LinearGgmlDims | None = None
        self.rest: Weights | None = None
        target = ctx.planned("weight")
        self.is_quantized = target is not None
        if target is None:
            return
        rows = target.shape[0]
        rest = out_features - rows
        if target.scheme.as_stored:
            self.ggml = LinearGgmlDims(D=in_features, O=rows, scheme=target.scheme.name)
            self._ggml = ctx.op(LINEAR_GGML, self.ggml)
        else:
            self.fp8 = Fp8LinearDims(D=in_features, O=rows, rest=rest)
            self.rest = Weights(ctx.below("rest"), in_features, rest) if rest else None  # the op takes it too

    def tensors(self) -> tuple[Tensor, ...]:
        """Those of W, as its op takes them."""
        found = tuple(getattr(self, name) for name in self._names)
        return found if self.rest is None else (*found, self.rest.weight)

    def product_ggml(self, x_TD: Tensor, norm: NormWeight | None = None, residual_TO: Tensor | None = None) -> Tensor:
        """residual + norm(x) W^T of a matrix in GGML's blocks; the residual may be overwritten."""
        if norm is None:
            return self._ggml(x_TD, self.weight, residual_TO=residual_TO)
        return self._ggml(x_TD, self.weight, norm_weight_D=norm.weight, eps=norm.eps, residual_TO=residual_TO)


class Linear(Weights):
    """y = x W^T."""

    def __init__(self, ctx: BuildContext, in_features: int, out_features: int) -> None:
        super().__init__(ctx, in_features, out_features)
        self._linear: Callable[..., Tensor]
        if self.fp8 is not None:
            self._linear = ctx.op(LINEAR_FP8, self.fp8)
        elif self.ggml is None:
            self._linear = ctx.op(LINEAR, LinearDims(D=in_features, O=out_features))

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.product_ggml(x_TD) if self.ggml is not None else self._linear(x_TD, *self.tensors())


class NormLinear(Weights):
    """y = norm(x) W^T: W has matrices of as many rows as `parts` says, one after another."""

    def __init__(self, ctx: BuildContext, in_features: int, parts: Sequence[int], eps: float) -> None:
        super().__init__(ctx, in_features, sum(parts))
        self.norm = NormWeight(ctx, in_features, eps)
        self._norm_linear: Callable[..., Tensor]
        self._linear: Callable[..., Tensor] | None = None  # of a norm that is known
        if self.fp8 is not None:
            self._norm_linear = ctx.op(NORM_LINEAR_FP8, self.fp8)
        elif self.ggml is None:
            dims = NormLinearDims(D=in_features, parts=tuple(parts), norm_fp32=ctx.norm_fp32)
            self._norm_linear = ctx.op(NORM_LINEAR, dims)
            if not ctx.resolver.prefers(NORM_LINEAR.name):  # whoever asks for a form of it by name is to have it
                self._linear = ctx.op(LINEAR, LinearDims(D=in_features, O=sum(parts)))

    def next_norm(self) -> NextNorm | None:
        """For whoever makes this layer's input, and may compute its norm as well; None if that would be of no use."""
        if self._linear is None and self.fp8 is None:
            return None
        return NextNorm(self.norm.weight, self.norm.eps, wants_float8=self.fp8 is not None)

    def forward(self, x_TD: Tensor, normed: Normed | None = None, /) -> Tensor:
        """`normed`: norm(x), if it is known."""
        if isinstance(normed, tuple):
            weights = (self.norm.weight, self.norm.eps, *self.tensors())
            return self._norm_linear(x_TD, *weights, in_float8=normed)
        if normed is not None and self._linear is not None:
            return self._linear(normed, *self.tensors())
        if self.ggml is not None:
            return self.product_ggml(x_TD, self.norm)
        return self._norm_linear(x_TD, self.norm.weight, self.norm.eps, *self.tensors())


class GateUp(Weights):
    """silu(gate n) * (up n) with n = norm(x); W has the rows of gate, then those of up."""

    def __init__(self, ctx: BuildContext, in_features: int, width: int, eps: float) -> None:
        super().__init__(ctx, in_features, 2 * width)
        self.norm = NormWeight(ctx, in_features, eps)
        self._gate_up: Callable[..., Tensor]
        if self.is_quantized:
            self._act = ctx.op(SILU_AND_MUL, SiluAndMulDims(I=width))
        if self.fp8 is not None:
            self._gate_up = ctx.op(NORM_LINEAR_FP8, self.fp8)
        elif self.ggml is None:
            self._gate_up = ctx.op(NORM_SWIGLU, NormSwigluDims(D=in_features, I=width, norm_fp32=ctx.norm_fp32))

    def forward(self, x_TD: Tensor) -> Tensor:
        if self.ggml is not None:
            return self._act(self.product_ggml(x_TD, self.norm))
        y_TX = self._gate_up(x_TD, self.norm.weight, self.norm.eps, *self.tensors())
        return self._act(y_TX) if self.is_quantized else y_TX


class LinearAdd(Weights):
    """y = residual + x W^T, summed over ranks: `in_features` is this rank's share. A norm that comes next of y may be
    computed where that is summed."""

    def __init__(self, ctx: BuildContext, in_features: int, out_features: int) -> None:
        super().__init__(ctx, in_features, out_features)
        self.mesh = ctx.mesh
        self._linear: Callable[..., Tensor]
        self._linear_add: Callable[..., Tensor]
        self._linear_reduce_add: LinearReduceAdd
        self._reduce_add: AllReduceAdd | None = None
        ranks, mapped = ctx.mesh.tp_size, ctx.mesh.mapped
        one_rank = ranks == 1
        if self.ggml is not None and one_rank:
            self._linear_add = lambda x_TD, _, residual_TO: self.product_ggml(x_TD, residual_TO=residual_TO)
        elif self.ggml is not None:
            self._linear = lambda x_TD, *_: self.product_ggml(x_TD)
        elif self.fp8 is not None and not one_rank:
            self._linear = ctx.op(LINEAR_FP8, self.fp8)
        elif self.fp8 is not None:
            self._linear_add = ctx.op(LINEAR_ADD_FP8, self.fp8)
        elif one_rank:
            self._linear_add = ctx.op(LINEAR_ADD, LinearDims(D=in_features, O=out_features))
        else:
            dims = LinearReduceDims(D=in_features, O=out_features, ranks=ranks, mapped=mapped)
            self._linear_reduce_add = ctx.op(LINEAR_REDUCE_ADD, dims)
        if not one_rank and (self.ggml is not None or self.fp8 is not None):
            self._reduce_add = ctx.op(ALL_REDUCE_ADD, AllReduceAddDims(D=out_features, ranks=ranks, mapped=mapped))

    def forward(self, x_TD: Tensor, residual_TO: Tensor, next_norm: NextNorm | None = None) -> Tensor:
        if self.mesh.tp_size == 1:
            return self._linear_add(x_TD, *self.tensors(), residual_TO)
        if self._reduce_add is None:
            return self._linear_reduce_add(x_TD, self.weight, residual_TO, self.mesh, next_norm=next_norm)
        y_TO = self._linear(x_TD, *self.tensors())
        return self._reduce_add(residual_TO, y_TO, self.mesh, next_norm=next_norm)

    def of_parts(self, parts: Sequence[Tensor], residual_TO: Tensor, next_norm: NextNorm | None = None) -> Tensor:
        """`forward` of the rows of all parts in order, without the copy that puts them into one tensor.

        The residual may be overwritten. Rows that decode take the path they take where nothing else runs beside them.
        """
        if len(parts) == 1 or self.mesh.tp_size > 1:  # one sum over ranks, not one per part
            y_TO: Tensor = self(parts[0] if len(parts) == 1 else torch.cat(list(parts)), residual_TO, next_norm)
            return y_TO
        for x_TD, rows_TO in zip(parts, residual_TO.split([len(part) for part in parts]), strict=True):
            rows_TO.copy_(self(x_TD, rows_TO))  # nothing to copy where the op wrote in place
        return residual_TO


class VocabEmbedding(nn.Module):
    """Rows of the vocabulary split evenly over ranks."""

    def __init__(self, ctx: BuildContext, vocab_size: int, width: int) -> None:
        super().__init__()
        self.mesh = ctx.mesh
        self.rows = -(-vocab_size // ctx.mesh.tp_size)
        self.weight = ctx.stored("weight", (self.rows, width))["weight"]
        planned = ctx.planned("weight")
        self._over_ranks: Embedding | None = None
        if ctx.mesh.tp_size > 1 and planned is None:
            dims = AllReduceAddDims(D=width, ranks=ctx.mesh.tp_size, mapped=ctx.mesh.mapped)
            self._over_ranks = ctx.op(EMBEDDING, dims)
        else:
            scheme = PLAIN if planned is None else planned.scheme
            self._vocab_rows = ctx.op(VOCAB_ROWS, VocabRowsDims(D=width, scheme=scheme.name))

    def forward(self, ids_T: Tensor) -> Tensor:
        if self._over_ranks is not None:
            return self._over_ranks(ids_T, self.weight, self.mesh)
        if self.mesh.tp_size == 1:
            return self._vocab_rows(ids_T, self.weight)
        local_T = ids_T - self.mesh.tp_rank * self.rows
        here_T = (local_T >= 0) & (local_T < self.rows)
        x_TD = self._vocab_rows(torch.where(here_T, local_T, 0), self.weight)
        return self.mesh.all_reduce(torch.where(here_T[:, None], x_TD, 0))


class VocabHead(NormLinear):
    """Hidden states, through the last norm, to logits [R, vocab_size] in the model's dtype, gathered from all ranks if
    that is wanted; otherwise they are this rank's [R, ceil(vocab_size / ranks)]."""

    def __init__(self, ctx: BuildContext, vocab_size: int, width: int, eps: float) -> None:
        super().__init__(ctx, width, [-(-vocab_size // ctx.mesh.tp_size)], eps)
        self.mesh = ctx.mesh
        self.vocab_size = vocab_size
        self._gather: AllGather | None = None
        if ctx.mesh.tp_size > 1:
            row_bytes = -(-vocab_size // ctx.mesh.tp_size) * ctx.dtype.itemsize
            dims = AllGatherDims(row_bytes=row_bytes, ranks=ctx.mesh.tp_size, mapped=ctx.mesh.mapped)
            self._gather = ctx.op(ALL_GATHER, dims)

    def forward(self, x_RD: Tensor, normed: Normed | None = None, /, *, gathers: bool = True) -> Tensor:
        logits_RV = super().forward(x_RD, normed)
        return self.gathered(logits_RV) if gathers else logits_RV

    def gathered(self, logits_RV: Tensor) -> Tensor:
        """All ranks' logits [R, vocab_size], given this rank's."""
        return logits_RV if self._gather is None else self._gather(logits_RV, self.mesh)[:, : self.vocab_size]


class HeadInSteps:
    """A VocabHead for callers that also want what is behind its norm. No module: the weights stay the head's."""

    def __init__(self, ctx: BuildContext, head: VocabHead) -> None:
        self._head = head
        rows, width = head.weight.shape
        self._norm = ctx.op(RMS_NORM, RmsNormDims(D=width))
        self._linear = ctx.op(LINEAR, LinearDims(D=width, O=rows))

    def hidden(self, x_TD: Tensor) -> Tensor:
        """norm(x) [T, D]."""
        return self._norm(x_TD, self._head.norm.weight, self._head.norm.eps)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """[R, vocab_size] of rows behind the norm."""
        return self._head.gathered(self._linear(hidden_RD, self._head.weight))
