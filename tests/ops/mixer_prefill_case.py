"""Random arguments of the mixers' prefill ops, and the equations in float64, one token after another."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.prefill_case import Boundary, check_boundaries, ratio
from thalweg.ops.delta.kda.reference import recurrent_kda

EPS = 1e-5


class MixerPrefillCase:
    """Sequences of `lengths` in shuffled slots; slots that no sequence has hold NaN. With G key heads it is Gated
    DeltaNet, without KDA. `gate`: the decay's inputs are this far from 0, on either side; `rate`: log of what they are
    multiplied by."""

    def __init__(
        self,
        lengths: tuple[int, ...],
        H: int,
        K: int = 128,
        *,
        G: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cpu",
        gate: float | None = None,
        rate: float | None = None,
        fresh: bool = False,
        state_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        rng = torch.Generator().manual_seed(sum(lengths) + H + seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng)

        self.H, self.K, self.G, self.device = H, K, G or H, device
        self.offsets = list(accumulate(lengths, initial=0))
        T, B, self.C = self.offsets[-1], len(lengths), 2 * self.G * K + H * K
        f = randn(T, H) if G else randn(T, 2, H * K)
        if gate is not None:
            f = gate * f.sign()
        if G:  # [q, k, v | z | b | a], cut out of wider rows
            proj = torch.cat((randn(T, self.C + H * K + H), f, randn(T, 8)), dim=1)
            self.inputs = [proj.to(device, dtype)[:, :-8]]
        else:  # [q, k, v | beta | low-rank parts]
            self.inputs = [x.to(device, dtype) for x in (randn(T, self.C + H + 16), f)]
        self.weights: dict[str, Any] = {
            "conv_weight_CW": (randn(self.C, 4) * 0.5).to(device, dtype),
            "A_log_H": (randn(H) if rate is None else torch.full((H,), float(rate))).to(device),
            "dt_bias_H" if G else "dt_bias_HK": (randn(H) if G else randn(H, K)).to(device),
            "norm_weight_V": (1 + 0.1 * randn(K)).to(device, torch.float32 if G else dtype),
            "eps": EPS,
        }
        self.slots = torch.randperm(2 * B, generator=rng)[:B]
        state, conv = torch.full((2 * B, H, K, K), torch.nan), torch.full((2 * B, 3, self.C), torch.nan)
        state[self.slots] = 0.0 if fresh else randn(B, H, K, K)
        conv[self.slots] = 0.0 if fresh else randn(B, 3, self.C)
        self.slots, self.state, self.conv = self.slots.to(device), state.to(device, state_dtype), conv.to(device, dtype)
        self.before = self.state.clone(), self.conv.clone()

    def run(self, op: Callable[..., Tensor]) -> Tensor:
        """What `op` gives; it moves the states on."""
        where = {"state_NHVK": self.state, "conv_state_NWC": self.conv, "slots_B": self.slots, "offsets": self.offsets}
        return op(*self.inputs, **self.weights, **where)

    def check(self, o_TO: Tensor, tolerance: float, state_tolerance: float | None = None) -> None:
        """Against float64, each sequence by itself; nothing else may have changed."""
        assert o_TO.dtype == self.inputs[0].dtype
        for (first, last), slot in zip(pairwise(self.offsets), self.slots.tolist(), strict=True):
            S, window = self.before[0][slot], self.before[1][slot]
            if first == last:
                assert torch.equal(self.state[slot], S)
                assert torch.equal(self.conv[slot], window)
                continue
            o, S, window = self.truth(slice(first, last), S, window)
            found = float(ratio(o_TO[first:last], o)), float(ratio(self.state[slot], S))
            assert found[0] < tolerance, (last - first, found)
            assert found[1] < (state_tolerance or tolerance), (last - first, found)
            assert torch.equal(self.conv[slot].double(), window)
        others = [n for n in range(len(self.state)) if n not in self.slots.tolist()]
        assert self.state[others].isnan().all()
        assert self.conv[others].isnan().all()

    def truth(self, tokens: slice, S_HVK: Tensor, window_WC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(o_TO, S_HVK, window_WC) of one sequence in float64."""
        H, K, C, w = self.H, self.K, self.C, self.weights
        x = self.inputs[0][tokens].double()
        seen, taps = torch.cat((window_WC.double(), x[:, :C])), w["conv_weight_CW"].double()
        y = F.silu(torch.stack([(seen[t : t + 4] * taps.t()).sum(0) for t in range(len(x))]))
        q, k, v = (part.unflatten(-1, (-1, K)) for part in y.split([self.G * K, self.G * K, H * K], dim=-1))
        q, k = (part.repeat_interleave(H // self.G, 1) for part in (q, k))
        rate = w["A_log_H"].double().exp()
        if "dt_bias_H" in w:
            z, beta, a = x[:, C:].split([H * K, H, H], dim=-1)
            g, gate = (-rate * F.softplus(a + w["dt_bias_H"].double())).unsqueeze(-1).expand(-1, -1, K), F.silu(z)
        else:
            beta, (f, z) = x[:, C : C + H], self.inputs[1][tokens].double().unbind(1)
            g = -rate.unsqueeze(-1) * F.softplus(f.unflatten(-1, (H, K)) + w["dt_bias_HK"].double())
            gate = z.sigmoid()
        rows = [part.transpose(0, 1)[None] for part in (q, k, v, g, beta.sigmoid())]
        o, S = recurrent_kda(*rows, S_HVK.double().transpose(-1, -2)[None])
        o = o[0].transpose(0, 1)
        o = o * (o.square().mean(-1, keepdim=True) + EPS).rsqrt() * w["norm_weight_V"].double()
        return (o * gate.unflatten(-1, (H, K))).flatten(1), S[0].transpose(-1, -2), seen[-3:]


def mixer_boundaries(op: Callable[..., Tensor], device: str, H: int = 2, G: int | None = None) -> None:
    """That both states are written at boundaries, and runs that end there go on to the bit."""
    case = MixerPrefillCase((200, 128, 70), H, G=G, device=device)
    conv = torch.randn(9, 3, case.C).to(device, torch.bfloat16)
    convs: dict[int, Tensor] = {}

    def run(tokens: slice, slots: list[int], offsets: list[int], state: Tensor, boundaries: list[Boundary]) -> Tensor:
        own = convs.setdefault(id(state), conv.clone())  # the convolution's states go with the others'
        where = {"state_NHVK": state, "conv_state_NWC": own, "slots_B": torch.tensor(slots, device=device)}
        inputs = [x[tokens] for x in case.inputs]
        out = op(*inputs, **case.weights, **where, offsets=offsets, boundaries=boundaries)
        for b, n, slot in boundaries:
            seen = torch.cat((conv[slots[b]], inputs[0][offsets[b] : offsets[b] + n, : case.C]))
            assert torch.equal(own[slot], seen[-3:])
        return out

    check_boundaries(run, torch.randn(9, H, 128, 128).to(device))
