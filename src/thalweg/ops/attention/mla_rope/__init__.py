"""Op "mla_rope": rotary positions of multi-head latent attention, for the queries of prompts. Decode rotates where it
absorbs (op "mla_decode"), and the shared part of the key is rotated on its way to the cache (op "split_norms").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from thalweg.ops.attention.mla_rope import reference
from thalweg.ops.registry import Op, Refusal, Where, register
from thalweg.ops.toolchain.triton_support import why_not


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaRopeDims:
    H: int
    K: int  # of a head's query, without the part that is rotated
    P: int  # that part


class MlaRope(Protocol):
    def __call__(self, q_THX: Tensor, *, positions_T: Tensor, frequencies_F: Tensor, rope_scale: float) -> None:
        """Turn the last P of each head's X = K + P dims, in place.

        The pairs (2 i, 2 i + 1) turn by positions_T (int64) * frequencies_F[i] (fp32 [P / 2]); cosines and sines, in
        fp32, are multiplied with rope_scale. Results are rounded once to q's dtype. It has a unit last stride and may
        have any other. Implementations may read positions while the kernel ahead of them still runs, as op
        "mla_mixer_decode" may read lengths.
        """


MLA_ROPE: Op[MlaRopeDims, MlaRope] = Op("mla_rope", MlaRopeDims, rows="prefills")


def _triton(where: Where, dims: MlaRopeDims) -> MlaRope:
    from thalweg.ops.attention.mla_rope import triton

    return triton.mla_rope


def _triton_refuses(where: Where, dims: MlaRopeDims) -> Refusal:
    if dims.H * dims.P > 2**14:
        return f"needs at most {2**14} rotated values per token, not {dims.H * dims.P}"
    return why_not(where)


register(MLA_ROPE, "reference", lambda *_: reference.mla_rope, capturable=True)
register(MLA_ROPE, "triton", _triton, supports=_triton_refuses, priority=10, capturable=True)
