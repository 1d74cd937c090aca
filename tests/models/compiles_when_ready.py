"""Serves requests of many shapes on a CUDA device and prints every kernel that was compiled after the engine was ready.

In a process of its own, since what another test compiled would be found in memory.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(folder: str) -> None:
    import triton

    from thalweg import LLM, SamplingParams
    from thalweg.ops.toolchain import cuda_build

    compiled: list[str] = []

    def note(*, repr: str, **_: Any) -> None:
        compiled.append(repr)

    class NotedKernel(cuda_build.CudaKernel):
        def __init__(self, source: Path, name: str, threads: int, **macros: int) -> None:
            super().__init__(source, name, threads, **macros)
            compiled.append(f"{source.name} {macros}")

    limits = dict(max_num_seqs=6, max_num_batched_tokens=1000, cache_memory=1 << 30)
    with LLM(folder, device="cuda", dtype="bfloat16", **limits) as llm:
        triton.knobs.runtime.jit_post_compile_hook = note
        cuda_build.CudaKernel = NotedKernel  # type: ignore[misc]
        rng = np.random.default_rng(1)
        vocab = llm.info.vocab_size
        for lengths in (
            [1],
            [2],
            [3, 1],
            [7, 40, 200],
            [400],
            [64],
            [128, 16],
            [511, 31],
            [513],
            [333, 333, 300, 9, 8],
        ):
            prompts = [rng.integers(0, vocab, n).tolist() for n in lengths]
            for params in (
                SamplingParams(max_tokens=4, temperature=0, ignore_eos=True),
                SamplingParams(max_tokens=20, seed=1, ignore_eos=True),
                SamplingParams(max_tokens=3, seed=1, top_p=0.9, logprobs=3, presence_penalty=0.5, ignore_eos=True),
            ):
                llm.generate(prompts, params)
    for name in compiled:
        print(name)


if __name__ == "__main__":
    main(sys.argv[1])
