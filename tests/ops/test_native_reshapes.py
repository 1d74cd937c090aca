"""What einops would say where Kimi Delta Attention, Gated DeltaNet and gated attention reshape natively: the same bits,
over shapes, dtypes and inputs that are cut out of wider rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.gdn_case import SHAPES, DecodeCase, GdnShape, PrefillCase
from tests.ops.kda_mixer_case import kda_mixer_case
from thalweg.ops.attention.gqa.reference import gated, split_projection
from thalweg.ops.delta.conv1d.reference import conv1d_decode
from thalweg.ops.delta.gdn.reference import decay, gdn_mixer_decode, gdn_prefill
from thalweg.ops.delta.kda.reference import kda_decode, kda_gate, kda_prefill
from thalweg.ops.delta.kda_mixer.reference import kda_mixer_decode
from thalweg.ops.norm.reference import gated_rms_norm
from thalweg.ops.projection.reference import batched_projection

einops = pytest.importorskip("einops")
rearrange, repeat = einops.rearrange, einops.repeat

DTYPES = [torch.float32, torch.bfloat16]
TOKENS = (0, 1, 3, 17, 64)


def rows(T: int, columns: int, dtype: torch.dtype, contiguous: bool) -> Tensor:
    x = torch.randn(T, columns + 8, generator=torch.Generator().manual_seed(T)).to(dtype)[:, 8:]
    return x.contiguous() if contiguous else x


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("H", "K", "R"), [(4, 16, 8), (1, 128, 3), (32, 24, 24)])
def test_a_kda_layer(H: int, K: int, R: int, dtype: torch.dtype, contiguous: bool) -> None:
    """Call by call, as heads are cut out of projections and merged."""
    for T in TOKENS:
        x = rows(T, 3 * H * K + H + 2 * R, dtype, contiguous)
        qkv, _, low = x.split([3 * H * K, H, 2 * R], dim=-1)
        assert torch.equal(low.unflatten(-1, (2, R)), rearrange(low, "t (two r) -> t two r", two=2))
        for i, part in enumerate(qkv.unflatten(-1, (-1, K)).chunk(3, dim=1)):
            assert torch.equal(part, rearrange(qkv, "t (three h k) -> three t h k", three=3, k=K)[i])
        heads = qkv.unflatten(-1, (-1, K))
        assert torch.equal(heads, rearrange(qkv, "t (h k) -> t h k", k=K))
        for o in (heads, heads.transpose(0, 1).contiguous().transpose(0, 1)):
            assert torch.equal(o.flatten(1), rearrange(o, "t h k -> t (h k)"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "H", "K", "R"), [(1, 2, 16, 8), (5, 3, 24, 5), (0, 2, 16, 8)])
def test_kda_mixer_decode(B: int, H: int, K: int, R: int, dtype: torch.dtype) -> None:
    found, expected = kda_mixer_case(B, H, K, R, dtype), kda_mixer_case(B, H, K, R, dtype)
    c, C = expected, 3 * H * K
    qkv, beta, low = c.proj.split([C, H, 2 * R], dim=-1)
    up = batched_projection(rearrange(low, "b (two r) -> b two r", two=2), c.w_up)
    f, gate = rearrange(up, "b two (h k) -> two b h k", h=H)
    qkv = conv1d_decode(qkv, c.conv_state, c.slots, c.conv_weight)
    q, k, v = rearrange(qkv, "b (three h k) -> three b h k", three=3, h=H)
    g = kda_gate(f, c.A_log, c.dt_bias)
    o = kda_decode(q, k, v, g, beta.float().sigmoid(), c.state, c.slots)
    o = rearrange(gated_rms_norm(o, gate, c.norm_weight, c.eps), "b h v -> b (h v)")
    assert torch.equal(found.run(kda_mixer_decode), o)
    assert torch.equal(found.state, c.state)
    assert torch.equal(found.conv_state, c.conv_state)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gdn_mixer_decode(shape: GdnShape, dtype: torch.dtype) -> None:
    """Projections of the case are cut out of wider rows."""
    for B in (0, 1, 5):
        found, c = DecodeCase(shape, B, steps=1, dtype=dtype), DecodeCase(shape, B, steps=1, dtype=dtype)
        s, ratio = shape, shape.H // shape.G
        qkv, z, b, a = c.proj[0].split([s.channels, s.H * s.V, s.H, s.H], dim=-1)
        qkv = conv1d_decode(qkv, c.conv_state, c.slots, c.conv_weight)
        q, k, v = qkv.split([s.G * s.K, s.G * s.K, s.H * s.V], dim=-1)
        q, k = (repeat(rearrange(x, "b (g k) -> b g k", k=s.K), "b g k -> b (g r) k", r=ratio) for x in (q, k))
        v, z = (rearrange(x, "b (h v) -> b h v", v=s.V) for x in (v, z))
        g = repeat(decay(a, c.A_log, c.dt_bias), "b h -> b h k", k=s.K)
        o = kda_decode(q, k, v, g, b.float().sigmoid(), c.state, c.slots)
        o = rearrange(gated_rms_norm(o, z, c.norm_weight, c.eps, silu=True), "b h v -> b (h v)")
        assert torch.equal(found.run(gdn_mixer_decode)[0], o)
        assert torch.equal(found.state, c.state)
        assert torch.equal(found.conv_state, c.conv_state)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gdn_prefill(shape: GdnShape, dtype: torch.dtype, contiguous: bool) -> None:
    found, c = (PrefillCase(shape, (0, 1, 20, 40), dtype) for _ in range(2))
    if contiguous:
        for case in (found, c):
            case.inputs = {name: x.contiguous() for name, x in case.inputs.items()}
    q, k = (repeat(c.inputs[x], "t g k -> t (g r) k", r=shape.H // shape.G) for x in ("q_TGK", "k_TGK"))
    g = repeat(decay(c.inputs["a_TH"], c.A_log, c.dt_bias), "t h -> t h k", k=shape.K)
    state = dict(state_NHVK=c.state, slots_B=c.slots, offsets=c.offsets)
    o = kda_prefill(q, k, c.inputs["v_THV"], g, c.inputs["b_TH"].float().sigmoid(), **state)
    assert torch.equal(found.run(gdn_prefill), o)
    assert torch.equal(found.state.nan_to_num(7), c.state.nan_to_num(7))


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("H", "G", "K"), [(6, 2, 24), (4, 4, 16), (16, 2, 256), (5, 1, 3)])
def test_gated_attention(H: int, G: int, K: int, dtype: torch.dtype, contiguous: bool) -> None:
    for T in TOKENS:
        proj = rows(T, 2 * (H + G) * K, dtype, contiguous)
        q_gate, k, v = proj.split([2 * H * K, G * K, G * K], dim=-1)
        q, gate = rearrange(q_gate, "t (h two k) -> two t h k", two=2, k=K)
        expected = (q, *(rearrange(x, "t (g k) -> t g k", k=K) for x in (k, v)))
        assert all(torch.equal(a, b) for a, b in zip(split_projection(proj, G, K), expected, strict=True))
        o = (q.float() * gate.float().sigmoid()).to(dtype)
        assert torch.equal(gated(q, proj), rearrange(o, "t h k -> t (h k)"))
        keys = split_projection(proj, G, K)[1]
        assert torch.equal(keys.repeat_interleave(H // G, 1), repeat(keys, "t g k -> t (g r) k", r=H // G))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_of_the_rule(dtype: torch.dtype) -> None:
    """Padded to whole chunks, tokens before heads in memory."""
    for T, size in ((16, 16), (33, 16), (5, 8)):
        x = torch.randn(2, T, 3, 8, generator=torch.Generator().manual_seed(T)).to(dtype).transpose(1, 2)
        x = torch.nn.functional.pad(x, (0, 0, 0, -T % size))
        assert torch.equal(x.unflatten(2, (-1, size)), rearrange(x, "b h (n c) d -> b h n c d", c=size))
