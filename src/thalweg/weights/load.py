"""Fill a model's parameters from a checkpoint by its plan: check all, then copy each slice into place."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import Tensor

from thalweg.errors import CheckpointError, UnsupportedError
from thalweg.quant import FP8_LINEARS
from thalweg.quant.ggml_types import TYPES
from thalweg.weights.checkpoint import WeightFiles, refuse
from thalweg.weights.fill import GetParam, put, widened
from thalweg.weights.plan import Source, Target, check_targets, checkpoint_shapes, everywhere
from thalweg.weights.safetensors import LOADABLE, PLAIN_DTYPES, unsupported_dtype

_DEVICE_THREADS = 8  # host-to-device copies wait for pages from disk; several keep the disk busy


def load(
    plan: Sequence[Target],
    checkpoint: WeightFiles,
    get_param: GetParam,
    *,
    ignore: Iterable[str] = (),
    progress: Callable[[int], None] | None = None,
) -> None:
    """Copy this rank's part of every planned tensor into its parameter, cast to the parameter's dtype or quantized.

    `get_param(name)` gives the parameter, of the target's local shape, on any device. `ignore` are
    shell-style patterns of tensors the checkpoint may hold unread. `progress` is called with the bytes of
    each part copied, from this thread; they add up to bytes_to_load(). Each tensor is read once, in file
    order. Raises CheckpointError when tensors are missing, unexpected or misshapen and UnsupportedError when
    one is quantized, before anything is copied.
    """
    check(plan, checkpoint, ignore)
    params, found = _params(plan, get_param), checkpoint.tensors
    uses: dict[str, list[tuple[Target, Source]]] = defaultdict(list)
    for target in plan:
        if not target.covered:
            params[target.name].zero_()
        for source in (*target.sources, *target.scales):
            uses[source.name].append((target, source))

    def _read(source: Source, target: Target) -> Tensor:
        read = checkpoint.read_blocks if target.scheme.as_stored else checkpoint.read
        return read(source.name, source.shard_dim, *source.stored_range)

    def copy(name: str) -> int:
        done = 0
        for target, source in uses[name]:
            tensor = _read(source, target)
            done += _read_bytes(source, found[source.name].dtype)
            if source.scales is not None:
                scales = _read(source.scales, target)
                done += _read_bytes(source.scales, found[source.scales.name].dtype)
                tensor = widened(tensor, scales, source)
            put(tensor, source, target, params.__getitem__)
        checkpoint.release(name)
        return done

    on_device = any(p.device.type != "cpu" for p in params.values())
    threads = min(_DEVICE_THREADS, os.cpu_count() or 1) if on_device else 1
    with ThreadPoolExecutor(threads) as pool:
        for done in pool.map(copy, [name for name in found if name in uses]):
            if progress is not None:
                progress(done)


def bytes_to_load(plan: Sequence[Target], checkpoint: WeightFiles) -> int:
    """Bytes of the checkpoint that load() copies on this rank."""
    tensors = checkpoint.tensors
    return sum(_read_bytes(s, tensors[s.name].dtype) for t in plan for s in t.read if s.name in tensors)


def _read_bytes(source: Source, dtype: str) -> int:
    """Of what `source` reads of a tensor in `dtype`, as the file stores it."""
    if dtype in LOADABLE:
        return prod(source.read_shape) * LOADABLE[dtype].itemsize
    kind = TYPES.get(dtype)
    return 0 if kind is None else prod(source.read_shape) * kind.bytes // kind.elements


def check(plan: Sequence[Target], checkpoint: WeightFiles, ignore: Iterable[str] = ()) -> None:
    """Compare the plan with the checkpoint's headers; nothing is read.

    Raises CheckpointError listing missing, unexpected and misshapen tensors, UnsupportedError for a dtype
    that cannot be loaded.
    """
    check_targets(plan)
    patterns = tuple(ignore)
    expected, found = checkpoint_shapes(plan), checkpoint.tensors
    special = {s.name: t.scheme.file_dtype for t in everywhere(plan) if t.scales for s in t.sources}
    special |= {s.name: FP8_LINEARS.file_dtype for t in plan for s in t.sources if s.scales is not None}
    for name in expected:
        if name in found and not _fits(found[name].dtype, special.get(name)):
            dtype, path = found[name].dtype, checkpoint.path_of(name)
            raise UnsupportedError(unsupported_dtype(name, dtype, path, special.get(name)))
    missing = [name for name in expected if name not in found]
    extra = [n for n in found if n not in expected and not any(fnmatchcase(n, p) for p in patterns)]
    misshapen = [
        f"{name} {list(found[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    refuse(checkpoint.folder, checkpoint.described_by, missing, extra, misshapen)


def _fits(dtype: str, special: str | None) -> bool:
    """Whether a tensor can be stored in `dtype` of which the plan says `special` (None: any plain number)."""
    return dtype in PLAIN_DTYPES or dtype in TYPES if special is None else dtype == special


def _params(plan: Sequence[Target], get_param: GetParam) -> dict[str, Tensor]:
    """Every target's parameters, detached, their shapes and dtypes checked against the plan."""
    params = {}
    for target in plan:
        for stored in target.parameters:
            name = target.name + stored.suffix
            param = params[name] = get_param(name).detach()
            if tuple(param.shape) != stored.shape:
                raise CheckpointError(f"parameter {name} is {list(param.shape)}; the plan fills {list(stored.shape)}")
            if stored.dtype != "model" and param.dtype != getattr(torch, stored.dtype):
                raise CheckpointError(f"parameter {name} is {param.dtype}; the plan says {stored.dtype}")
    return params
