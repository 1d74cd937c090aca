"""Rows of host memory hold what the device's blocks and snapshots held, and give it back."""

from __future__ import annotations

import pytest
import torch

from thalweg.cache.host_storage import HostStorage
from thalweg.cache.specs import DTYPE_BYTES, LayerSpecs, PagedSpec, StateSpec
from thalweg.cache.storage import CacheStorage
from thalweg.core import HostCopies, StepPlan


def plan(**copies: list[tuple[int, int]]) -> StepPlan:
    names = ("block_saves", "snapshot_saves", "block_fetches", "snapshot_fetches")
    return StepPlan(0, [], [], [], [], [], host=HostCopies(*(copies.get(name, []) for name in names)))


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize("width", [8, 7])  # whole words, and not
def test_blocks_and_snapshots_come_back_to_other_places(dtype: str, width: int) -> None:
    layers: list[LayerSpecs] = [
        {"keys": PagedSpec((2, width), dtype), "values": PagedSpec((2, 4), dtype)},
        {"conv": StateSpec((3, width), dtype), "recurrent": StateSpec((2, width, 4), "float32")},
        {"conv": StateSpec((3, width), dtype), "latent": PagedSpec((5,), dtype)},
    ]
    cache = CacheStorage(layers, 6, 2, 4, torch.device("cpu"), num_snapshots=3)
    tensors = [tensor for layer in cache.layers for tensor in layer.values()]
    for tensor in tensors:
        tensor.copy_(torch.randint(0, 100, tensor.shape).float())
    before = [tensor.clone().float() for tensor in tensors]
    host = HostStorage(cache, num_blocks=4, num_snapshots=2)
    host.copy(plan(block_saves=[(2, 4), (5, 1), (6, 2)], snapshot_saves=[(3, 1), (1, 2)]))
    for tensor in tensors:
        tensor.fill_(0)
    host.copy(plan(block_fetches=[(1, 3), (4, 1)], snapshot_fetches=[(2, 3), (1, 2)]))
    assert not host.fetching()
    assert cache.saved_row(1) == 3
    for tensor, was in zip(tensors, before, strict=True):
        paged = len(tensor) == 7
        moved = {5: 3, 2: 1} if paged else {3: 5, 5: 4}
        for source, target in moved.items():
            torch.testing.assert_close(tensor[target].float(), was[source], rtol=0, atol=0)
        others = sorted(set(range(len(tensor))) - set(moved.values()))
        assert not tensor[others].float().any()
