"""Gated DeltaNet's decode mixer and output projection with float8 between them, on the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.ops.fp8_linear_case import draw
from tests.ops.gdn_case import DecodeCase, GdnShape
from tests.ops.moe_case import rmse_ratio
from tests.ops.replays import check_replays
from tests.ops.test_gpu_linear_fp8 import resolved
from thalweg.ops.delta.gdn import GdnDims
from thalweg.ops.delta.gdn_decode_add import GDN_DECODE_ADD, GdnDecodeAdd, GdnDecodeAddDims
from thalweg.ops.linear.fp8 import NORM_LINEAR_FP8, Fp8LinearDims
from thalweg.ops.registry import Resolver, Where

pytestmark = pytest.mark.gpu


def decode_add(shape: GdnShape, O: int) -> GdnDecodeAdd:
    dims = GdnDims(G=shape.G, H=shape.H, K=shape.K, V=shape.V, W=shape.W)
    linear = Fp8LinearDims(D=shape.H * shape.V, O=O)
    resolver = Resolver({"gdn_decode_add": "cuda"})
    return resolver.resolve(GDN_DECODE_ADD, Where("cuda", "bfloat16"), GdnDecodeAddDims(mixer=dims, linear=linear))


def not_apart(proj_BX: Tensor, residual_BD: Tensor) -> Tensor:
    pytest.fail("computed by the two ops")


@pytest.mark.parametrize("T", [17, 32, 33, 64, 100, 128])
@pytest.mark.parametrize(("G", "H", "O"), [(16, 32, 2048), (4, 12, 1536), (1, 2, 264)])
def test_it_is_the_mixer_and_the_projection(G: int, H: int, O: int, T: int) -> None:
    shape = GdnShape(G, H, 128, 128)
    case = DecodeCase(shape, T, steps=2, dtype=torch.bfloat16, device="cuda")
    weight = draw(T, H * 128, O, torch.bfloat16, device="cuda")
    before = case.state.clone()
    op = decode_add(shape, O)

    def run(proj_BX: Tensor, **inputs: object) -> Tensor:
        matrix = dict(q_OD=weight.q_OD, scale_OB=weight.scale_OB)
        return op(proj_BX, weight.residual_TO, not_apart, **matrix, **inputs)

    y = case.run(run)
    assert not torch.equal(case.state, before)
    case = DecodeCase(shape, T, steps=2, dtype=torch.bfloat16, device="cuda")
    plain = weight.q_OD.double() * weight.scale_OB.double().repeat_interleave(128, 1)
    for b, slot in enumerate(case.slots.tolist()):
        o, _, _ = case.truth(case.proj[:, b], case.conv_state[slot], case.state[slot])
        # Each row by what the product adds: the residual is exact.
        added = y[:, b].double() - weight.residual_TO[b].double()
        assert rmse_ratio(added, o @ plain.T) < (0.05 if O >= 1000 else 0.08)


@pytest.mark.parametrize("T", [17, 40, 128])
def test_chained_in_a_graph(T: int) -> None:
    """Input projection with a rest, mixer, output projection: each may start before the one ahead has ended."""
    shape, D = GdnShape(4, 8, 128, 128), 1024
    ins = [draw(T, D, shape.columns - 16, torch.bfloat16, rest=16, device="cuda", seed=i) for i in range(4)]
    backs = [draw(T, 8 * 128, D, torch.bfloat16, device="cuda", seed=i) for i in range(4)]
    case = DecodeCase(shape, T, steps=1, dtype=torch.bfloat16, device="cuda")
    state, conv = case.state.clone(), case.conv_state.clone()
    norm_linear = resolved(NORM_LINEAR_FP8, "matrix", D, shape.columns - 16, 16)
    op = decode_add(shape, D)
    inputs = dict(conv_weight_CW=case.conv_weight, conv_state_NWC=case.conv_state, A_log_H=case.A_log)
    inputs |= dict(dt_bias_H=case.dt_bias, norm_weight_V=case.norm_weight, state_NHVK=case.state, slots_B=case.slots)

    def chain(wait: Callable[[], None]) -> Tensor:
        case.state.copy_(state)
        case.conv_state.copy_(conv)
        x = ins[0].x_TD.clone()
        for i, back in zip(ins, backs, strict=True):
            proj = norm_linear(x, i.norm_D, 1e-5, i.q_OD, i.scale_OB, i.rest_RD)
            wait()
            x = op(proj, x, not_apart, q_OD=back.q_OD, scale_OB=back.scale_OB, eps=1e-6, **inputs)
            wait()
        return x

    check_replays(chain)
