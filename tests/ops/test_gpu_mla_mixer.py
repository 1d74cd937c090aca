"""The MLA decode mixer's kernels on a GPU, at the real shape, against float64."""

from __future__ import annotations

import pytest
import torch

from tests.ops.mla_mixer_case import MlaMixerCase, check_mla_decode, check_mla_mixer, mla_mixer_case
from thalweg.ops.attention.mla_mixer import MLA_DECODE, MLA_MIXER_DECODE, MlaDecode, MlaMixerDecode, MlaMixerDims
from thalweg.ops.registry import Resolver, Where

pytestmark = pytest.mark.gpu

SHAPE = {"H": 32, "K": 128, "R": 512, "P": 64, "V": 128}


def kernel(name: str = "gluon", block_size: int = 64, **dims: int) -> MlaMixerDecode:
    resolver = Resolver({"mla_mixer_decode": name})
    return resolver.resolve(MLA_MIXER_DECODE, Where("cuda", "bfloat16"), MlaMixerDims(**SHAPE | dims, S=block_size))


def rotated_kernel(H: int, name: str = "gluon", block_size: int = 64) -> MlaDecode:
    dims = MlaMixerDims(**SHAPE | {"H": H}, S=block_size)
    return Resolver({"mla_decode": name}).resolve(MLA_DECODE, Where("cuda", "bfloat16"), dims)


def case_of(lens: list[int], H: int, block_size: int = 64, **options: float) -> MlaMixerCase:
    shape = SHAPE | {"H": H}
    return mla_mixer_case(lens, **shape, block_size=block_size, dtype=torch.bfloat16, device="cuda", **options)  # type: ignore[arg-type]


def ragged(B: int, longest: int) -> list[int]:
    lengths = [1, 63, 64, 65, longest, 130, 2, 1000]
    return [max(1, lengths[b % 8] - b // 8) for b in range(B)]


@pytest.mark.parametrize("B", [1, 2, 4, 5, 8, 24, 32, 70, 140])
def test_ragged_batches(B: int) -> None:
    case = mla_mixer_case(ragged(B, 4500), **SHAPE, block_size=64, dtype=torch.bfloat16, device="cuda", seed=B)
    check_mla_mixer(kernel(), case, 0.005)


@pytest.mark.parametrize("lens", [[4500], [64], [9000, 1], [70_000]])
def test_few_long_sequences(lens: list[int]) -> None:
    check_mla_mixer(kernel(), mla_mixer_case(lens, **SHAPE, block_size=64, dtype=torch.bfloat16, device="cuda"), 0.005)


@pytest.mark.parametrize(("H", "block_size"), [(3, 16), (8, 24), (16, 128), (1, 1), (3, 64), (8, 64), (1, 192)])
def test_other_heads_and_blocks(H: int, block_size: int) -> None:
    shape = SHAPE | {"H": H}
    case = mla_mixer_case(ragged(7, 700), **shape, block_size=block_size, dtype=torch.bfloat16, device="cuda")
    name = "triton" if block_size % 64 else "gluon"
    check_mla_mixer(kernel(name, block_size, H=H), case, 0.005)
    check_mla_mixer(kernel("triton", block_size, H=H), case, 0.005)


@pytest.mark.parametrize("B", [8, 24])
def test_more_heads_than_32(B: int) -> None:
    check_mla_mixer(kernel(H=64), case_of(ragged(B, 1500), 64), 0.005)


@pytest.mark.parametrize(
    ("name", "dims"),
    [
        ("gluon", {"R": 128, "P": 32}),
        ("gluon", {"R": 256, "V": 64}),
        ("gluon", {"V": 256}),
        ("triton", {"P": 128}),
        ("triton", {"V": 32}),
    ],
)
def test_other_widths(name: str, dims: dict[str, int]) -> None:
    case = mla_mixer_case(ragged(7, 700), **SHAPE | dims, block_size=64, dtype=torch.bfloat16, device="cuda")
    check_mla_mixer(kernel(name, **dims), case, 0.005)


@pytest.mark.parametrize("length", [0, 1])
def test_rows_that_share_the_sink(length: int) -> None:
    op = kernel()
    case = mla_mixer_case(ragged(8, 700), **SHAPE, block_size=64, dtype=torch.bfloat16, device="cuda")
    case.blocks[0] = 0
    padded, expected = case.copy(), case.copy().run(op)
    padded.tables[4:], padded.lens[4:], padded.block_rows[4:] = 0, length, 0
    out = padded.run(op)
    assert torch.equal(out[:4], expected[:4])
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_peaked_scores(spread: float) -> None:
    case = mla_mixer_case(ragged(8, 3000), **SHAPE, block_size=64, dtype=torch.bfloat16, device="cuda", spread=spread)
    check_mla_mixer(kernel(), case, 0.02)


def test_replays_under_load() -> None:
    """Kernels that overlap their neighbours give the same bits every time."""
    op = kernel()
    case = mla_mixer_case(ragged(8, 3000), **SHAPE, block_size=64, dtype=torch.bfloat16, device="cuda")
    expected = case.copy().run(op)
    after = case.copy()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [after.run(op) for _ in range(10)]
    for _ in range(20):
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(out, expected) for out in outs)


@pytest.mark.parametrize(("H", "B"), [(64, 1), (64, 8), (64, 64), (64, 70), (32, 8), (16, 8), (8, 8), (8, 64)])
def test_rotated(H: int, B: int) -> None:
    check_mla_decode(rotated_kernel(H), case_of(ragged(B, 4000), H, seed=B), 0.005)


@pytest.mark.parametrize(("name", "H"), [("gluon", 64), ("gluon", 8), ("gluon", 128), ("triton", 64)])
def test_rotated_at_every_edge_of_a_tile(name: str, H: int) -> None:
    """64 heads of 8 sequences are in programs of 32, 128 in programs of 64."""
    lens = [1, 15, 16, 17, 63, 64, 65, 1000]
    check_mla_decode(rotated_kernel(H, name), case_of(lens, H), 0.005)
    for length in lens if H == 64 else []:
        check_mla_decode(rotated_kernel(H, name), case_of([length], H), 0.005)


def test_rotated_at_every_edge_of_a_tile_with_64_heads_per_program() -> None:
    lens = [1, 15, 16, 17, 63, 64, 65, 1000] * 2
    check_mla_decode(rotated_kernel(64), case_of(lens, 64), 0.005)
    check_mla_decode(rotated_kernel(40), case_of(lens * 2, 40), 0.005)


@pytest.mark.parametrize("block_size", [24, 128])
def test_rotated_with_other_blocks(block_size: int) -> None:
    name = "triton" if block_size % 64 else "gluon"
    check_mla_decode(rotated_kernel(64, name, block_size), case_of(ragged(16, 700), 64, block_size), 0.005)


@pytest.mark.parametrize("B", [8, 64])
def test_rotated_peaked_scores(B: int) -> None:
    check_mla_decode(rotated_kernel(64), case_of(ragged(B, 3000), 64, spread=30.0), 0.02)


@pytest.mark.parametrize(("H", "B"), [(64, 8), (64, 64), (8, 8)])
def test_rotation_where_it_is_absorbed_is_the_one_by_itself_bit_for_bit(H: int, B: int) -> None:
    """That of position 0 changes nothing."""
    from thalweg.ops.attention.mla_rope.triton import mla_rope

    op, case = rotated_kernel(H), case_of(ragged(B, 3000), H)
    fused = case.copy().run_rotated(op)
    rotation = dict(frequencies_F=case.frequencies, rope_scale=case.rope_scale)
    mla_rope(case.queries.unflatten(-1, (H, 192)), positions_T=case.positions, **rotation)
    at_0 = case.run_rotated(op, positions_B=torch.zeros_like(case.positions), rope_scale=1.0)
    assert torch.equal(fused, at_0)


@pytest.mark.parametrize(("H", "B"), [*((64, B) for B in (1, 3, 4, 8, 16, 32, 64)), (32, 1), (8, 1), (8, 8)])
def test_attention_and_combination_in_one_launch_are_two_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, H: int, B: int
) -> None:
    from thalweg.ops.attention.mla_mixer.triton import gluon

    op, case, counts, used = rotated_kernel(H), case_of(ragged(B, 4000), H), gluon.counters, []
    monkeypatch.setattr(gluon, "counters", lambda *of: used.append(True) or counts(*of))
    as_served = case.copy().run_rotated(op)
    assert len(used) == (B > 1)
    launch = gluon.launch
    monkeypatch.setattr(gluon, "launch", lambda *args: launch(*args[:-1], True))
    used.clear()
    ones = [case.copy().run_rotated(op) for _ in range(20)]
    assert len(used) == 20
    monkeypatch.setattr(gluon, "launch", lambda *args: launch(*args[:-1], False))
    two = case.copy().run_rotated(op)
    assert len(used) == 20
    assert torch.equal(as_served, two)
    assert all(torch.equal(one, two) for one in ones)
    assert not counts("mla_decode", two.device, 2).any()


@pytest.mark.parametrize("B", [8, 64])
@pytest.mark.parametrize("length", [0, 1])
def test_rotated_rows_that_share_the_sink(length: int, B: int) -> None:
    op, case = rotated_kernel(64), case_of(ragged(B, 700), 64)
    case.blocks[0] = 0
    padded, expected = case.copy(), case.copy().run_rotated(op)
    padded.tables[4:], padded.lens[4:], padded.block_rows[4:] = 0, length, 0
    out = padded.run_rotated(op)
    assert torch.equal(out[:4], expected[:4])
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("B", [8, 64])
def test_rotated_replays_under_load(B: int) -> None:
    op, case = rotated_kernel(64), case_of(ragged(B, 3000), 64)
    expected, after = case.copy().run_rotated(op), case.copy()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [after.run_rotated(op) for _ in range(10)]
    for _ in range(20):
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(out, expected) for out in outs)
