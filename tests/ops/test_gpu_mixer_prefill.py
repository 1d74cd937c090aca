"""The mixers over prompts on the device, in every form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.mixer_prefill_case import MixerPrefillCase, mixer_boundaries
from thalweg.ops.delta.gdn import GDN_MIXER_PREFILL, GdnDims
from thalweg.ops.delta.kda_mixer import KDA_MIXER_PREFILL, KdaMixerDims
from thalweg.ops.registry import Resolver, Where

pytestmark = pytest.mark.gpu

LENGTHS = (0, 1, 15, 16, 17, 63, 64, 65, 1000, 0)


def op_named(name: str, H: int, G: int | None, dtype: str = "bfloat16") -> Callable[..., Tensor]:
    where = Where("cuda", dtype)
    if G is None:
        dims = KdaMixerDims(H=H, K=128, V=128, R=128, W=3)
        return Resolver({KDA_MIXER_PREFILL.name: name}).resolve(KDA_MIXER_PREFILL, where, dims)
    gdn_dims = GdnDims(G=G, H=H, K=128, V=128, W=3)
    return Resolver({GDN_MIXER_PREFILL.name: name}).resolve(GDN_MIXER_PREFILL, where, gdn_dims)


@pytest.mark.parametrize(("H", "G"), [(4, None), (32, None), (4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("fresh", [False, True])
def test_mixed_lengths(H: int, G: int | None, fresh: bool) -> None:
    case = MixerPrefillCase(LENGTHS, H, G=G, device="cuda", fresh=fresh)
    case.check(case.run(op_named("cuda", H, G)), 0.005)


@pytest.mark.parametrize("G", [None, 2])
@pytest.mark.parametrize(("gate", "rate"), [(-30.0, None), (-8.0, None), (8.0, None), (30.0, None), (30.0, 4.5)])
def test_extreme_gates(gate: float, rate: float | None, G: int | None) -> None:
    """With a rate of 4.5, log decays of -2700 for a token."""
    case = MixerPrefillCase((130,), 4, G=G, device="cuda", gate=gate, rate=rate)
    case.check(case.run(op_named("cuda", 4, G)), 0.005)


@pytest.mark.parametrize("G", [None, 2])
@pytest.mark.parametrize(("value", "tolerance"), [(0.0, 0.005), (1.0, 0.01)])
def test_equal_keys(value: float, tolerance: float, G: int | None) -> None:
    case = MixerPrefillCase((130,), 4, G=G, device="cuda", gate=-30.0)
    keys = slice(case.G * 128, 2 * case.G * 128)
    case.inputs[0][:, keys] = value
    case.conv[:, :, keys] = torch.where(case.conv[:, :, keys].isnan(), torch.nan, value)
    case.before = case.state.clone(), case.conv.clone()
    case.check(case.run(op_named("cuda", 4, G)), tolerance)


@pytest.mark.parametrize("G", [None, 2])
def test_a_bfloat16_state(G: int | None) -> None:
    case = MixerPrefillCase((65, 3), 4, G=G, device="cuda", state_dtype=torch.bfloat16)
    case.check(case.run(op_named("cuda", 4, G)), 0.005, state_tolerance=0.007)


@pytest.mark.parametrize("G", [None, 2])
def test_a_long_prompt_is_walked_in_segments(G: int | None) -> None:
    from thalweg.ops.delta.prefill_cuda import segments
    from thalweg.ops.toolchain.triton_support import multiprocessors

    case = MixerPrefillCase((4100,), 8, G=G, device="cuda", rate=-6.0)  # states outlive segments
    assert segments(8, 65, multiprocessors(torch.device("cuda"))) > 2
    case.check(case.run(op_named("cuda", 8, G)), 0.005)


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_chunks_are_made_while_heads_are_walked(monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    from thalweg.ops.delta import prefill_cuda

    monkeypatch.setattr(prefill_cuda, "rounds_at_once", lambda *_: rounds)
    for G in (4, 2, 1):
        case = MixerPrefillCase(LENGTHS, 4, G=G, device="cuda")
        case.check(case.run(op_named("cuda", 4, G)), 0.005)
        assert not prefill_cuda.counters("gdn_prompt", case.state.device, prefill_cuda.GDN_FLAGS).any()


def test_one_prompt_of_many_heads() -> None:
    from thalweg.ops.delta.prefill_cuda import rounds_at_once
    from thalweg.ops.toolchain.triton_support import multiprocessors

    case = MixerPrefillCase((1100,), 32, G=16, device="cuda")
    if multiprocessors(torch.device("cuda")) == 132:
        assert rounds_at_once(1, 32, 18, 132) is not None
    case.check(case.run(op_named("cuda", 32, 16)), 0.005)


@pytest.mark.parametrize("G", [None, 2])
def test_segments_of_mixed_lengths(monkeypatch: pytest.MonkeyPatch, G: int | None) -> None:
    from thalweg.ops.delta import prefill_cuda

    monkeypatch.setattr(prefill_cuda, "segments", lambda *_: 4)
    case = MixerPrefillCase(LENGTHS, 4, G=G, device="cuda", rate=-6.0)
    case.check(case.run(op_named("cuda", 4, G)), 0.005)


@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize("G", [None, 2])
def test_states_at_boundaries_are_those_of_calls_that_end_there(G: int | None, name: str) -> None:
    mixer_boundaries(op_named(name, 4, G), "cuda", 4, G)


@pytest.mark.parametrize("G", [None, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.006), (torch.float32, 1e-5)])
def test_triton(dtype: torch.dtype, tolerance: float, G: int | None) -> None:
    """Whose convolution rounds to bfloat16."""
    case: Any = MixerPrefillCase(LENGTHS, 4, G=G, device="cuda", dtype=dtype)
    case.check(case.run(op_named("triton", 4, G, str(dtype).removeprefix("torch."))), tolerance)
