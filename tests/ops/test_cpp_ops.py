"""The CPU's ops in C++ against float64 and their references, at every set of instructions that this processor has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.cpp_case import LEVELS, instructions, needs_cpp, threads
from tests.ops.gdn_case import DecodeCase, GdnShape
from tests.ops.gqa_case import SHAPES as GQA_SHAPES
from tests.ops.gqa_case import GqaCase, GqaShape
from tests.ops.kda_mixer_case import check_kda_mixer, error, kda_mixer_case
from tests.ops.mla_mixer_case import check_mla_decode, check_mla_mixer, mla_mixer_case
from tests.ops.moe_case import experts_in_float64, implementation, moe_case, rmse_ratio, routed
from tests.ops.split_norms_case import split_norms_case
from thalweg.ops.activation import cpp as activation
from thalweg.ops.activation import reference as activation_reference
from thalweg.ops.attention.gqa import cpp as gqa
from thalweg.ops.attention.mla_down_norms import cpp as mla_down_norms
from thalweg.ops.attention.mla_down_norms.reference import split_norms as split_norms_reference
from thalweg.ops.attention.mla_mixer import cpp as mla_mixer
from thalweg.ops.delta import mixer_cpp
from thalweg.ops.delta.kda_mixer import reference as kda_mixer_reference
from thalweg.ops.embedding import VocabRowsDims
from thalweg.ops.embedding import cpp as embedding
from thalweg.ops.embedding import reference as embedding_reference
from thalweg.ops.linear import blocks_cpp
from thalweg.ops.linear import cpp as linear
from thalweg.ops.linear import reference as linear_reference
from thalweg.ops.moe.experts import Experts, ExpertsDims
from thalweg.ops.moe.experts import cpp as experts
from thalweg.ops.moe.router import cpp as router
from thalweg.ops.moe.router import reference as router_reference
from thalweg.ops.norm import cpp as norms
from thalweg.ops.norm import reference as norm_reference
from thalweg.ops.residual import cpp as residual
from thalweg.ops.residual import reference as residual_reference
from thalweg.ops.sample import cpp as sample
from thalweg.ops.sample import reference as sample_reference
from thalweg.quant import PLAIN, GgmlRows, Scheme
from thalweg.quant.ggml_quantize import quantize
from thalweg.quant.ggml_types import TYPES

pytestmark = needs_cpp
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 5e-7, torch.bfloat16: 6e-3}  # one rounding to bfloat16 is 1.7e-3


@pytest.fixture(params=LEVELS, ids=lambda level: level.name, autouse=True, scope="module")
def _level(request: pytest.FixtureRequest) -> Iterator[None]:
    with instructions(request.param):
        yield


def randn(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    T=st.one_of(st.integers(0, 17), st.sampled_from([48, 49, 100, 800])),
    D=st.one_of(st.integers(1, 200), st.integers(510, 600)),
    O=st.integers(1, 140),
    dtype=st.sampled_from(DTYPES),
    norm_fp32=st.booleans(),
    many=st.booleans(),
)
def test_linears_of_any_shape(T: int, D: int, O: int, dtype: torch.dtype, norm_fp32: bool, many: bool) -> None:
    x = randn(T, D + 3, dtype=dtype)[:, :D]  # rows with a stride
    w, norm = randn(O, D, dtype=dtype, seed=1, scale=D**-0.5), 1 + randn(D, dtype=dtype, seed=2, scale=0.1)
    residual = randn(T, O + 2, dtype=dtype, seed=3)[:, :O]
    norm = norm.float() if norm_fp32 else norm
    product, added = x.double() @ w.double().T, residual.double()
    normed = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.double()
    if dtype == torch.bfloat16:
        normed = norm_reference.rms_norm(x, norm, 1e-5)  # what is multiplied is rounded, as in plain torch
    if many:
        got = (
            linear.linear(x, w, many=True),
            linear.norm_linear(x, norm, 1e-5, w, many=True),
            linear.linear_add(x, w, residual, many=True),
        )
    else:
        got = linear.linear(x, w), linear.norm_linear(x, norm, 1e-5, w), linear.linear_add(x, w, residual)
    for y, truth in zip(got, (product, normed.double() @ w.double().T, added + product), strict=True):
        assert y.dtype == dtype
        assert y.shape == (T, O)
        size = max(truth.norm().item(), y.numel() ** 0.5)  # elements are about 1; a few may cancel out
        exact = 1e-6 if many else 5e-7  # where a sum runs over 128 columns one by one, a single element is off by more
        assert (y.double() - truth).norm() <= (6e-3 if dtype == torch.bfloat16 else exact) * size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [0, 3, 70])
def test_batched_projection(T: int, dtype: torch.dtype) -> None:
    x = randn(T, 2, 37, dtype=dtype)[:, :, 5:]
    w = randn(2, 51, 32, dtype=dtype, seed=1, scale=32**-0.5)
    y = linear.batched_projection(x, w)
    assert y.dtype == dtype
    torch.testing.assert_close(
        y.double(), torch.einsum("tir,ior->tio", x.double(), w.double()), rtol=8e-3, atol=TOLERANCE[dtype] * 3
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 20, 512])
def test_rms_norm(D: int, dtype: torch.dtype) -> None:
    x, weight = randn(6, D + 1, dtype=dtype)[:, :D].unflatten(0, (2, 3)), 1 + randn(D, dtype=dtype, seed=1)
    for w in (weight, weight.float()):
        y, truth = norms.rms_norm(x, w, 1e-5), norm_reference.rms_norm(x.double().float(), w.float(), 1e-5)
        assert y.shape == x.shape
        assert y.dtype == dtype
        assert error(y, truth.double()) < TOLERANCE[dtype]


def blocks_of(w: Tensor, scheme: GgmlRows) -> Tensor:
    """uint8 [..., bytes] of matrices [..., O, D]."""
    kinds = [TYPES[name] for name, _ in scheme.segments]
    parts = w.split([rows for _, rows in scheme.segments], dim=-2)
    stored = (
        quantize(p.reshape(-1, k.elements), k).reshape(*w.shape[:-2], -1) for p, k in zip(parts, kinds, strict=True)
    )
    return torch.cat(list(stored), dim=-1)


def in_8_bits(x: Tensor, block: int) -> Tensor:
    """x in float64, each block of columns in 255 steps."""
    blocks = x.float().unflatten(-1, (-1, block))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    steps = (blocks * torch.where(step > 0, 1 / step, 0)).round()
    return (steps.double() * step.double()).flatten(-2)


SCHEMES = [
    *(GgmlRows.of([(kind, 37)]) for kind in blocks_cpp.BLOCKS),
    GgmlRows.of([("Q4_K", 70), ("Q6_K", 3), ("Q8_0", 64)]),
    GgmlRows((("Q8_0", 9),), tile=(2, 4, 64)),
]
NUMBERS = [
    *(GgmlRows.of([(kind, 37)]) for kind in ("F16", "BF16", "F32")),
    GgmlRows.of([("Q8_0", 8), ("F32", 3), ("F16", 8)]),
]
FEW_AND_MANY = [(0, False), (1, False), (3, False), (16, False), (0, True), (5, True), (67, True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "many"), FEW_AND_MANY)
@pytest.mark.parametrize("scheme", [*SCHEMES, *NUMBERS], ids=lambda scheme: scheme.name)
def test_linears_over_blocks(scheme: GgmlRows, T: int, many: bool, dtype: torch.dtype) -> None:
    rows = sum(rows for _, rows in scheme.segments)
    blocks = blocks_of(randn(rows, 512, dtype=torch.float32, scale=512**-0.5), scheme)
    x = randn(T, 520, dtype=dtype, seed=1)[:, :512]
    y, truth = (
        blocks_cpp.BlockLinear(scheme, many=many)(x, blocks),
        x.double() @ scheme.widened([blocks], 1, torch.float32).double().T,
    )
    assert y.dtype == dtype
    assert (y.double() - truth).norm() <= TOLERANCE[dtype] * truth.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "many"), FEW_AND_MANY)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_linears_over_blocks_of_rounded_activations(scheme: GgmlRows, T: int, many: bool, dtype: torch.dtype) -> None:
    blocks = blocks_of(randn(sum(n for _, n in scheme.segments), 512, dtype=torch.float32, scale=512**-0.5), scheme)
    x = randn(T, 520, dtype=dtype, seed=1)[:, :512]
    x[:, 100:300] = 0  # whole blocks of 32 among them
    x[T // 2 :] *= 1e4
    w = list(scheme.widened([blocks], 1, torch.float32).double().split([n for _, n in scheme.segments]))
    y = blocks_cpp.BlockLinear(scheme, rounds=True, many=many)(x, blocks)
    rounded = {n: in_8_bits(x, n) for n in (32, 256)}
    truth = torch.cat([rounded[TYPES[name].elements] @ w.T for (name, _), w in zip(scheme.segments, w, strict=True)], 1)
    exact = x.double() @ torch.cat(w).T
    assert y.dtype == dtype
    for row, rounded_row, exact_row in zip(y.double(), truth, exact, strict=True):
        # A value in the middle between two steps may go to either.
        assert (row - rounded_row).norm() <= (TOLERANCE[dtype] + 4e-4) * rounded_row.norm()
        assert (row - exact_row).norm() <= (TOLERANCE[dtype] + 0.02) * exact_row.norm()


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("scheme", SCHEMES[:7], ids=lambda scheme: scheme.name)
def test_rounding_passes_on_what_is_not_finite(scheme: GgmlRows, wrong: float, many: bool) -> None:
    blocks = blocks_of(randn(sum(n for _, n in scheme.segments), 512, dtype=torch.float32), scheme)
    x = randn(3, 512, dtype=torch.float32, seed=1)
    x[1, 300] = wrong
    y = blocks_cpp.BlockLinear(scheme, rounds=True, many=many)(x, blocks)
    assert y[[0, 2]].isfinite().all()
    assert not y[1].isfinite().any()


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES[:7], ids=lambda scheme: scheme.name)
def test_rounding_of_what_is_too_small_for_steps_gives_next_to_nothing(scheme: GgmlRows, many: bool) -> None:
    blocks = blocks_of(randn(sum(n for _, n in scheme.segments), 512, dtype=torch.float32), scheme)
    x = randn(3, 512, dtype=torch.float32, seed=1) * 1e-38  # 127 steps of it are more than float32 has
    assert blocks_cpp.BlockLinear(scheme, rounds=True, many=many)(x, blocks).abs().max() < 1e-35


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "many"), [(1, False), (9, False), (3, True), (70, True)])
@pytest.mark.parametrize(
    ("gate_up", "down", "block"), [("Q8_0 512", "Q8_0 256", 32), ("Q4_K 256 + Q6_K 256", "Q5_K 100 + Q6_K 156", 256)]
)
def test_experts_over_blocks(
    gate_up: str, down: str, block: int, T: int, many: bool, dtype: torch.dtype, rounds: bool
) -> None:
    case = moe_case(T, 256, 256, 6, 2, 1, dtype)
    schemes = [GgmlRows.named(name) for name in (gate_up, down)]
    assert schemes[0] is not None and schemes[1] is not None  # noqa: PT018 -- for mypy
    stored = [blocks_of(w.float(), s) for w, s in zip((case.gate_up[0], case.down[0]), schemes, strict=True)]
    plain = [s.widened([b], 1, torch.float32) for s, b in zip(schemes, stored, strict=True)]
    case.gate_up, case.down = (plain[0],), (plain[1],)
    exact, rounded = (experts_in_float64(case, quantized=q) for q in (None, partial(in_8_bits, block=block)))
    case.gate_up, case.down, case.scheme = (stored[0],), (stored[1],), f"{gate_up} | {down}"
    dims = ExpertsDims(E=7, D=256, I=256, scheme=case.scheme)
    assert experts.refuses(dims) is None
    y = case.run(experts.build(dims, rounds=rounds, many=many))
    assert rmse_ratio(y, exact) < 2 * TOLERANCE[dtype] + 0.025 * rounds
    if rounds and dtype == torch.float32:  # what is rounded to bfloat16 first may go to another step
        assert rmse_ratio(y, rounded) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "many"), [(3, False), (20, True)])
@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize(
    "scheme", [SCHEMES[3], GgmlRows((("Q8_0", 9),), tile=(2, 4, 64))], ids=lambda scheme: scheme.name
)
def test_norms_and_residuals_around_blocks(
    scheme: GgmlRows, rounds: bool, T: int, many: bool, dtype: torch.dtype
) -> None:
    rows = sum(n for _, n in scheme.segments)
    blocks = blocks_of(randn(rows, 512, dtype=torch.float32, scale=512**-0.5), scheme)
    x, residual = randn(T, 512, dtype=dtype, seed=1), randn(T, rows + 3, dtype=dtype, seed=2)[:, :rows]
    op = blocks_cpp.BlockLinear(scheme, rounds=rounds, many=many)
    for norm in (1 + randn(512, dtype=dtype, seed=3), 1 + randn(512, dtype=torch.float32, seed=3)):
        normed = norm_reference.rms_norm(x, norm, 1e-5)
        y = op(x, blocks, norm_weight_D=norm, eps=1e-5, residual_TO=residual.clone())
        assert error(y, (residual + op(normed, blocks)).double()) < 2 * TOLERANCE[dtype] + 2e-3 * rounds
        exact = linear_reference.linear_ggml(scheme, x, blocks, norm_weight_D=norm, eps=1e-5, residual_TO=residual)
        assert error(y, exact.double()) < 2 * TOLERANCE[dtype] + 0.012 * rounds


def test_halves_of_any_number_of_columns() -> None:
    scheme, x = GgmlRows.of([("F16", 37)]), randn(20, 77, dtype=torch.float32, seed=1)
    w = randn(37, 77, dtype=torch.float16)
    for many in (False, True):
        y = blocks_cpp.BlockLinear(scheme, many=many)(x, w.view(torch.uint8).flatten())
        assert error(y, x.double() @ w.double().T) < 5e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["none", *blocks_cpp.SERVED])
def test_rows_of_a_vocabulary_are_the_reference_s(name: str, dtype: torch.dtype) -> None:
    w = randn(70, 256, dtype=torch.float32)
    scheme: Scheme = PLAIN if name == "none" else GgmlRows(((name, 70),))
    stored = w.to(dtype) if isinstance(scheme, type(PLAIN)) else blocks_of(w, scheme)
    ids = torch.tensor([[3, 0], [69, 0], [3, 0]])[:, 0]
    rows = embedding.build(VocabRowsDims(D=256, scheme=scheme.name), dtype)(ids, stored)
    assert rows.dtype == dtype
    assert rows.equal(embedding_reference.vocab_rows(ids, stored, scheme=scheme, dtype=dtype))
    for wrong in (-1, 70):
        with pytest.raises(IndexError, match=f"{min(wrong, 5)} to {max(wrong, 5)}; expected 0 to 69"):
            embedding.build(VocabRowsDims(D=256, scheme=scheme.name), dtype)(torch.tensor([5, wrong]), stored)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(("T", "Q", "R", "P", "gap"), [(1, 40, 24, 6, 3), (9, 0, 512, 64, 0), (3, 1536, 16, 2, 1)])
def test_norms_of_latent_attention(T: int, Q: int, R: int, P: int, gap: int, rotated: bool, dtype: torch.dtype) -> None:
    case = split_norms_case(T, Q, R, P, dtype, gap=gap, rotated=rotated)
    case.positions %= 3000  # so far cosines of float32 angles are the same everywhere
    q, rows, others = case.run(mla_down_norms.split_norms)
    expected_q, expected_rows, _ = case.run(split_norms_reference)
    assert q.shape == expected_q.shape
    assert Q == 0 or error(q, expected_q.double()) < TOLERANCE[dtype]
    assert error(rows, expected_rows.double()) < TOLERANCE[dtype]
    assert bool(others.isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_a_shared_expert_is_added_through_its_gate(gated: bool, dtype: torch.dtype) -> None:
    x, a = randn(5, 99, dtype=dtype)[:, :77], randn(5, 77, dtype=dtype, seed=1)
    gate = randn(5, 8, dtype=dtype, seed=2, scale=3)[:, 7:] if gated else None
    exact = x.double() + (a.double() if gate is None else a.double() * gate.double().sigmoid())
    y = residual.gated_add(x, a, gate)
    assert error(y, exact) < TOLERANCE[dtype]
    assert error(y, residual_reference.gated_add(x, a, gate).double()) < TOLERANCE[dtype] / 3


def test_what_c_has_no_code_for_is_refused() -> None:
    assert embedding.refusal(VocabRowsDims(D=256, scheme="IQ4_XS 9")) == "has no code for IQ4_XS"
    assert "not fp8" in str(embedding.refusal(VocabRowsDims(D=256, scheme="fp8")))
    dims = ExpertsDims(E=7, D=256, I=256, scheme="IQ4_XS 512 | Q8_0 256")
    assert experts.refuses(dims) == "has no code for IQ4_XS"
    halves = replace(dims, scheme="F16 512 | Q8_0 256")
    assert experts.refuses(halves) is None
    assert experts.refuses(halves, rounds=True) == "has no code for F16"
    assert "not none | Q8_0 256" in str(experts.refuses(replace(dims, scheme="none | Q8_0 256")))
    assert "not fp8" in str(experts.refuses(replace(dims, scheme="fp8")))
    assert "of its own" in str(experts.refuses(replace(dims, scheme="none", own=8)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "H", "K", "R"), [(1, 4, 64, 64), (5, 3, 32, 24), (2, 2, 128, 128)])
def test_kda_mixer(B: int, H: int, K: int, R: int, dtype: torch.dtype) -> None:
    case = kda_mixer_case(B, H, K, R, dtype)
    of_state = 3e-3 if dtype == torch.bfloat16 else 5e-7
    check_kda_mixer(mixer_cpp.kda_mixer_decode, case, TOLERANCE[dtype], of_state)
    by_reference = case.copy().run(kda_mixer_reference.kda_mixer_decode)
    assert error(case.run(mixer_cpp.kda_mixer_decode), by_reference.double()) < 5e-4  # rounded at the same places


@pytest.mark.parametrize("gate", [0.0, 30.0])
def test_kda_mixer_of_states_that_stay_and_that_go_at_once(gate: float) -> None:
    check_kda_mixer(mixer_cpp.kda_mixer_decode, kda_mixer_case(2, 2, 64, 64, torch.float32, gate=gate), 5e-7, 5e-7)


def test_kda_mixer_over_states_in_bfloat16() -> None:
    case = kda_mixer_case(3, 2, 64, 64, torch.bfloat16)
    case.state = case.state.bfloat16()
    check_kda_mixer(mixer_cpp.kda_mixer_decode, case, 8e-3, 5e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [GdnShape(2, 6, 16, 32), GdnShape(1, 4, 64, 16, 1), GdnShape(2, 2, 128, 128)])
def test_gdn_mixer(shape: GdnShape, dtype: torch.dtype) -> None:
    case = DecodeCase(shape, B=3, dtype=dtype)
    case.check(mixer_cpp.gdn_mixer_decode, TOLERANCE[dtype] * 2, padding=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "K", "R", "P", "V", "S"), [(4, 32, 64, 16, 64, 64), (3, 24, 40, 8, 20, 8)])
def test_mla_mixer(H: int, K: int, R: int, P: int, V: int, S: int, dtype: torch.dtype) -> None:
    for spread in (1.0, 30.0):
        case = mla_mixer_case([5, 1, 70, 33], H, K, R, P, V, S, dtype, spread=spread)
        check_mla_mixer(mla_mixer.mla_mixer_decode, case, 8e-3 if dtype == torch.bfloat16 else 2e-6)
        check_mla_decode(mla_mixer.mla_decode, case, 8e-3 if dtype == torch.bfloat16 else 2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*GQA_SHAPES, GqaShape(16, 2, 256, 64, 16)])
def test_gqa_mixer(shape: GqaShape, dtype: torch.dtype) -> None:
    cached = [0, 40, 3, 17]
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-5
    case = GqaCase(shape, cached, [1] * 4, dtype, scale=1.2, first_position=1000)
    case.check_mix(gqa.gqa_mixer_decode, tolerance, padding=2)


def test_attention_without_tokens_is_finite() -> None:
    case = GqaCase(GQA_SHAPES[0], [5], [1])
    case.cached = [-1]
    assert case.mix(gqa.gqa_mixer_decode).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [experts.experts, partial(experts.experts, many=True)])
@pytest.mark.parametrize(
    ("T", "D", "I", "E", "k", "shared"),
    [(1, 64, 48, 8, 2, 1), (5, 37, 21, 4, 3, 0), (40, 96, 80, 6, 2, 2), (130, 520, 40, 5, 2, 1)],
)
def test_experts(op: Experts, T: int, D: int, I: int, E: int, k: int, shared: int, dtype: torch.dtype) -> None:
    case = moe_case(T, D, I, E, k, shared, dtype)
    truth = experts_in_float64(case)
    assert rmse_ratio(case.run(op), truth) < TOLERANCE[dtype]
    assert rmse_ratio(case.run(op), case.run(implementation("reference"))) < 5e-4
    before = case.residual.clone()
    out = case.run(op, residual_TD=case.residual)
    assert rmse_ratio(out, truth + case.residual.double()) < TOLERANCE[dtype]
    assert torch.equal(case.residual, before)


@pytest.mark.parametrize("op", [experts.experts, partial(experts.experts, many=True)])
def test_experts_that_are_not_there_are_refused(op: Experts) -> None:
    for wrong in (-1, 9, 2**40):
        case = moe_case(2, 32, 16, 8, 2, 1, torch.float32)
        case.ids[1, 1] = wrong
        with pytest.raises(IndexError, match=r"ids of experts are .* expected 0 to 8"):
            case.run(op)


def test_experts_of_more_pairs_than_are_sorted_at_once() -> None:
    case = moe_case(9000, 24, 16, 4, 2, 0, torch.float32)
    assert rmse_ratio(case.run(partial(experts.experts, many=True)), case.run(implementation("reference"))) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("E", "k", "options"),
    [
        (8, 2, {}),
        (60, 4, {"scoring": "softmax", "renormalize": False}),
        (32, 6, {"n_group": 4, "topk_group": 2, "scale": 2.5}),
        (16, 2, {"gated": True}),
    ],
)
@pytest.mark.parametrize(("op", "T"), [(router.norm_router, 9), (router.norm_router_many, 70)])
def test_router(op: Callable[..., Any], T: int, E: int, k: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    options = dict(options)
    case = moe_case(T, 77, 16, E, k, 1, dtype, gated=options.pop("gated", False))
    got, expected = (routed(f, case, k, **options) for f in (op, router_reference.norm_router))
    assert torch.equal(got[2], expected[2])
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("op", [router.norm_router, router.norm_router_many])
def test_router_gives_different_experts_even_of_nan(op: Callable[..., Any]) -> None:
    case = moe_case(3, 64, 16, 16, 4, 0, torch.float32)
    case.x[1] = torch.nan
    _, _, ids = routed(op, case, 4, n_group=4, topk_group=2)
    assert all(len(set(row)) == 4 and min(row) >= 0 and max(row) < 16 for row in ids.tolist())


@pytest.mark.parametrize("dtype", DTYPES)
def test_sampling_chooses_as_the_reference(dtype: torch.dtype) -> None:
    logits = randn(64, 5001, dtype=dtype, scale=3.0)
    logits[:, 4999] = torch.nan
    temperatures = torch.tensor([0.0, 0.3, 1.0, 20.0]).repeat(16)
    seeds, positions = torch.arange(64) * 2**57 - 2**62, torch.arange(64) * 1000
    logits[0] = 1.0  # ties go to the lowest index
    slots = torch.arange(64).flip(0)
    for options in ((), (slots,)):
        arguments = (logits, temperatures, seeds, positions, *options)
        assert torch.equal(sample.sample(*arguments), sample_reference.sample(*arguments))


def test_sampling_finds_rows_that_are_not_finite() -> None:
    logits = randn(4, 100, dtype=torch.float32)
    logits[1, 99], logits[2, 0] = torch.nan, -torch.inf
    zeros = torch.zeros(4, dtype=torch.int64)
    ids = sample.sample(logits, torch.zeros(4), zeros, zeros, check=True)
    assert ids.tolist() == [int(logits[0].argmax()), -1, -1, int(logits[3].argmax())]
    logits[0] = torch.nan
    assert sample.sample(logits, torch.ones(4), zeros, zeros)[0] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(dtype: torch.dtype) -> None:
    x = randn(6, 75, dtype=dtype, scale=40.0)[:, :74].unflatten(0, (2, 3))
    y, truth = activation.silu_and_mul(x), activation_reference.silu_and_mul(x.double())
    assert y.shape == (2, 3, 37)
    assert error(y, truth) < TOLERANCE[dtype]


def test_silu_of_huge_numbers() -> None:
    gates = torch.tensor([[88.2, -88.2, -1e30, -3e38, 3e38, torch.inf, -torch.inf, torch.nan]])
    x = torch.cat((gates, torch.ones_like(gates)), dim=1)
    torch.testing.assert_close(
        activation.silu_and_mul(x), activation_reference.silu_and_mul(x), rtol=1e-6, atol=1e-36, equal_nan=True
    )


MIXED = [GgmlRows.of([("Q8_0", 600)]), GgmlRows.of([("Q4_K", 300), ("Q6_K", 200), ("Q5_0", 100)])]


def everything(dtype: torch.dtype, rows: slice = slice(None)) -> list[Tensor]:
    """Results of each op at sizes that several threads share, for some of eight tokens."""
    x, w = randn(8, 512, dtype=dtype)[rows], randn(2000, 512, dtype=dtype, seed=1)
    norm = randn(512, dtype=dtype, seed=2)
    moe = moe_case(8, 256, 256, 16, 4, 1, dtype)
    for name in ("x", "weights", "ids"):
        setattr(moe, name, getattr(moe, name)[rows])
    choice = moe_case(8, 512, 16, 256, 8, 0, dtype)
    choice.x = choice.x[rows]
    kda, mla = kda_mixer_case(8, 16, 64, 64, dtype), mla_mixer_case([300] * 8, 8, 64, 128, 32, 64, 64, dtype)
    gdn = DecodeCase(GdnShape(8, 16, 64, 64), B=8, steps=1, dtype=dtype)
    gdn.proj = gdn.proj[:, rows]
    attention = GqaCase(GqaShape(8, 2, 64, 32, 16), [300] * 8, [1] * 8, dtype)
    for name in ("proj", "positions", "rows", "tables", "cached"):
        setattr(attention, name, getattr(attention, name)[rows])
    kda.proj, kda.slots, gdn.slots, gdn.B = kda.proj[rows], kda.slots[rows], gdn.slots[rows], len(x)
    for name in ("proj", "tables", "lens", "block_rows"):
        setattr(mla, name, getattr(mla, name)[rows])
    seeds = torch.arange(8)[rows]
    return [
        linear.norm_linear(x, norm, 1e-5, w),
        *(blocks_cpp.BlockLinear(s, rounds=r)(x, blocks_of(w[:600].float(), s)) for s in MIXED for r in (False, True)),
        linear.linear_add(x, w, torch.zeros(len(x), 2000, dtype=dtype)),
        moe.run(experts.experts),
        *routed(router.norm_router, choice, 8),
        kda.run(mixer_cpp.kda_mixer_decode),
        gdn.run(mixer_cpp.gdn_mixer_decode)[0],
        mla.run(mla_mixer.mla_mixer_decode),
        attention.mix(gqa.gqa_mixer_decode),
        sample.sample(randn(8, 20000, dtype=dtype, seed=5)[rows], seeds + 1.0, seeds, seeds),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    with threads(1):
        alone = everything(dtype)
    for count in (2, 5):
        with threads(count):
            for got, expected in zip(everything(dtype), alone, strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    batch = everything(dtype)
    for rows in (slice(3, 4), slice(1, 4), slice(2, 8)):
        for got, expected in zip(everything(dtype, rows), batch, strict=True):
            assert torch.equal(got, expected[rows])


def in_panels(dtype: torch.dtype, rows: slice = slice(None)) -> list[Tensor]:
    """Results for some of 120 tokens of the ops that serve many."""
    x, w, norm = randn(120, 300, dtype=dtype)[rows], randn(500, 300, dtype=dtype, seed=1), randn(300, dtype=dtype)
    moe = moe_case(120, 128, 64, 8, 3, 1, dtype)
    for name in ("x", "weights", "ids"):
        setattr(moe, name, getattr(moe, name)[rows])
    choice = moe_case(120, 300, 16, 40, 4, 1, dtype)
    choice.x = choice.x[rows]
    wide, blocks = (
        randn(120, 512, dtype=dtype)[rows],
        [blocks_of(randn(600, 512, dtype=torch.float32), s) for s in MIXED],
    )
    products = [
        blocks_cpp.BlockLinear(s, rounds=rounds, many=True)(wide, b)
        for s, b in zip(MIXED, blocks, strict=True)
        for rounds in (False, True)
    ]
    return [
        *products,
        linear.norm_linear(x, norm, 1e-5, w, many=True),
        moe.run(partial(experts.experts, many=True)),
        *routed(router.norm_router_many, choice, 4),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_in_panels_have_the_same_bits_on_any_number_of_threads_and_in_any_company(dtype: torch.dtype) -> None:
    with threads(1):
        alone = in_panels(dtype)
    for count in (2, 5):
        with threads(count):
            for got, expected in zip(in_panels(dtype), alone, strict=True):
                assert torch.equal(got, expected)
    for rows in (slice(3, 4), slice(30, 110)):
        for got, expected in zip(in_panels(dtype, rows), alone, strict=True):
            assert torch.equal(got, expected[rows])
