"""The decode mixers of KDA and Gated DeltaNet in CUDA C++: compiled for Hopper, when they are chosen.

What they compute: test_gpu_kda_mixer, test_gpu_qwen.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ops.compile_cuda import compile_cuda
from thalweg.ops.delta.gdn import GDN_MIXER_DECODE, MAX_RATIO, GdnDims
from thalweg.ops.delta.kda_mixer import KDA_MIXER_DECODE, KdaMixerDims
from thalweg.ops.delta.mixer_cuda import MAX_ROWS, MAX_STAGES, SOURCE, rows_per_block
from thalweg.ops.registry import Resolver, Where
from thalweg.ops.toolchain import cuda_build

DIMS = {"H": 32, "K": 128, "V": 128, "R": 128, "W": 3}


@pytest.mark.parametrize("bf16_states", [0, 1])
@pytest.mark.parametrize(
    ("gdn", "ratio", "float8"), [(0, 1, 0), (1, 1, 0), (1, 2, 0), (1, 3, 0), (1, MAX_RATIO, 0), (1, 2, 1)]
)
def test_it_compiles_for_hopper_without_spills(
    tmp_path: Path, gdn: int, ratio: int, float8: int, bf16_states: int
) -> None:
    compiled = compile_cuda(SOURCE, tmp_path, STATE_BF16=bf16_states, GDN=gdn, RATIO=ratio, FLOAT8=float8)
    assert compiled.spilled_bytes == 0
    assert compiled.static_shared_bytes <= 5 * 1024


def test_constants_are_those_of_the_source() -> None:
    source = SOURCE.read_text()
    assert "K = 128, WARPS = 8, PASS = 8, MAX_ROWS = 64;" in source
    assert "STRIDE = K + 4;" in source
    assert "TILE_BYTES = 4096," in source
    assert f"full_s[WARPS * {MAX_STAGES}]" in source


def test_blocks_go_round_the_multiprocessors_once() -> None:
    assert [rows_per_block(B, 32, 132) for B in (1, 4, 5, 8, 32, 128)] == [1, 1, 2, 2, 8, 32]
    assert [rows_per_block(B, 4, 132) for B in (1, 33, 34, 128)] == [1, 1, 2, 4]
    for B in range(1, 600):
        for H in (4, 32, 200):
            rows = rows_per_block(B, H, 132)
            assert 1 <= rows <= MAX_ROWS


@pytest.mark.parametrize(
    ("dims", "dtype", "reason"),
    [
        ({**DIMS, "K": 64, "V": 64}, "bfloat16", "K = V = R = 128"),
        ({**DIMS, "R": 64}, "bfloat16", "K = V = R = 128"),
        ({**DIMS, "W": 2}, "bfloat16", "W = 3"),
        ({**DIMS, "H": 6}, "bfloat16", "a multiple of 4 heads"),
        (DIMS, "float32", "needs bfloat16, not float32"),
    ],
)
def test_what_it_does_not_serve_it_refuses_with_a_reason(dims: dict[str, int], dtype: str, reason: str) -> None:
    resolver = Resolver()
    resolver.resolve(KDA_MIXER_DECODE, Where("cuda", dtype), KdaMixerDims(**dims))
    assert reason in dict(resolver.explain()[0].refused)["cuda"]


GDN_DIMS = {"G": 16, "H": 32, "K": 128, "V": 128, "W": 3}


@pytest.mark.parametrize(
    ("dims", "dtype", "reason"),
    [
        ({**GDN_DIMS, "K": 64}, "bfloat16", "K = V = 128"),
        ({**GDN_DIMS, "W": 2}, "bfloat16", "W = 3"),
        ({**GDN_DIMS, "G": 3, "H": 3}, "bfloat16", "an even number of heads"),
        ({**GDN_DIMS, "G": 1, "H": 16}, "bfloat16", "at most 8 value heads per key head, not 16"),
        (GDN_DIMS, "float32", "needs bfloat16, not float32"),
    ],
)
def test_what_it_does_not_serve_of_gdn(dims: dict[str, int], dtype: str, reason: str) -> None:
    resolver = Resolver()
    resolver.resolve(GDN_MIXER_DECODE, Where("cuda", dtype), GdnDims(**dims))
    assert reason in dict(resolver.explain()[0].refused)["cuda"]


def test_without_cuda_bindings_the_others_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_build, "find_spec", lambda name: None)
    assert cuda_build.why_not(Where("cuda", "bfloat16")) == "cuda-bindings is not installed"
    assert cuda_build.why_not(Where("cpu", "bfloat16")) == "needs cuda, not cpu"
