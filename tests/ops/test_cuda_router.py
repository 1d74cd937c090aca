"""Norm, router and choice in CUDA C++: compiled for Hopper, when it is chosen. What it computes: test_gpu_router."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ops.compile_cuda import compile_cuda
from tests.ops.moe_case import moe_case, routed
from tests.ops.run_on_host import HostKernel
from thalweg.ops.moe.router import NORM_ROUTER, NormRouterDims, few, reference
from thalweg.ops.moe.router.cuda import BLOCKS, SOURCE, parts, refusal, shared_bytes, tokens_per_cluster
from thalweg.ops.registry import Resolver, Where
from thalweg.ops.toolchain.counters import counters

DIMS = {"E": 256, "D": 2304, "K": 8, "G": 1, "S": 1}
SHARED_OF_TWO = 227 * 1024 // 2 - 1024  # of which two blocks find room on a multiprocessor; each costs 1 KB more


@pytest.mark.parametrize("tokens", [8, 16])
@pytest.mark.parametrize(
    ("E", "D", "K", "softmax", "gated"),
    [(256, 2304, 8, 0, 0), (64, 1024, 6, 1, 0), (512, 2304, 30, 0, 0), (256, 2048, 8, 1, 1), (512, 2048, 10, 1, 1)],
)
def test_it_compiles_for_hopper_without_spills(
    tmp_path: Path, tokens: int, E: int, D: int, K: int, softmax: int, gated: int
) -> None:
    macros = {"E": E, "D": D, "K": K, "SHARED": 1, "SOFTMAX": softmax, "RENORMALIZE": 1, "TOKENS": tokens}
    macros |= {"PARTS": parts(E, D), "GROUPS": 1, "TOP_GROUPS": 1, "GATED": gated, "NORM_FLOAT": gated}
    macros["FOR_EXPERTS"] = int(D == 2048)
    compiled = compile_cuda(SOURCE, tmp_path, **macros)
    assert compiled.spilled_bytes == 0
    if E == 256:  # two blocks a multiprocessor, so that 16 clusters of 8 or 16 tokens find room beside each other
        assert compiled.registers <= 128
        assert shared_bytes(E, D, tokens) + compiled.static_shared_bytes <= SHARED_OF_TWO


@pytest.mark.parametrize(("E", "groups"), [(384, 1), (256, 8)])
def test_it_compiles_for_weights_in_two_parts(tmp_path: Path, E: int, groups: int) -> None:
    assert parts(E, 7168) == 2
    macros = {"E": E, "D": 7168, "K": 8, "SHARED": 1, "SOFTMAX": 0, "RENORMALIZE": 1, "TOKENS": 8, "PARTS": 2}
    macros |= {"GATED": 0, "NORM_FLOAT": 0, "FOR_EXPERTS": 0}
    compiled = compile_cuda(SOURCE, tmp_path, **macros, GROUPS=groups, TOP_GROUPS=(groups + 1) // 2)
    assert compiled.spilled_bytes == 0
    assert shared_bytes(E, 7168, 8, 2) + compiled.static_shared_bytes <= 227 * 1024


def test_constants_are_those_of_the_source() -> None:
    assert f"BLOCKS = {BLOCKS}, WARPS = E / 32;" in SOURCE.read_text()
    assert shared_bytes(256, 2304, 8) == 4 * 16 * 256 + 2 * 144 * (8 + 256)
    assert shared_bytes(64, 512, 16) == 4 * 16 * 64 + 2 * (32 + 16) * (16 + 64)  # rows that would meet in their banks
    assert {tokens_per_cluster(T) for T in range(1, 129)} == {8, 16}


def test_it_starts_the_kernel_behind_after_its_own_wait() -> None:
    """The experts' first kernel reads ids after its own wait, and their second before, once the first let it start."""
    kernel = SOURCE.read_text().split('extern "C"')[1]
    assert kernel.index("wait_for_kernel_ahead()") < kernel.index("start_kernel_behind()")


@pytest.mark.parametrize(
    ("dims", "dtype", "reason"),
    [
        ({**DIMS, "D": 2303}, "bfloat16", "rows of a multiple of 256 up to 7168"),
        ({**DIMS, "D": 7680, "E": 384}, "bfloat16", "rows of a multiple of 256 up to 7168"),
        ({**DIMS, "E": 1024}, "bfloat16", "a multiple of 32 experts up to 512"),
        ({**DIMS, "E": 40}, "bfloat16", "a multiple of 32 experts up to 512"),
        ({**DIMS, "K": 32}, "bfloat16", "at most 32 of them a token, not 2304, 256 and 33"),
        ({**DIMS, "D": 4096, "E": 512}, "bfloat16", "a thirty-second of the weights in shared memory, and as much in"),
        ({**DIMS, "G": 4}, "bfloat16", "experts in one group or in groups of 32, not 256 in 4"),
        (DIMS, "float32", "needs bfloat16, not float32"),
    ],
)
def test_what_it_does_not_serve_it_refuses_with_a_reason(dims: dict[str, int], dtype: str, reason: str) -> None:
    resolver = Resolver()
    resolver.resolve(NORM_ROUTER, Where("cuda", dtype), NormRouterDims(**dims))
    assert reason in dict(resolver.explain()[0].refused)["cuda"]


def test_it_serves_the_published_shape_and_smaller_ones() -> None:
    assert all(refusal(E, D, 9) is None for E, D in ((256, 2304), (64, 1024), (512, 2304), (32, 256), (384, 7168)))
    assert refusal(256, 7168, 9, groups=8) is None


def test_one_token_finds_room_beside_the_projection_ahead(tmp_path: Path) -> None:
    """What o_proj of Kimi-K2 in bf16 leaves of a multiprocessor: 96 of its registers for each of 256 threads, and all
    of shared memory but 15 KB."""
    macros = {"E": 384, "D": 7168, "K": 8, "SHARED": 0, "SOFTMAX": 0, "RENORMALIZE": 1}
    compiled = compile_cuda(few.SOURCE, tmp_path, **macros, ROWS=few.ROWS, WARPS=few.WARPS)
    assert compiled.spilled_bytes == 0
    assert compiled.registers * 32 * few.WARPS <= 65536 - 96 * 256
    assert compiled.static_shared_bytes <= 14 * 1024
    source = few.SOURCE.read_text()
    assert source.index("wait_for_kernel_ahead()") < source.index("start_kernel_behind()")


@pytest.mark.parametrize(("D", "E", "k", "shared"), [(1024, 32, 4, 0), (512, 64, 6, 1)])
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_one_token_on_the_host(
    monkeypatch: pytest.MonkeyPatch, D: int, E: int, k: int, shared: int, scoring: str
) -> None:
    """Twice, since a launch leaves places for logits as it found them; then with experts that are equals."""
    told = counters("norm_router", torch.device("cpu"), 2 * E)
    monkeypatch.setattr(few, "cuda_kernel", HostKernel)
    monkeypatch.setattr(few, "WARPS", 2)
    for seed in (0, 1):
        case = moe_case(1, D, 16, E, k, shared, torch.bfloat16, seed=seed)
        found = routed(few.norm_router, case, k, True, 2.5, scoring)
        expected = routed(reference.norm_router, case, k, True, 2.5, scoring)
        torch.testing.assert_close(found[0], expected[0], rtol=2**-7, atol=1e-6)
        assert found[2].tolist() == expected[2].tolist()
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)
        assert not told.any()
    case.router_weight[:], case.bias[:] = case.router_weight[0].clone(), 0
    assert routed(few.norm_router, case, k, True, 2.5, scoring)[2].tolist() == [[*range(k), *range(E, E + shared)]]
    case.x[0, 3] = torch.nan
    assert routed(few.norm_router, case, k, True, 2.5, scoring)[2].tolist() == [[*range(k), *range(E, E + shared)]]
    assert not told.any()


@pytest.mark.parametrize(
    ("dims", "reason"),
    [
        ({"D": 2304, "E": 256}, "rows of 3584 or 7168"),
        ({"D": 7168, "E": 544}, "a multiple of 32 experts up to 512"),
        ({"D": 7168, "E": 256, "G": 8}, "needs experts in one group"),
        ({"D": 7168, "E": 384, "gated": True}, "gate"),
        ({"D": 7168, "E": 384, "norm_fp32": True}, "norm's weight in bfloat16"),
    ],
)
def test_what_one_token_is_refused_for(dims: dict[str, int], reason: str) -> None:
    resolver = Resolver()
    resolver.resolve(NORM_ROUTER, Where("cuda", "bfloat16"), NormRouterDims(**{"K": 8, "G": 1, "S": 0, **dims}))
    refused = dict(resolver.explain()[0].refused)["few"]
    assert reason in refused
    assert few.refusal(384, 7168, 9) is None
    assert few.refusal(64, 3584, 9) is None
