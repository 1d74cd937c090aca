"""The contract in plain torch."""

from __future__ import annotations

from torch import Tensor


def take(places_SRN: Tensor, turn: Tensor, last_tokens: Tensor, rows_RN: Tensor, token_ids: Tensor) -> None:
    n, now = len(token_ids), int(turn)
    rows_RN[:, :n] = places_SRN[now, :, :n]
    token_ids.copy_(last_tokens[rows_RN[0, :n]])
    turn.fill_((now + 1) % len(places_SRN))


def tell(ids: Tensor, slots: Tensor, turn: Tensor, last_tokens: Tensor, places_SN: Tensor) -> None:
    places_SN[int(turn) - 1, : len(ids)] = ids
    last_tokens[slots] = ids.clamp(min=0)
