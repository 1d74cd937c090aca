"""Random arguments of Gated DeltaNet's ops, and the equations in float64, one token after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class GdnShape:
    G: int  # key heads
    H: int  # value heads
    K: int
    V: int
    W: int = 3

    @property
    def channels(self) -> int:
        return 2 * self.G * self.K + self.H * self.V

    @property
    def columns(self) -> int:
        """Of a projection [q | k | v | z | b | a]."""
        return self.channels + self.H * self.V + 2 * self.H


SHAPES = [GdnShape(2, 6, 16, 24), GdnShape(1, 4, 32, 16), GdnShape(3, 3, 24, 32), GdnShape(2, 4, 16, 16, 1)]


def rule(
    q_TGK: Tensor, k_TGK: Tensor, v_THV: Tensor, g_TH: Tensor, beta_TH: Tensor, S_HVK: Tensor
) -> tuple[Tensor, Tensor]:
    """(o_THV, S_HVK) of one sequence; value head h takes the key head h // (H / G)."""
    ratio, K = v_THV.shape[1] // q_TGK.shape[1], q_TGK.shape[2]
    q, k = (x.double().repeat_interleave(ratio, 1) for x in (q_TGK, k_TGK))
    q = q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt() * K**-0.5
    k = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    v, decay, beta = v_THV.double(), g_TH.double().exp(), beta_TH.double()
    o, S = torch.empty_like(v), S_HVK.double()
    for t in range(len(v)):
        S = S * decay[t, :, None, None]
        u_HV = beta[t, :, None] * (v[t] - torch.einsum("hvk,hk->hv", S, k[t]))
        S = S + torch.einsum("hv,hk->hvk", u_HV, k[t])
        o[t] = torch.einsum("hvk,hk->hv", S, q[t])
    return o, S


def gates(a_TH: Tensor, b_TH: Tensor, A_log_H: Tensor, dt_bias_H: Tensor) -> tuple[Tensor, Tensor]:
    """(g, beta) in float64."""
    x = a_TH.double() + dt_bias_H.double()
    softplus = x.clamp(min=0) + (-x.abs()).exp().log1p()
    return -A_log_H.double().exp() * softplus, 1 / (1 + (-b_TH.double()).exp())


def distance(out: Tensor, truth: Tensor) -> float:
    """||out - truth|| / ||truth||; NaN anywhere gives NaN, which is under no tolerance."""
    return float((out.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30))


@dataclass
class PrefillCase:
    """Sequences of `lengths` in shuffled slots; slots that no sequence has hold NaN. Inputs are cut out of wider rows,
    as the layer cuts them."""

    shape: GdnShape
    lengths: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    fresh: bool = False
    gate: float | None = None  # the decay's inputs are this far from 0, on either side
    inputs: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        s, rng = self.shape, torch.Generator().manual_seed(sum(self.lengths))
        self.offsets, B = list(accumulate(self.lengths, initial=0)), len(self.lengths)
        T = self.offsets[-1]
        x = torch.randn(T, s.channels + 2 * s.H, generator=rng)
        if self.gate is not None:
            x[:, -s.H :] = self.gate * x[:, -s.H :].sign()
        parts = x.to(self.device, self.dtype).split([s.G * s.K, s.G * s.K, s.H * s.V, s.H, s.H], dim=-1)
        q, k, v, b, a = parts
        self.inputs = {
            "q_TGK": q.unflatten(-1, (s.G, s.K)),
            "k_TGK": k.unflatten(-1, (s.G, s.K)),
            "v_THV": v.unflatten(-1, (s.H, s.V)),
            "a_TH": a,
            "b_TH": b,
        }
        self.A_log, self.dt_bias = (torch.randn(s.H, generator=rng).to(self.device) for _ in range(2))
        slots = torch.randperm(2 * B, generator=rng)[:B]
        state = torch.full((2 * B, s.H, s.V, s.K), torch.nan)
        state[slots] = 0.0 if self.fresh else torch.randn(B, s.H, s.V, s.K, generator=rng)
        self.slots, self.state = slots.to(self.device), state.to(self.device)
        self.before = self.state.clone()

    def run(self, op: Callable[..., Tensor]) -> Tensor:
        """What `op` gives; it moves the states on."""
        return op(
            *self.inputs.values(),
            A_log_H=self.A_log,
            dt_bias_H=self.dt_bias,
            state_NHVK=self.state,
            slots_B=self.slots,
            offsets=self.offsets,
        )

    def check(self, o_THV: Tensor, tolerance: float) -> None:
        x = self.inputs
        assert o_THV.dtype == self.dtype
        g, beta = gates(x["a_TH"], x["b_TH"], self.A_log, self.dt_bias)
        for (first, last), slot in zip(pairwise(self.offsets), self.slots.tolist(), strict=True):
            after, before = self.state[slot], self.before[slot]
            if first == last:
                assert torch.equal(after, before)
                continue
            span = slice(first, last)
            o, S = rule(x["q_TGK"][span], x["k_TGK"][span], x["v_THV"][span], g[span], beta[span], before)
            assert distance(o_THV[span], o) < tolerance, last - first
            assert distance(after, S) < tolerance, last - first
        others = [n for n in range(len(self.state)) if n not in self.slots.tolist()]
        assert self.state[others].isnan().all()


@dataclass
class DecodeCase:
    """`steps` tokens of B sequences with slots 1 to B, shuffled, through the whole mixer. Slot 0 is a sink, the last
    slot belongs to nobody."""

    shape: GdnShape
    B: int
    steps: int = 4
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    state_dtype: torch.dtype = torch.float32
    eps: float = 1e-6

    def __post_init__(self) -> None:
        s, rng = self.shape, torch.Generator().manual_seed(self.B)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng)

        self.proj = randn(self.steps, self.B, s.columns + 8).to(self.device, self.dtype)[..., : s.columns]
        self.conv_weight = (randn(s.channels, s.W + 1) * 0.5).to(self.device, self.dtype)
        self.conv_state = randn(self.B + 2, s.W, s.channels).to(self.device, self.dtype)
        self.A_log, self.dt_bias = randn(s.H).to(self.device), randn(s.H).to(self.device)
        self.norm_weight = (1 + 0.1 * randn(s.V)).to(self.device)
        self.state = randn(self.B + 2, s.H, s.V, s.K).to(self.device, self.state_dtype)
        self.slots = (torch.randperm(self.B, generator=rng) + 1).to(self.device)

    def run(self, op: Callable[..., Tensor], *, padding: int = 0) -> Tensor:
        """[steps, B, H * V]; `padding` rows of NaN that name the sink follow in every step. Between two
        steps another kernel runs (the concatenation), as the contract asks."""
        rows = torch.full((padding, self.shape.columns), torch.nan, dtype=self.dtype, device=self.device)
        slots = torch.cat((self.slots, torch.zeros(padding, dtype=torch.long, device=self.device)))
        outputs = []
        for proj in self.proj:
            out = op(
                torch.cat((proj, rows)),
                conv_weight_CW=self.conv_weight,
                conv_state_NWC=self.conv_state,
                A_log_H=self.A_log,
                dt_bias_H=self.dt_bias,
                norm_weight_V=self.norm_weight,
                eps=self.eps,
                state_NHVK=self.state,
                slots_B=slots,
            )
            assert out.dtype == self.dtype
            outputs.append(out[: self.B])
        return torch.stack(outputs)

    def check(self, op: Callable[..., Tensor], tolerance: float, *, padding: int = 0) -> None:
        before = {"conv": self.conv_state.clone(), "state": self.state.clone()}
        out = self.run(op, padding=padding)
        for b, slot in enumerate(self.slots.tolist()):
            o, window, S = self.truth(self.proj[:, b], before["conv"][slot], before["state"][slot])
            assert distance(out[:, b], o) < tolerance
            assert distance(self.state[slot], S) < tolerance
            assert torch.equal(self.conv_state[slot].double(), window)
        untouched = [self.B + 1] if padding else [0, self.B + 1]
        assert torch.equal(self.state[untouched], before["state"][untouched])
        assert torch.equal(self.conv_state[untouched], before["conv"][untouched])

    def truth(self, proj_TX: Tensor, window_WC: Tensor, S_HVK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(o_TO, window_WC, S_HVK) of one sequence in float64."""
        s, T = self.shape, len(proj_TX)
        x, z, b, a = proj_TX.double().split([s.channels, s.H * s.V, s.H, s.H], dim=-1)
        seen = torch.cat((window_WC.double(), x))
        taps = self.conv_weight.double()
        y = torch.stack([(seen[t : t + s.W + 1] * taps.t()).sum(0) for t in range(T)])
        y = y / (1 + (-y).exp())
        q, k, v = y.split([s.G * s.K, s.G * s.K, s.H * s.V], dim=-1)
        g, beta = gates(a, b, self.A_log, self.dt_bias)
        o, S = rule(q.view(T, s.G, s.K), k.view(T, s.G, s.K), v.view(T, s.H, s.V), g, beta, S_HVK)
        o = o / (o.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.norm_weight.double()
        z = z.view(T, s.H, s.V)
        return (o * z / (1 + (-z).exp())).reshape(T, s.H * s.V), seen[T:], S
