"""Random sequences of gated attention over blocks, and the layer's equations in float64, one query after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class GqaShape:
    H: int  # query heads
    G: int  # key heads
    K: int
    R: int  # dims that are rotated
    S: int  # tokens in a block

    @property
    def columns(self) -> int:
        """Of a projection [q, gate per head | k | v]."""
        return 2 * (self.H + self.G) * self.K


SHAPES = [
    GqaShape(6, 2, 24, 8, 7),
    GqaShape(4, 4, 16, 16, 1),
    GqaShape(5, 1, 32, 2, 16),
    GqaShape(8, 2, 32, 20, 16),
]


class GqaCase:
    """Sequences of `cached` tokens and then `new` ones, in shuffled blocks. Block 0 is a sink; what is no sequence's
    row is NaN or inf. Keys and values of cached tokens are there; "gqa_prepare" writes the new ones'."""

    def __init__(
        self,
        shape: GqaShape,
        cached: list[int],
        new: list[int],
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        *,
        seed: int = 0,
        spread: float = 1.0,
        scale: float = 1.0,
        first_position: int = 0,
    ) -> None:
        rng = torch.Generator().manual_seed(seed + sum(cached) + 7 * sum(new))
        self.shape, self.cached, self.new, self.dtype, self.scale = shape, cached, new, dtype, scale
        G, K, R, S = shape.G, shape.K, shape.R, shape.S
        self.eps, self.offsets = 1e-6, list(accumulate(new, initial=0))
        totals = [a + b for a, b in zip(cached, new, strict=True)]
        self.q_norm, self.k_norm = (spread * (1 + torch.randn(K, generator=rng) / 4) for _ in range(2))
        self.frequencies = (1e7 ** -(torch.arange(0, R, 2).double() / R)).float()
        self.rows_of = [torch.randn(n, shape.columns, generator=rng).to(dtype) for n in totals]
        self.positions_of = [torch.arange(n) + first_position for n in totals]
        N = max([1, *(-(-n // S) for n in totals)]) + 1
        numbers = (torch.randperm(len(new) * N, generator=rng) + 1).view(len(new), N)
        keys = torch.full((len(new) * N + 1, S, G, K), torch.nan)
        keys[:, 1::2] = torch.inf
        values = keys.clone()
        rows = []
        for numbered, cached_n, n, x, at in zip(numbers, cached, totals, self.rows_of, self.positions_of, strict=True):
            tokens = torch.arange(n)
            row = numbered[tokens // S] * S + tokens % S
            _, _, k, v = self.parts(x, at)
            keys.view(-1, G, K)[row[:cached_n]] = k[:cached_n].float()
            values.view(-1, G, K)[row[:cached_n]] = v[:cached_n].float()
            rows.append(row[cached_n:])
        self.keys, self.values = keys.to(device, dtype), values.to(device, dtype)
        self.tables = numbers.int().to(device)
        self.rows = torch.cat(rows).to(device)
        self.proj = torch.cat([x[n:] for x, n in zip(self.rows_of, cached, strict=True)]).to(device)
        self.positions = torch.cat([x[n:] for x, n in zip(self.positions_of, cached, strict=True)]).to(device)
        self.device = device

    def parts(self, x_TX: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(q_THK, gate_THK, k_TGK, v_TGK) in float64, normed and rotated."""
        s, T = self.shape, len(x_TX)
        heads = x_TX[:, : 2 * s.H * s.K].double().reshape(T, s.H, 2 * s.K)
        q, gate = heads[..., : s.K], heads[..., s.K :]
        k, v = x_TX[:, 2 * s.H * s.K :].double().reshape(T, 2, s.G, s.K).unbind(1)
        angles = (positions_T[:, None].float() * self.frequencies).double()  # the contract says fp32
        turn = torch.polar(torch.full_like(angles, self.scale), angles)[:, None]

        def prepared(x: Tensor, weight: Tensor) -> Tensor:
            x = x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * weight.double()
            half = s.R // 2
            turned = torch.complex(x[..., :half], x[..., half : s.R]) * turn
            return torch.cat((turned.real, turned.imag, x[..., s.R :]), dim=-1)

        return prepared(q, self.q_norm), gate, prepared(k, self.k_norm), v

    def truth(self) -> tuple[Tensor, Tensor]:
        """(q_THK, o_TO) of the new tokens in float64."""
        s, queries, outputs = self.shape, [], []
        for x, at, cached in zip(self.rows_of, self.positions_of, self.cached, strict=True):
            q, gate, k, v = self.parts(x, at)
            queries.append(q[cached:])
            k_HTK, v_HTK = (y.repeat_interleave(s.H // s.G, 1).transpose(0, 1) for y in (k, v))
            for t in range(cached, len(x)):
                p_HT = (k_HTK[:, : t + 1] @ q[t, :, :, None] / s.K**0.5)[..., 0].softmax(-1)
                o_HK = (p_HT[:, None] @ v_HTK[:, : t + 1])[:, 0] / (1 + (-gate[t]).exp())
                outputs.append(o_HK.flatten())
        return torch.cat(queries), torch.stack(outputs) if outputs else torch.empty(0, s.H * s.K, dtype=torch.float64)

    def prepare(self, op: Callable[..., Tensor]) -> Tensor:
        """q_THK; keys and values of the new tokens are written."""
        return op(
            self.proj,
            q_norm_weight_K=self.q_norm.to(self.device),
            k_norm_weight_K=self.k_norm.to(self.device),
            eps=self.eps,
            frequencies_F=self.frequencies.to(self.device),
            rope_scale=self.scale,
            positions_T=self.positions,
            keys_MSGK=self.keys,
            values_MSGK=self.values,
            block_rows_T=self.rows,
        )

    @property
    def blocks(self) -> dict[str, Any]:
        return dict(keys_MSGK=self.keys, values_MSGK=self.values, block_tables_BN=self.tables)

    def decode(self, op: Callable[..., Tensor], q_THK: Tensor) -> Tensor:
        """o_BO; every sequence has one new token."""
        lens = torch.tensor([n + 1 for n in self.cached], dtype=torch.int32, device=self.device)
        return op(q_THK, self.proj, **self.blocks, context_lens_B=lens)

    def mix(self, op: Callable[..., Tensor], padding: int = 0) -> Tensor:
        """o_BO of "gqa_mixer_decode", of rows but those of `padding`, which name the sink."""
        lens = [n + 1 for n in self.cached] + [1] * padding
        zeros = dict(dtype=torch.int64, device=self.device)
        out = op(
            torch.cat((self.proj, self.proj[:1].expand(padding, -1))),
            q_norm_weight_K=self.q_norm.to(self.device),
            k_norm_weight_K=self.k_norm.to(self.device),
            eps=self.eps,
            frequencies_F=self.frequencies.to(self.device),
            rope_scale=self.scale,
            positions_B=torch.cat((self.positions, torch.zeros(padding, **zeros))),
            keys_MSGK=self.keys,
            values_MSGK=self.values,
            block_rows_B=torch.cat((self.rows, torch.zeros(padding, **zeros))),
            block_tables_BN=torch.cat((self.tables, self.tables.new_zeros(padding, self.tables.shape[1]))),
            context_lens_B=torch.tensor(lens, dtype=torch.int32, device=self.device),
        )
        assert out.isfinite().all()
        return out[: len(self.cached)]

    def check_mix(self, op: Callable[..., Tensor], tolerance: float, padding: int = 0) -> None:
        """Holds results, the rows that are written and those that are not."""
        found: list[Tensor] = []

        def prepared(*args: Any, **named: Any) -> Tensor:
            found.append(self.mix(op, padding))
            return self.truth()[0].to(self.device, self.dtype)

        sink = [x[0].clone() for x in (self.keys, self.values)]
        self.check_prepare(prepared, tolerance, sink=sink if padding else None)
        assert_near(found[0], self.truth()[1], tolerance)

    def prefill(self, op: Callable[..., Tensor], q_THK: Tensor) -> Tensor:
        return op(q_THK, self.proj, **self.blocks, starts=self.cached, offsets=self.offsets)

    def check_prepare(self, op: Callable[..., Tensor], tolerance: float, sink: list[Tensor] | None = None) -> Tensor:
        """Holds the queries, the rows that are written and those that are not; returns q_THK. `sink` is put back into
        the first block of keys and values, which may have been written."""
        before = [x.clone() for x in (self.keys, self.values)]
        q = self.prepare(op)
        for x, rows in zip((self.keys, self.values), sink or (), strict=False):
            x[0] = rows
        assert q.is_contiguous()
        assert q.dtype == self.dtype
        assert_near(q, self.truth()[0], tolerance)
        G, K = self.shape.G, self.shape.K
        parts = [
            [p[n:] for p in self.parts(x, at)[2:]]
            for x, at, n in zip(self.rows_of, self.positions_of, self.cached, strict=True)
        ]
        written = torch.zeros(self.keys.shape[0] * self.shape.S, dtype=torch.bool)
        written[self.rows.cpu()] = True
        for i, (after, old) in enumerate(zip((self.keys, self.values), before, strict=True)):
            after, old = (x.view(-1, G, K).cpu() for x in (after, old))
            assert_near(after[self.rows.cpu()], torch.cat([p[i] for p in parts]), tolerance)
            bits = torch.int32 if self.dtype == torch.float32 else torch.int16
            assert torch.equal(after[~written].view(bits), old[~written].view(bits))
        return q


def assert_near(out: Tensor, truth: Tensor, tolerance: float) -> None:
    assert out.isfinite().all()
    torch.testing.assert_close(out.cpu().double(), truth, rtol=tolerance, atol=tolerance)
