"""The modules of a rank before their ops run: opened and checked, built, filled with weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.assembly.cores import usable_cores
from thalweg.assembly.source import ModelSource, open_source
from thalweg.config import env
from thalweg.config.engine import EngineConfig
from thalweg.errors import ConfigError
from thalweg.layers.context import BuildContext
from thalweg.ops.registry import Resolver
from thalweg.parallel.mesh import Mesh
from thalweg.parallel.shards import Shards
from thalweg.weights.checkpoint import WeightFiles
from thalweg.weights.dummy import fill
from thalweg.weights.load import bytes_to_load, check, load
from thalweg.weights.plan import Target, local_bytes, local_elements
from thalweg.weights.progress import progress_bar

THREAD_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model folder that fits its config, and this rank's share of its weights. Nothing is allocated yet."""

    config: EngineConfig  # every "auto" decided
    source: ModelSource
    device: torch.device
    checkpoint: WeightFiles | None  # None: --load-format dummy
    plan: list[Target]
    rank: int  # of all on this host

    def context(self, mesh: Mesh, resolver: Resolver) -> BuildContext:
        """What the modules build themselves with."""
        return BuildContext(
            self.device,
            getattr(torch, self.config.dtype),
            mesh,
            resolver,
            self.config.state_dtype,
            {target.name: target for target in self.plan},
            block_size=self.config.block_size,
            placements=self.source.placements,
        )

    def fill(self, params: Mapping[str, Tensor]) -> None:
        """Load, or draw, the weights into parameters by the plan's names."""
        name, show = self.source.name, None if self.rank == 0 else False
        if self.checkpoint is None:
            total = sum(p.numel() * p.element_size() for p in params.values())
            with progress_bar(f"drawing {name}", total, show=show) as advance:
                fill(self.plan, params.__getitem__, self.config.seed, advance)
            return
        with progress_bar(f"loading {name}", bytes_to_load(self.plan, self.checkpoint), show=show) as advance:
            load(self.plan, self.checkpoint, params.__getitem__, ignore=self.source.ignored, progress=advance)


def open_model(config: EngineConfig, tp_rank: int, data_rank: int = 0, *, mtp: bool = False) -> OpenedModel:
    """Open a model, with its MTP layer if `mtp`.

    Raises ConfigError, CheckpointError or UnsupportedError for whatever would fail later.
    """
    source = open_source(config)
    c = source.config
    rank = tp_rank + config.tensor_parallel_size * data_rank
    device = choose_device(config, rank - config.node_rank * config.ranks_per_node)
    config = config.resolve(
        device=str(device), checkpoint_dtype=c.dtype, context_len=c.context_len, layers=len(c.layers)
    )
    checkpoint = source.open_weights() if config.load_format != "dummy" else None
    source = source.fitted(checkpoint, mtp=mtp, dequantize=config.dequantize, halves=config.keeps_halves)
    plan = source.plan(shards_of(config, tp_rank, data_rank), config.quantization)
    if device.type == "cpu":
        _choose_threads(sum(local_elements(plan).values()) * 4, config.ranks_per_node)
    if checkpoint is not None:
        check(plan, checkpoint, source.ignored)  # before anything is allocated by what config.json says
    _check_memory(local_bytes(plan, getattr(torch, config.dtype).itemsize), device)
    return OpenedModel(config, source, device, checkpoint, plan, rank)


def shards_of(config: EngineConfig, tp_rank: int = 0, data_rank: int = 0) -> Shards:
    """A rank's share of dimensions."""
    return Shards(tp_rank, config.tensor_parallel_size, data_rank, config.data_parallel_size)


def choose_device(config: EngineConfig, rank: int) -> torch.device:
    """The device of this host's rank of that number. Ranks take CUDA devices 0, 1, ... unless --device names one.
    Raises ConfigError."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            if not torch.cuda.is_available():
                raise RuntimeError("torch sees no CUDA device")
            device = torch.device("cuda", rank if device.index is None else device.index + rank)
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).strip().splitlines()[0].split(". ")[0][:160]
        raise ConfigError(f"--device is {config.device!r}, which this machine or torch does not have: {reason}") from e
    return device


def _choose_threads(weight_bytes: int, ranks: int) -> None:
    """Torch threads of this rank, unless OMP_NUM_THREADS says how many.

    Threads that meet after every op of a small model wait longer than they work, and far longer on a machine with
    anything else to do (docs/experiments/host-loop.md): one more thread for every THREAD_BYTES of weights.
    """
    if env.read("OMP_NUM_THREADS") is None:
        torch.set_num_threads(max(1, min(usable_cores() // ranks, weight_bytes // THREAD_BYTES)))


def _check_memory(weight_bytes: int, device: torch.device) -> None:
    """Raises ConfigError where the weights alone are more than the device has: it would swap, or die late."""
    if device.type == "cuda":
        have = torch.cuda.mem_get_info(device)[1]
    else:
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if weight_bytes > have:
        raise ConfigError(
            f"the weights take {weight_bytes / 2**30:.1f} GiB on this rank and {device} has {have / 2**30:.1f} GiB;"
            " raise --tensor-parallel-size, or take a smaller --dtype or --quantization fp8"
        )
