"""The cache's tensors: their shapes by kind, and slots that begin from zero."""

from __future__ import annotations

import pytest
import torch

from thalweg.cache.specs import DTYPE_BYTES, LayerSpecs, PagedSpec, StateSpec
from thalweg.cache.storage import ALIGNMENT, CacheStorage

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_a_layer_gets_its_tensors_by_name(dtype: str) -> None:
    layers: list[LayerSpecs] = [
        {"keys": PagedSpec((2, 8), dtype), "values": PagedSpec((2, 4), dtype)},
        {},
        {"conv": StateSpec((3, 5), dtype), "recurrent": StateSpec((2, 4, 4), dtype)},
    ]
    cache = CacheStorage(layers, num_blocks=6, num_slots=4, block_size=16, device=CPU)
    shapes = [{name: tuple(t.shape) for name, t in layer.items()} for layer in cache.layers]
    assert shapes == [
        {"keys": (7, 16, 2, 8), "values": (7, 16, 2, 4)},
        {},
        {"conv": (5, 3, 5), "recurrent": (5, 2, 4, 4)},
    ]
    for layer, specs in zip(cache.layers, layers, strict=True):
        for name, tensor in layer.items():
            assert str(tensor.dtype) == f"torch.{dtype}"
            assert tensor.nbytes == len(tensor) * specs[name].bytes * (16 if "conv" not in layer else 1)
            assert not tensor.float().any()


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_resetting_slots_zeroes_the_states_of_these_alone(dtype: str) -> None:
    layer: LayerSpecs = {
        "state": StateSpec((3, 7), dtype),
        "other": StateSpec((5,), "float32"),
        "latent": PagedSpec((9,), dtype),
    }
    cache = CacheStorage([layer] * 3, num_blocks=4, num_slots=4, block_size=2, device=CPU)
    for tensors in cache.layers:
        for tensor in tensors.values():
            tensor.copy_(torch.ones(tensor.shape))
    cache.reset_slots(torch.tensor([3, 1]))
    for tensors in cache.layers:
        assert bool((tensors["latent"].float() == 1).all())
        for name in ("state", "other"):
            assert tensors[name].float().flatten(1).amin(1).tolist() == [1, 0, 1, 0, 1]
            assert tensors[name].float().flatten(1).amax(1).tolist() == [1, 0, 1, 0, 1]


def test_states_are_contiguous_aligned_and_reset_by_one_launch_per_shape() -> None:
    layer: LayerSpecs = {"conv": StateSpec((3, 5), "bfloat16"), "recurrent": StateSpec((3, 3, 3), "float32")}
    cache = CacheStorage([layer] * 20, num_blocks=0, num_slots=6, block_size=64, device=CPU)
    for name, tensor in ((n, t) for tensors in cache.layers for n, t in tensors.items()):
        first = cache.layers[0][name]
        assert tensor.is_contiguous()
        assert (tensor.data_ptr() - first.data_ptr()) % ALIGNMENT == 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        cache.reset_slots(torch.tensor([2]))
    assert sum(e.count for e in profile.key_averages() if e.key == "aten::index_fill_") == 2


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_a_snapshot_keeps_every_state_of_a_slot_and_nothing_else(dtype: str) -> None:
    layer: LayerSpecs = {
        "state": StateSpec((3, 7), dtype),
        "other": StateSpec((5,), "float32"),
        "latent": PagedSpec((9,), dtype),
    }
    cache = CacheStorage([layer] * 3, num_blocks=4, num_slots=4, block_size=2, device=CPU, num_snapshots=2)
    first, second = cache.saved_row(1), cache.saved_row(2)
    assert (first, second) == (5, 6)
    states = [tensors[name] for tensors in cache.layers for name in ("state", "other")]
    for i, state in enumerate(states):
        state.copy_(torch.arange(7).view(-1, *[1] * (state.ndim - 1)) + i)
    cache.copy_slots([(3, second)])
    cache.copy_slots([(4, first)])
    cache.reset_slots(torch.tensor([1, 2, 3, 4]))
    cache.copy_slots([(second, 2)])
    cache.copy_slots([(first, 1)])
    for i, state in enumerate(states):
        expected = [i, 4 + i, 3 + i, 0, 0, 4 + i, 3 + i]
        assert state.float().flatten(1).amin(1).tolist() == expected
        assert state.float().flatten(1).amax(1).tolist() == expected
    assert not any(tensors["latent"].float().any() for tensors in cache.layers)


@pytest.mark.parametrize(
    ("pairs", "launches"),
    [
        ([(2, 1)], 2),
        ([(i, i) for i in range(1, 65)], 2),  # of sequences that began together
        ([(64 - i, 64 - i) for i in range(64)], 2),
        ([(1, 5), (2, 6), (4, 7), (3, 9)], 6),
    ],
)
def test_copies_are_one_launch_per_shape_for_slots_that_follow_each_other(
    pairs: list[tuple[int, int]], launches: int
) -> None:
    layer: LayerSpecs = {"conv": StateSpec((3, 5), "bfloat16"), "recurrent": StateSpec((2, 3, 3), "float32")}
    cache = CacheStorage([layer] * 20, num_blocks=0, num_slots=70, block_size=64, device=CPU, num_snapshots=70)
    for states in cache.states:
        states.copy_(torch.arange(states.numel()).view(states.shape) % 251)
    for copy, source, target in (
        (cache.save, lambda slot, _: slot, lambda _, snapshot: cache.saved_row(snapshot)),
        (cache.restore, lambda _, snapshot: cache.saved_row(snapshot), lambda slot, _: slot),
    ):
        before = [states.clone() for states in cache.states]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            copy(pairs)
        assert sum(e.count for e in profile.key_averages() if e.key == "aten::copy_") == launches
        for states, was in zip(cache.states, before, strict=True):
            for pair in pairs:
                was[:, target(*pair)] = was[:, source(*pair)]
            assert torch.equal(states, was)
            states.copy_(torch.arange(states.numel()).view(states.shape).flip(0) % 253)
