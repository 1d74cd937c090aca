"""Op "mla_rope": rotary positions of multi-head latent attention, for queries and the shared part of the key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from thalweg.ops.attention.mla_rope import reference
from thalweg.ops.registry import Op, register


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaRopeDims:
    H: int
    K: int  # of a head's query, without the part that is rotated
    P: int  # that part


class MlaRope(Protocol):
    def __call__(
        self, q_THX: Tensor, shared_TP: Tensor, *, positions_T: Tensor, frequencies_F: Tensor, rope_scale: float
    ) -> None:
        """Turn the last P of each head's X = K + P dims, and all of the shared key part, in place.

        The pairs (2 i, 2 i + 1) turn by positions_T (int64) * frequencies_F[i] (fp32 [P / 2]); cosines and sines, in
        fp32, are multiplied with rope_scale. Results are rounded once to the tensors' dtype. Both have a unit last
        stride and may have any other.
        """


MLA_ROPE: Op[MlaRopeDims, MlaRope] = Op("mla_rope", MlaRopeDims)

register(MLA_ROPE, "reference", lambda *_: reference.mla_rope)
