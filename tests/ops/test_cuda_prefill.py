"""The delta rule over prompts in CUDA C++: on the host, compiled for Hopper, when it is chosen. On a GPU:
test_gpu_mixer_prefill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ops.compile_cuda import compile_cuda
from tests.ops.mixer_prefill_case import MixerPrefillCase, mixer_boundaries
from tests.ops.prefill_case import check_in_graphs
from tests.ops.run_on_host import HostKernel
from thalweg.ops.delta.gdn import GDN_MIXER_PREFILL, GdnDims
from thalweg.ops.delta.kda_mixer import KDA_MIXER_PREFILL, KdaMixerDims
from thalweg.ops.host_tables import StepSequences
from thalweg.ops.registry import Resolver, Where


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("triton")
    from thalweg.ops.delta import prefill_cuda

    monkeypatch.setattr(prefill_cuda, "cuda_kernel", HostKernel)
    return prefill_cuda


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ((0, 2, 81, 0), {}),
        ((65,), {"gate": 30.0, "rate": 4.5}),  # log decays of -2700 for a token
        ((17,), {"gate": -30.0, "fresh": True, "state_dtype": torch.bfloat16}),
    ],
)
def test_kda_on_the_host(on_host: Any, lengths: tuple[int, ...], options: dict[str, Any]) -> None:
    case = MixerPrefillCase(lengths, 1, **options)
    case.check(case.run(on_host.kda_mixer_prefill), 0.005)


@pytest.mark.parametrize(("lengths", "gate"), [((70,), None), ((0, 2, 17, 0), 30.0)])
def test_gdn_on_the_host(on_host: Any, lengths: tuple[int, ...], gate: float | None) -> None:
    case = MixerPrefillCase(lengths, 2, G=1, gate=gate)
    case.check(case.run(on_host.gdn_mixer_prefill), 0.005)


@pytest.mark.parametrize(("lengths", "rounds"), [((70,), 0), ((0, 2, 140, 17, 0), 1)])
def test_gdn_at_once_on_the_host(
    on_host: Any, monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...], rounds: int
) -> None:
    """Two blocks that walk a head, and two that make chunks for them. Twice, since flags have to be as they were."""
    monkeypatch.setattr(on_host, "multiprocessors", lambda _: 4)
    monkeypatch.setattr(on_host, "rounds_at_once", lambda *_: rounds)
    for seed in range(2):
        case = MixerPrefillCase(lengths, 1, G=1, seed=seed)
        case.check(case.run(on_host.gdn_mixer_prefill), 0.005)
    assert not on_host.counters("gdn_prompt", torch.device("cpu"), on_host.GDN_FLAGS).any()


@pytest.mark.parametrize("G", [None, 1])
def test_segments_on_the_host(on_host: Any, monkeypatch: pytest.MonkeyPatch, G: int | None) -> None:
    """Of two chunks, of one, and none at all."""
    monkeypatch.setattr(on_host, "segments", lambda *_: 3)
    case = MixerPrefillCase((321, 0, 66), 1, G=G, rate=-6.0)  # states outlive segments
    case.check(case.run(on_host.gdn_mixer_prefill if G else on_host.kda_mixer_prefill), 0.005)


@pytest.mark.parametrize("G", [None, 1])
def test_states_at_boundaries_on_the_host(on_host: Any, G: int | None) -> None:
    if G is None:
        mixer_boundaries(on_host.kda_mixer_prefill, "cpu", 1)
    else:
        mixer_boundaries(on_host.gdn_mixer_prefill, "cpu", 2, G)


@pytest.mark.parametrize(("G", "rounds"), [(None, None), (1, None), (1, 1)])
def test_mixers_in_graphs_on_the_host(
    on_host: Any, monkeypatch: pytest.MonkeyPatch, G: int | None, rounds: int | None
) -> None:
    monkeypatch.setattr(on_host, "multiprocessors", lambda _: 4)
    monkeypatch.setattr(on_host, "rounds_at_once", lambda *_: rounds)
    case = MixerPrefillCase((128,), 1, G=G)
    before = [torch.randn(8, *x.shape[1:]).to(x.dtype) for x in (case.state, case.conv)]

    def run(offsets: Any, starts: Any, boundaries: Any) -> list[torch.Tensor]:
        state, conv = (x.clone() for x in before)
        where = {"state_NHVK": state, "conv_state_NWC": conv, "slots_B": torch.tensor([1, 2, 3, 0])}
        op = on_host.gdn_mixer_prefill if G else on_host.kda_mixer_prefill
        return [op(*case.inputs, **case.weights, **where, offsets=offsets, boundaries=boundaries), state, conv]

    steps = [StepSequences([0, 70, 70, 100, 128], [0] * 4, [(0, 64, 5)]), StepSequences([0, 1, 2, 3, 128], [0] * 4, [])]
    check_in_graphs(run, steps, 128)


@pytest.mark.parametrize("ratio", [None, 1, 2, 8])
def test_chunks_compile_for_hopper(tmp_path: Path, ratio: int | None) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.delta.prefill_cuda import GDN, KDA

    macros = {"RATIO": ratio} if ratio else {}
    source, _, shared_bytes = (GDN if ratio else KDA).chunks
    compiled, blocks = compile_cuda(source, tmp_path, **macros), 3 if ratio else 2
    assert compiled.spilled_bytes <= 96
    assert blocks * 256 * compiled.registers <= 65536
    assert blocks * (shared_bytes + compiled.static_shared_bytes + 1024) <= 228 * 1024


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("state_bf16", [0, 1])
@pytest.mark.parametrize("ratio", [None, 2])
def test_states_compile_for_hopper(tmp_path: Path, split: int, state_bf16: int, ratio: int | None) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.delta.prefill_cuda import GDN, KDA

    macros = {"STATE_BF16": state_bf16, "NORM_BF16": 0, "SPLIT": split} | ({"RATIO": ratio} if ratio else {})
    source, _, shared_bytes = (GDN if ratio else KDA).states
    compiled = compile_cuda(source, tmp_path, **macros)
    assert compiled.spilled_bytes <= (8 if ratio and split else 0)
    assert not compiled.serialized
    assert shared_bytes + compiled.static_shared_bytes + 1024 <= 228 * 1024


@pytest.mark.parametrize("ratio", [1, 2, 8])
def test_gdn_at_once_compiles_for_hopper(tmp_path: Path, ratio: int) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.delta.prefill_cuda import GDN_AT_ONCE

    source, _, shared_bytes = GDN_AT_ONCE
    compiled = compile_cuda(source, tmp_path, STATE_BF16=0, NORM_BF16=0, RATIO=ratio)
    assert compiled.spilled_bytes <= 128
    assert not compiled.serialized
    assert shared_bytes + compiled.static_shared_bytes + 1024 <= 228 * 1024


@pytest.mark.parametrize("state_bf16", [0, 1])
@pytest.mark.parametrize("ratio", [None, 2])
def test_segments_compile_for_hopper(tmp_path: Path, state_bf16: int, ratio: int | None) -> None:
    pytest.importorskip("triton")
    from thalweg.ops.delta.prefill_cuda import GDN, KDA

    form = GDN if ratio else KDA
    macros = {"STAGES": form.stages, "STATE_BF16": state_bf16} | ({"RATIO": ratio} if ratio else {})
    compiled = compile_cuda(form.segments[0], tmp_path, **macros)
    assert compiled.spilled_bytes == 0
    assert not compiled.serialized


def test_few_heads_with_long_prompts_are_walked_in_segments() -> None:
    pytest.importorskip("triton")
    from thalweg.ops.delta.prefill_cuda import segments

    assert [segments(heads, 1024, 132) for heads in (1, 4, 8, 11, 12, 16, 32)] == [8, 8, 4, 3, 1, 1, 1]
    assert [segments(8, chunks, 132) for chunks in (16, 63, 64)] == [1, 1, 4]
    assert [segments(heads, 1024, 132, blocks=2) for heads in (8, 16, 22, 32)] == [8, 4, 3, 1]


def test_constants_are_those_of_the_sources() -> None:
    pytest.importorskip("triton")
    from thalweg.ops.delta.prefill_cuda import (
        BLOCK,
        CHUNK,
        FIXED,
        GDN_HEAD,
        GDN_KEYS,
        GDN_PART,
        GDN_SHARED,
        GDN_STATES,
        INPUT,
        KDA_SHARED,
        STAGES,
        STATES,
        TILE,
        WARPS,
        WORK,
        K,
    )

    layout = STATES.with_name("delta.cuh").read_text()
    assert f"K = {K}, CHUNK = {CHUNK}, BLOCK = {BLOCK}, TILE = CHUNK * K * 2;" in layout
    assert "P_AT = 3 * TILE, A_AT = P_AT + 10 * BLOCK, U_AT = A_AT + 4 * K;\n" in layout
    assert "SUMS_AT = U_AT + TILE, SUMS = 4 * CHUNK;\nconstexpr int WORK = SUMS_AT + 8 * SUMS;" in layout
    assert (TILE, FIXED) == (CHUNK * K * 2, 3 * TILE + 10 * BLOCK + 4 * K)
    assert WORK == FIXED + TILE + 8 * 4 * CHUNK
    assert f"WARPS = {WARPS}, OUTS = 2, FETCHES = 4, MOVES = 5, THREADS = 256, STAGES = {STAGES};" in STATES.read_text()
    solving = "constexpr int SOLVING = 20 * BLOCK;"
    assert solving in STATES.with_name("chunk_solve.cuh").read_text()
    assert (KDA_SHARED, GDN_SHARED) == (5 * TILE + 20 * BLOCK, 3 * INPUT + 20 * BLOCK)
    layout = STATES.with_name("gdn.cuh").read_text()
    assert "SLAB = 128 * CHUNK;" in layout
    assert "KEYS_AT = 0, QUERIES_AT = 2 * SLAB, SHARED_BY_HEADS = 4 * SLAB;" in layout
    assert "PAIRS_AT = SLAB, FACTORS_AT = PAIRS_AT + 10 * BLOCK, FACTORS = 1024;" in layout
    assert "VALUES_AT = FACTORS_AT + FACTORS, SQUARES_AT = VALUES_AT + TILE;" in layout
    assert "SQUARES = 4 * CHUNK, OF_HEAD = SQUARES_AT + 2 * SQUARES;" in layout
    slab, values = 128 * CHUNK, TILE // 2
    assert 4 * slab == GDN_KEYS
    assert slab + 10 * BLOCK + 1024 + values == GDN_PART
    assert slab + 10 * BLOCK + 1024 + TILE + 2 * 4 * CHUNK == GDN_HEAD
    assert "WALKERS = 512, STAGES = 3, SLICES = K / ROWS;" in GDN_STATES.with_name("gdn_head.cuh").read_text()


@pytest.mark.parametrize(
    ("dims", "dtype", "reason"),
    [
        ({"K": 64, "V": 64}, "bfloat16", "needs K = V = 128"),
        ({"W": 2}, "bfloat16", "needs K = V = 128, W = 3"),
        ({"H": 3}, "bfloat16", "an even number of heads"),
        ({}, "float32", "needs bfloat16, not float32"),
    ],
)
def test_what_it_does_not_serve_it_refuses_with_a_reason(dims: dict[str, int], dtype: str, reason: str) -> None:
    resolver = Resolver()
    kda = {"H": 32, "K": 128, "V": 128, "R": 128, "W": 3} | dims
    resolver.resolve(KDA_MIXER_PREFILL, Where("cuda", dtype), KdaMixerDims(**kda))
    assert reason in dict(resolver.explain()[0].refused)["cuda"]
    if "H" not in dims:
        gdn = {"G": 16, "H": 32, "K": 128, "V": 128, "W": 3} | dims
        resolver.resolve(GDN_MIXER_PREFILL, Where("cuda", dtype), GdnDims(**gdn))
        assert "needs" in dict(resolver.explain()[1].refused)["cuda"]
