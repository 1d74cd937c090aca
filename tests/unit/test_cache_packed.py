"""Snapshots in fewer bytes: what comes back is near what was saved, and all else is to the bit."""

from __future__ import annotations

import pytest
import torch

from thalweg.cache.specs import LayerSpecs, PagedSpec, StateSpec, bytes_per_snapshot
from thalweg.cache.storage import CacheStorage

LAYER: LayerSpecs = {
    "conv": StateSpec((3, 10), "float32"),
    "recurrent": StateSpec((2, 6, 4), "float32"),
    "latent": PagedSpec((8,), "float32"),
}


def cache(dtype: str) -> CacheStorage:
    made = CacheStorage([LAYER] * 3, 2, 2, 4, torch.device("cpu"), 4, dtype, 2)
    for layer in made.layers:
        for tensor in layer.values():
            tensor.normal_()
        layer["recurrent"][:, :, :, 2] *= 1000  # a channel of another size
        layer["recurrent"][:, 1] = 0
    return made


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 2**-8), ("int8", 1 / 254)])
def test_states_come_back_rounded_by_channel_and_convolutions_exactly(dtype: str, bound: float) -> None:
    made = cache(dtype)
    before = [{name: t[1].clone() for name, t in layer.items()} for layer in made.layers]
    made.save([(1, 4)])
    made.reset_slots(torch.tensor([1, 2]))
    made.restore([(2, 4)])
    for layer, was in zip(made.layers, before, strict=True):
        assert torch.equal(layer["conv"][2], was["conv"])
        error = (layer["recurrent"][2] - was["recurrent"]).abs()
        most = was["recurrent"].abs()
        if dtype == "int8":
            key = most.amax(-2, keepdim=True).clamp(min=1e-30).sqrt()
            most = key * (most / key).amax(-1, keepdim=True)
        assert bool((error <= bound * 1.001 * most).all())
        assert not layer["recurrent"][1].any()
        assert not layer["recurrent"][2][1].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_what_prefills_write_at_boundaries_is_packed_after(dtype: str) -> None:
    made, other = cache(dtype), cache(dtype)
    rows = [made.boundary_row(i, snapshot) for i, snapshot in enumerate((3, 1))]
    assert rows == [3, 4]
    made.settle([3, 1])
    for row, snapshot in zip(rows, (3, 1), strict=True):
        made.restore([(1, snapshot)])
        for theirs, own in zip(other.layers, made.layers, strict=True):
            theirs["recurrent"][2], theirs["conv"][2] = own["recurrent"][row], own["conv"][row]
        other.save([(2, 2)])
        other.restore([(1, 2)])
        for theirs, own in zip(other.layers, made.layers, strict=True):
            assert torch.equal(theirs["recurrent"][1], own["recurrent"][1])


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "int8"])
def test_bytes_are_those_of_the_tensors(dtype: str) -> None:
    made = cache(dtype)
    rows = {"auto": 7}.get(dtype, 5)
    held = sum(t.numel() // t.shape[1] * t.itemsize for t in made.saved)
    assert held == 3 * bytes_per_snapshot([LAYER], dtype) or dtype == "auto"
    assert all(t.shape[1] == rows for t in made.saved)


def test_states_that_are_small_already_stay_as_they_are() -> None:
    layer: LayerSpecs = {"recurrent": StateSpec((2, 6, 4), "bfloat16")}
    assert bytes_per_snapshot([layer], "bfloat16") == bytes_per_snapshot([layer], "auto") == 96
    assert bytes_per_snapshot([layer], "int8") == 48 + 4 * 2 * 10
