"""Norm, router and choice of short prompts in CUDA C++: on a host, and compiled for Hopper."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ops.compile_cuda import compile_cuda
from tests.ops.moe_case import moe_case, routed
from tests.ops.run_on_host import HostKernel, host_tensor_map
from thalweg.ops.moe.router import cuda, reference
from thalweg.ops.moe.router.cuda import MAX_PROMPT_BYTES, PROMPTS, prompt_cut, prompt_refusal


def test_it_starts_the_kernel_behind_after_its_own_wait() -> None:
    """The experts' first kernel reads ids after its own wait, and their second before, once the first let it start."""
    kernel = PROMPTS.read_text().split('extern "C"')[1]
    assert kernel.index("wait_for_kernel_ahead()") < kernel.index("start_kernel_behind()")


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host has no clusters: one block has all experts and columns."""
    monkeypatch.setattr(cuda, "cuda_kernel", HostKernel)
    monkeypatch.setattr(cuda, "tensor_map", host_tensor_map)
    monkeypatch.setattr(cuda, "multiprocessors", lambda _: 2)
    monkeypatch.setattr(cuda, "SPLIT", 1)
    monkeypatch.setattr(cuda, "PROMPT_WARPS", 5)


@pytest.mark.parametrize(
    ("T", "D", "E", "k", "shared", "gated", "scoring"),
    [
        (47, 256, 64, 6, 2, False, "sigmoid"),  # 40 tokens at a time
        (11, 384, 64, 8, 1, True, "softmax"),
    ],
)
@pytest.mark.usefixtures("on_host")
def test_prompts_on_a_host(T: int, D: int, E: int, k: int, shared: int, gated: bool, scoring: str) -> None:
    case = moe_case(T, D, 16, E, k, shared, torch.bfloat16, seed=T, gated=gated)
    if gated:
        case.norm = case.norm.float()
    case.x = torch.cat([case.x, case.x], 1)[:, :D]  # with a stride of its own
    found = routed(cuda.norm_router_of_prompts, case, k, gated, 2.4, scoring)
    expected = routed(reference.norm_router, case, k, gated, 2.4, scoring)
    torch.testing.assert_close(found[0], expected[0], rtol=2**-7, atol=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(found[2], expected[2])


@pytest.mark.usefixtures("on_host")
def test_prompts_of_equal_and_of_missing_logits_on_a_host() -> None:
    """Of equals the lower id comes first; NaN comes last, and every id is in range and another one."""
    case = moe_case(3, 256, 16, 64, 4, 1, torch.bfloat16)
    case.router_weight[:] = 0
    case.bias[:] = 0
    case.bias[40] = 1.0
    case.x[2] = float("nan")
    *_, ids = routed(cuda.norm_router_of_prompts, case, 4)
    assert ids[0].tolist() == ids[1].tolist() == [40, 0, 1, 2, 64]
    assert ids[2].tolist() == [0, 1, 2, 3, 64]


@pytest.mark.parametrize("T", [300, 1024])
@pytest.mark.parametrize(("E", "D", "gated"), [(256, 2304, 0), (256, 2048, 1), (64, 640, 0), (128, 2560, 1)])
def test_prompts_compile_for_hopper_without_spills(tmp_path: Path, T: int, E: int, D: int, gated: int) -> None:
    cut = prompt_cut(T, E, D, 1 + gated, 132)
    macros = {"E": E, "D": D, "K": 8, "SHARED": 1, "SOFTMAX": gated, "RENORMALIZE": 1, "GATED": gated}
    macros |= {
        "NORM_FLOAT": gated,
        "TOKENS": cut.tokens,
        "PARTS": cut.parts,
        "SPLIT": cuda.SPLIT,
        "STAGES": cut.stages,
        "WARPS": 16,
    }
    compiled = compile_cuda(PROMPTS, tmp_path, **macros)
    assert compiled.spilled_bytes == 0
    assert compiled.static_shared_bytes == 0
    assert cut.shared_bytes <= MAX_PROMPT_BYTES
    assert cut.stages >= 4


def test_a_cluster_has_few_tokens_if_all_clusters_find_room() -> None:
    assert [prompt_cut(T, 256, 2304, 1, 132)[:2] for T in (1, 416, 417, 1040)] == [(16, 2), (16, 2), (40, 2), (40, 2)]
    assert prompt_cut(700, 64, 2304, 1, 132)[:2] == (16, 1)


def test_a_rehearsal_makes_the_kernels_for_few_and_for_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Kernel:
        def __init__(self, *_: object, TOKENS: int, **macros: int) -> None:
            made.append(TOKENS)

        def launch(self, *_: object) -> None:
            pass

    monkeypatch.setattr(cuda, "cuda_kernel", Kernel)
    monkeypatch.setattr(cuda, "tensor_map", host_tensor_map)
    monkeypatch.setattr(cuda, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(cuda, "rehearsing", lambda: True)
    routed(cuda.norm_router_of_prompts, moe_case(130, 640, 16, 256, 4, 1, torch.bfloat16), 4)
    assert set(made) == {16, 40}


def test_prompts_that_are_not_served_say_why() -> None:
    assert prompt_refusal(256, 2304, 9) is None
    assert "one group, not in 8" in (prompt_refusal(256, 2304, 9, groups=8) or "")
    assert "64, 128 or 256 experts" in (prompt_refusal(384, 2304, 9) or "")
    assert "a multiple of 128 from 640 up to 2560, not 7168" in (prompt_refusal(256, 7168, 9) or "")
