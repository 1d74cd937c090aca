"""What a step over a GGUF file's blocks is held against."""

from __future__ import annotations

from pathlib import Path

from tests.fixtures.gguf_files import converted
from thalweg import LLM
from thalweg.assembly.source import open_source
from thalweg.bench.ceilings import Ceilings
from thalweg.bench.floor import step_floor
from thalweg.config.engine import EngineConfig


def test_the_floor_of_a_step_counts_bytes_of_blocks_and_of_the_head(tmp_path: Path) -> None:
    ceilings, moved = Ceilings(bytes_per_s=1e6, flops_per_s=1e30), []
    for outtype in ("f32", "q8_0"):
        file = str(converted(tmp_path / f"{outtype}.gguf", outtype))
        with LLM(file, cache_memory=1 << 24, max_num_seqs=1) as llm:
            moved.append(step_floor(open_source(EngineConfig(file)), llm.info, ceilings, 1, 0).bytes)
            state = 2 * llm.info.bytes_per_sequence
    plain, blocks = (bytes_ - state for bytes_ in moved)
    assert 0.26 < blocks / plain < 0.35  # 34 bytes of 128, and what is not in blocks
