"""Products of many tokens in bfloat16 by the processor's tiles (AMX), with the tiles in plain C; the tests of every set
of instructions run the processor's own where it has them."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ops.cpp_case import instructions, needs_cpp, threads
from tests.ops.moe_case import experts_in_float64, implementation, moe_case, rmse_ratio, routed
from tests.ops.prefill_case import mla_case, ratio
from thalweg.ops.attention.mla import cpp as mla
from thalweg.ops.attention.mla import reference as mla_reference
from thalweg.ops.linear import cpp as linear
from thalweg.ops.moe.experts import cpp as experts
from thalweg.ops.moe.router import cpp as router
from thalweg.ops.toolchain import cpu_build

pytestmark = needs_cpp
SOURCES = ("attention/mla/prefill.cpp", "linear/linear.cpp", "moe/experts/experts.cpp", "moe/router/router.cpp")


@pytest.fixture(name="tiles", scope="module")
def tiles_in_c() -> Iterator[None]:
    own = cpu_build.level()
    level = cpu_build.Level("tiles_in_c", own.flags, (*own.options, "-DTHALWEG_TILES_IN_C"))
    sources = [*cpu_build.HEADERS.glob("*.cpp"), *(cpu_build.OPS / name for name in SOURCES)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_build, "_sources", lambda: sorted(sources))
        with instructions(level):
            yield


def whole(*shape: int, seed: int) -> Tensor:
    """Small whole numbers, whose products have sums that are exact in float32 in any order."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("T", [1, 17, 33, 100])
@pytest.mark.parametrize(("D", "O"), [(1, 1), (31, 16), (32, 5), (64, 64), (77, 40), (256, 17), (300, 100), (1090, 33)])
def test_linears_are_exact(T: int, D: int, O: int) -> None:
    x, w, residual = whole(T, D + 3, seed=0)[:, :D], whole(O, D, seed=1), whole(T, O + 2, seed=2)[:, :O]
    product = x.double() @ w.double().T
    assert torch.equal(linear.linear(x, w, many=True), product.bfloat16())
    added = (product + residual).bfloat16()
    assert torch.equal(linear.linear_add(x, w, residual, many=True), added)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(
    ("T", "D", "I", "E", "k", "shared"), [(17, 37, 21, 4, 3, 0), (33, 96, 80, 6, 2, 2), (100, 520, 40, 5, 2, 1)]
)
def test_experts(T: int, D: int, I: int, E: int, k: int, shared: int) -> None:
    case = moe_case(T, D, I, E, k, shared, torch.bfloat16)
    case.x = torch.cat([case.x, case.x[:, :5]], 1)[:, :D]  # rows with a stride
    y = case.run(partial(experts.experts, many=True))
    assert rmse_ratio(y, experts_in_float64(case)) < 6e-3  # one rounding to bfloat16 is 1.7e-3
    assert rmse_ratio(y, case.run(implementation("reference"))) < 5e-4


@pytest.mark.usefixtures("tiles")
def test_latent_attention() -> None:
    case = mla_case([30, 0], [3, 70], torch.bfloat16, K=24, P=8, V=20, R=41, block_size=5)
    q = case.pop("q_THX")
    truth = mla_reference.mla_prefill(q.double().float(), **{**case, "up_HXR": case["up_HXR"].float()})
    assert ratio(mla.mla_prefill(q, **case), truth) < 3e-3


@pytest.mark.usefixtures("tiles")
def test_a_token_has_the_same_bits_on_any_number_of_threads_and_in_any_company() -> None:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(500, 300, generator=g).bfloat16()
    moe, choice = moe_case(120, 128, 77, 8, 3, 1, torch.bfloat16), moe_case(120, 300, 16, 40, 4, 1, torch.bfloat16)

    def results(rows: slice) -> list[Tensor]:
        here, chosen = (replace(c, x=c.x[rows], weights=c.weights[rows], ids=c.ids[rows]) for c in (moe, choice))
        products = linear.linear(chosen.x, w, many=True), here.run(partial(experts.experts, many=True))
        return [*products, *routed(router.norm_router_many, chosen, 4)]

    with threads(1):
        alone = results(slice(None))
    for count, rows in [(2, slice(None)), (5, slice(None)), (2, slice(3, 4)), (2, slice(30, 110))]:
        with threads(count):
            for got, expected in zip(results(rows), alone, strict=True):
                assert torch.equal(got, expected[rows])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is of x86-64")
def test_the_processor_s_tiles_compile(tmp_path: Path) -> None:
    level = next(level for level in cpu_build.levels() if level.name == "amx")
    command = [*cpu_build._compiler(), *cpu_build.OPTIONS, *level.options, f"-I{cpu_build.HEADERS}", "-c"]
    empty, compiled = tmp_path / "empty.cpp", tmp_path / "panels.o"
    empty.touch()
    if subprocess.run([*command, str(empty), "-o", str(compiled)], capture_output=True).returncode:
        pytest.skip("the compiler knows no AMX")
    done = subprocess.run(
        [*command, str(cpu_build.HEADERS / "panels.cpp"), "-o", str(compiled)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert b"\xc4\xe2\x78\x49\xc0" in compiled.read_bytes()  # tilerelease
