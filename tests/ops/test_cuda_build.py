"""Machine code of CUDA C++ sources is kept between processes, apart for each source, option and compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from thalweg.ops.toolchain import cuda_build


def test_a_source_is_compiled_once_for_all_it_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    compiled: list[tuple[str, str, dict[str, int]]] = []

    def compile_cubin(source: Path, arch: str, **macros: int) -> bytes:
        compiled.append((source.read_text(), arch, macros))
        return f"code {len(compiled)}".encode()

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda_build, "compile_cubin", compile_cubin)
    monkeypatch.setattr(cuda_build, "_compiler_version", lambda: (13, 0))
    source = tmp_path / "kernel.cu"
    source.write_text("one")
    asked: list[tuple[str, dict[str, Any]]] = [("sm_90", {"A": 1}), ("sm_90", {"A": 2}), ("sm_100", {"A": 1})]
    first = [cuda_build.cached_cubin(source, arch, **macros) for arch, macros in asked]
    assert first == [b"code 1", b"code 2", b"code 3"]
    assert [cuda_build.cached_cubin(source, arch, **macros) for arch, macros in asked] == first
    source.write_text("two")
    assert cuda_build.cached_cubin(source, "sm_90", A=1) == b"code 4"
    monkeypatch.setattr(cuda_build, "_compiler_version", lambda: (13, 1))
    assert cuda_build.cached_cubin(source, "sm_90", A=1) == b"code 5"
    assert len(compiled) == 5
