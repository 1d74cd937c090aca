"""Memory of weights on a CPU: large chunks that ask for huge pages."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from tests.models import random_checkpoint as random
from thalweg.assembly.rank import build_rank
from thalweg.config.engine import EngineConfig
from thalweg.weights import memory
from thalweg.weights.memory import CHUNK, HUGE, LINE, WeightMemory

SMAPS, KERNEL = Path("/proc/self/smaps"), Path("/sys/kernel/mm/transparent_hugepage")
has_huge_pages = pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE") or not SMAPS.exists() or not KERNEL.exists(),
    reason="the system has no huge pages, or does not show them",
)


def flags_at(address: int) -> list[str]:
    """VmFlags of the mapping that an address is in."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            begin, end = (int(x, 16) for x in words[0].split("-"))
            inside = begin <= address < end
        elif inside and words[0] == "VmFlags:":
            return words[1:]
    raise AssertionError(f"nothing at {address:#x}")


@has_huge_pages
def test_weights_lie_one_after_another_in_memory_that_asks_for_huge_pages() -> None:
    weights = WeightMemory()
    a, b = weights.empty((3, 7), torch.bfloat16), weights.empty((5,), torch.float32)
    empty, c = weights.empty((0, 4), torch.uint8), weights.empty((2, 2), torch.float8_e4m3fn)
    assert a.data_ptr() % HUGE == 0
    assert b.data_ptr() == a.data_ptr() + LINE
    assert c.data_ptr() == b.data_ptr() + LINE
    assert (a.shape, a.dtype, empty.shape, c.dtype) == ((3, 7), torch.bfloat16, (0, 4), torch.float8_e4m3fn)
    for x in (a, b):
        assert x.fill_(3).sum() == 3 * x.numel()
    assert a.eq(3).all()
    large = weights.empty((CHUNK + 1,), torch.uint8)
    assert large.data_ptr() % HUGE == 0
    assert "hg" in flags_at(a.data_ptr())
    assert "hg" in flags_at(large.data_ptr())


@has_huge_pages
def test_a_chunk_goes_with_its_last_weight() -> None:
    weights = WeightMemory()
    a, b = weights.empty((4,), torch.float32), weights.empty((4,), torch.float32)
    address = b.data_ptr()
    del weights, a
    assert "hg" in flags_at(address)
    assert b.fill_(1).sum() == 4
    del b
    with pytest.raises(AssertionError, match="nothing at"):
        flags_at(address)


def test_without_such_memory_torch_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_huge", lambda size: None)
    x = WeightMemory().empty((2, 3), torch.float32)
    assert (x.shape, x.dtype) == ((2, 3), torch.float32)


@has_huge_pages
def test_all_of_a_models_weights_are_there(tmp_path: Path) -> None:
    c = random.config()
    folder = random.write(tmp_path, c, random.weights(c))
    runner, _ = build_rank(EngineConfig(model=str(folder), device="cpu", max_num_seqs=2), 0, "")
    addresses = sorted(p.data_ptr() for p in runner.model.parameters())  # type: ignore[attr-defined]
    assert addresses[-1] - addresses[0] < CHUNK
    assert "hg" in flags_at(addresses[0])
    runner.close()
