"""Random inputs of kda_mixer_decode, and its result in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class KdaMixerCase:
    """Slot 0 is a sink; sequences have slots 1 to B, shuffled; the last slot belongs to nobody."""

    proj: Tensor
    conv_weight: Tensor
    conv_state: Tensor
    w_up: Tensor
    A_log: Tensor
    dt_bias: Tensor
    norm_weight: Tensor
    eps: float
    state: Tensor
    slots: Tensor

    def run(self, op: Callable[..., Tensor]) -> Tensor:
        """What `op` gives; it moves these states on."""
        return op(
            self.proj,
            conv_weight_CW=self.conv_weight,
            conv_state_NWC=self.conv_state,
            w_up_2OR=self.w_up,
            A_log_H=self.A_log,
            dt_bias_HK=self.dt_bias,
            norm_weight_V=self.norm_weight,
            eps=self.eps,
            state_NHVK=self.state,
            slots_B=self.slots,
        )

    def copy(self) -> KdaMixerCase:
        return replace(self, conv_state=self.conv_state.clone(), state=self.state.clone())


def kda_mixer_case(
    B: int, H: int, K: int, R: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0, gate: float = 1.0
) -> KdaMixerCase:
    """`gate` is the magnitude of the decay's input."""
    rng = torch.Generator(device).manual_seed(seed)
    C, N = 3 * H * K, B + 2

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device=device)

    w_up = randn(2, H * K, R) * R**-0.5
    w_up[0] *= gate
    return KdaMixerCase(
        proj=randn(B, C + H + 2 * R).to(dtype),
        conv_weight=(randn(C, 4) * 0.5).to(dtype),
        conv_state=randn(N, 3, C).to(dtype),
        w_up=w_up.to(dtype),
        A_log=randn(H),
        dt_bias=randn(H, K),
        norm_weight=(1 + 0.1 * randn(K)).to(dtype),
        eps=1e-5,
        state=randn(N, H, K, K) * 0.1,
        slots=torch.randperm(B, generator=rng, device=device) + 1,
    )


def kda_mixer_fp64(case: KdaMixerCase) -> tuple[Tensor, Tensor, Tensor]:
    """(o_BO, state_BHVK, conv_state_BWC) after one step of the sequences, in their order."""
    (H, K), R = case.dt_bias.shape, case.w_up.shape[-1]
    qkv, beta, low = case.proj.double().split([3 * H * K, H, 2 * R], dim=-1)
    window = torch.cat((case.conv_state[case.slots].double(), qkv[:, None]), dim=1)
    q, k, v = F.silu((window * case.conv_weight.double().t()).sum(1)).unflatten(-1, (3, H, K)).unbind(1)
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    f, gate = ((low[:, i * R : (i + 1) * R] @ case.w_up[i].double().t()).unflatten(-1, (H, K)) for i in (0, 1))
    g = -case.A_log.double().exp()[:, None] * F.softplus(f + case.dt_bias.double())
    S = case.state[case.slots].double() * g.exp().unsqueeze(-2)
    u = beta.sigmoid()[..., None] * (v - (S @ k[..., None])[..., 0])
    S = S + u[..., None] * k.unsqueeze(-2)
    o = (S @ q[..., None])[..., 0] * K**-0.5
    o = o * (o.square().mean(-1, keepdim=True) + case.eps).rsqrt() * case.norm_weight.double() * gate.sigmoid()
    return o.flatten(1), S, window[:, 1:]


def error(out: Tensor, truth: Tensor) -> float:
    """||out - truth|| / ||truth||; NaN anywhere gives NaN, which is under no tolerance."""
    return float((out.double() - truth).norm() / truth.norm())


def check_kda_mixer(op: Callable[..., Tensor], case: KdaMixerCase, tolerance: float, state_tolerance: float) -> None:
    o, state, conv_state = kda_mixer_fp64(case)
    after = case.copy()
    out = after.run(op)
    assert out.dtype == case.proj.dtype
    assert error(out, o) < tolerance
    assert error(after.state[case.slots], state) < state_tolerance
    assert torch.equal(after.conv_state[case.slots].double(), conv_state)
    others = [n for n in range(len(case.state)) if n not in case.slots.tolist()]
    assert torch.equal(after.state[others], case.state[others])
    assert torch.equal(after.conv_state[others], case.conv_state[others])
