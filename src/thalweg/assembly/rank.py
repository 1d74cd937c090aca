"""Builds one rank: model, weights, cache, runner. Where "auto" options are decided and memory is split."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from thalweg import ops as _ops  # noqa: F401 -- registers every op's implementations
from thalweg.assembly.expert_placement import check_same, describe_experts
from thalweg.assembly.identity import cache_identity
from thalweg.assembly.info import EngineInfo, OpChoice, OpSpan
from thalweg.assembly.model import open_model
from thalweg.assembly.steps import choose_steps, why_not_recorded
from thalweg.assembly.warmup import make_kernels, warm_up
from thalweg.cache.host_storage import HostStorage
from thalweg.cache.memory import MemorySplit, default_num_seqs, split_memory
from thalweg.cache.specs import LayerSpecs, bytes_per_sequence, bytes_per_token
from thalweg.cache.storage import CacheStorage
from thalweg.config.engine import EngineConfig
from thalweg.errors import CheckpointError, ConfigError
from thalweg.layers.attributes import find_directly
from thalweg.models.decoder import Decoder
from thalweg.models.family import DecoderConfig
from thalweg.ops.all_gather import ALL_GATHER, AllGatherDims
from thalweg.ops.all_reduce import areas_of
from thalweg.ops.moe import exchange
from thalweg.ops.registry import Resolver, Where, dims_of
from thalweg.ops.sample import SAMPLE, SAMPLE_OVER_RANKS, Sample, SampleDims, SampleOverRanksDims
from thalweg.parallel.data_ranks import join_data_ranks
from thalweg.parallel.mesh import Mesh, join_mesh
from thalweg.parallel.peers import map_data_peers, map_peers
from thalweg.runner.cache_file import CacheIndex, images
from thalweg.runner.cache_file import read as read_file
from thalweg.runner.graphs import MAX_ROWS, Share
from thalweg.runner.recorded import MAX_ROWS as MAX_RECORDED_ROWS
from thalweg.runner.recorded import most_bytes
from thalweg.runner.slots import SlotTable
from thalweg.runner.step import ModelRunner
from thalweg.sampling.grammars import Grammars
from thalweg.sampling.sampler import Sampler
from thalweg.sampling.table import SamplingTable
from thalweg.weights.plan import parameters

_log = logging.getLogger(__name__)
CPU_NUM_SEQS = 64
CPU_CACHE_MEMORY = 4 << 30  # default on a CPU, where blocks cost memory only once they are written


class Laps:
    """Seconds by part, each from the end of the one before."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def end(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part], self._began = now - self._began, now


def build_rank(
    config: EngineConfig,
    tp_rank: int,
    meeting: str,
    grammars: Grammars | None = None,
    data_rank: int = 0,
    data_meeting: str = "",
    listener: socket.socket | None = None,
    joined: Callable[[Mesh], object] = lambda _: None,
) -> tuple[ModelRunner, EngineInfo]:
    """Everything one rank needs to execute plans. With several ranks, all of them call this at the same time; those
    whose tokens count get `grammars`. `meeting`: see join_mesh; `data_meeting`: see join_data_ranks. `listener` is for
    whichever of these is a place on a network. `joined` is called with the mesh once this rank is in it, from where on
    it may have to wait for others."""
    laps = Laps()
    opened = open_model(config, tp_rank, data_rank)
    config, source, device = opened.config, opened.source, opened.device
    c = source.config
    assert config.max_num_batched_tokens is not None
    laps.end("device")
    hosts, data_ranks = config.nodes_per_model, config.data_parallel_size
    mesh = join_mesh(tp_rank, config.tensor_parallel_size, meeting, device, hosts=hosts, listener=listener)
    joined(mesh)
    if data_ranks > 1:
        over = {"part": tp_rank, "hosts": config.nnodes}
        mesh.data = join_data_ranks(data_rank, data_ranks, data_meeting, device, **over, listener=listener)
        if config.expert_placement is not None and config.nnodes > 1:
            check_same(mesh.data, source.placements, config.expert_placement)
        map_data_peers(mesh.data, device, exchange.areas_of(data_ranks))
    map_peers(mesh, device, areas_of(mesh.tp_size))
    resolver = Resolver(config.op_preference, quantize_activations=config.quantize_activations)
    model = Decoder(opened.context(mesh, resolver), c)
    over_ranks = resolve_over_ranks(resolver, device, mesh, c.vocab_size)
    sample = resolve_sample(resolver, device, c.vocab_size)
    opened.fill(dict(model.named_parameters()))
    find_directly(model)
    if device.type == "cuda":
        torch.cuda.synchronize()
    mesh.await_loaded(device)
    laps.end("weights")

    specs: list[LayerSpecs] = model.cache_specs
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    recorded = recorded_bytes(config, device, resolver, c)
    split = split_cache(config, specs, cache_memory(config, device, mesh, recorded), device, mesh, c.context_len)
    snapshots = split.num_snapshots, split.snapshot_dtype, split.num_staged
    cache = CacheStorage(specs, split.num_blocks, split.num_slots, config.block_size, device, *snapshots)
    eos = source.eos_token_ids
    sampling = SamplingTable(
        split.num_slots, c.vocab_size, device=device, eos_token_ids=frozenset(eos), grammars=grammars
    )
    slots = SlotTable(cache, sampling, split.max_model_len)
    host = None
    if split.num_host_blocks or split.num_host_snapshots:
        host = HostStorage(cache, split.num_host_blocks, split.num_host_snapshots)
    identity = cache_identity(config, source, device.type, [repr(layer) for layer in specs])
    index = read_cache(host, config, identity, mesh, device) if host is not None else None
    steps = choose_steps(config, device, resolver, split, recorded)
    laps.end("cache")
    sampler = Sampler(sampling, sample, over_ranks)
    share = resolve_share(resolver, device, mesh)
    gather = None if over_ranks is None else model.lm_head.gathered
    tiers = host, split.keeps_prefixes
    runner = ModelRunner(
        model,
        slots,
        sampler,
        mesh,
        steps.graph_sizes,
        steps.prefill_tokens,
        *tiers,
        share,
        steps.recorded_rows,
        gather,
        recorded,
    )
    runner.identity, runner.cache_index = identity, index
    if device.type == "cuda":
        make_kernels(runner, partial(model, layers=model.one_of_each()), split, config.max_num_batched_tokens)
        laps.end("kernels")
        runner.capture()
        laps.end("graphs")
        warm_up(runner, split, config.max_num_batched_tokens)
        laps.end("warm-up")
    elif steps.recorded_rows:
        steps = replace(steps, not_recorded=runner.record())
        laps.end("recording")
    info = EngineInfo(
        name=source.name,
        folder=str(source.folder),
        architecture=source.architecture,
        device=device_name(device),
        dtype=config.dtype,
        state_dtype=config.state_dtype,
        quantization=config.quantization or (c.quantized.name if c.quantized else None),
        tensor_parallel_size=config.tensor_parallel_size,
        data_parallel_size=config.data_parallel_size,
        experts=describe_experts(c, source.placements, config.data_parallel_size),
        vocab_size=c.vocab_size,
        parameters=parameters(opened.plan),
        max_model_len=split.max_model_len,
        max_num_seqs=split.num_slots,
        max_num_batched_tokens=config.max_num_batched_tokens,
        long_prefill_token_threshold=config.long_prefill_token_threshold,
        block_size=config.block_size,
        num_blocks=split.num_blocks,
        num_slots=split.num_slots,
        keeps_prefixes=split.keeps_prefixes,
        num_snapshots=split.num_snapshots,
        bytes_per_snapshot=split.bytes_per_snapshot,
        num_staged=split.num_staged,
        snapshot_interval=config.snapshot_interval,
        num_host_blocks=split.num_host_blocks,
        num_host_snapshots=split.num_host_snapshots,
        identity=identity,
        bytes_per_token=bytes_per_token(specs),
        bytes_per_sequence=bytes_per_sequence(specs),
        weight_bytes=weight_bytes,
        memory_split=_describe(weight_bytes, split),
        layers=[describe_layer(layer, spec) for layer, spec in zip(model.layers, specs, strict=True)],
        eos_token_ids=list(eos),
        decode_steps=steps.decodes,
        prefill_steps=steps.prefills,
        ops=op_choices(resolver),
        start_seconds=laps.seconds,
    )
    return runner, info


def read_cache(
    host: HostStorage, config: EngineConfig, identity: str, mesh: Mesh, device: torch.device
) -> CacheIndex | None:
    """Fill host memory with what an earlier engine wrote into --cache-folder: what it is, or None, on all ranks, if
    there is nothing, or any rank's file is damaged or of something else, which is logged."""
    if config.cache_folder is None:
        return None
    found = max(images(Path(config.cache_folder)), default=None)
    image, read = -1, None  # type: int, CacheIndex | None
    if found is not None:
        try:
            image, read = read_file(host, found, identity, mesh.tp_rank)
        except (CheckpointError, OSError) as e:
            _log.warning("the prefix cache begins empty: %s", e)
    least, most = mesh.minimum(image, device), -mesh.minimum(-image, device)
    if least == most and least >= 0:
        return read
    if read is not None:
        _log.warning("the prefix cache begins empty: %s is not whole on every rank", found)
    return None


def resolve_share(resolver: Resolver, device: torch.device, mesh: Mesh) -> Share | None:
    """What gives every rank the ids of rank 0, if ranks map each other's memory; None: their broadcast."""
    if mesh.tp_size == 1 or mesh.peers is None:
        return None
    dims = AllGatherDims(row_bytes=torch.int64.itemsize, ranks=mesh.tp_size, mapped=mesh.mapped)
    gather = resolver.resolve(ALL_GATHER, Where(device.type, "int64"), dims)
    return lambda ids_R: gather(ids_R.unsqueeze(1), mesh)[:, 0]


def resolve_over_ranks(
    resolver: Resolver, device: torch.device, mesh: Mesh, vocab_size: int
) -> Callable[..., Tensor] | None:
    """Op "sample_over_ranks" of this rank, if ranks map each other's memory."""
    if mesh.tp_size == 1 or mesh.peers is None:
        return None
    dims = SampleOverRanksDims(V=vocab_size, ranks=mesh.tp_size, mapped=mesh.mapped)
    op = resolver.resolve(SAMPLE_OVER_RANKS, Where(device.type, "float32"), dims)

    def over_ranks(
        logits_RV: Tensor, temperatures_N: Tensor, seeds_N: Tensor, positions_R: Tensor, slots_R: Tensor
    ) -> Tensor:
        return op(logits_RV, temperatures_N, seeds_N, positions_R, slots_R, mesh)

    return over_ranks


def resolve_sample(resolver: Resolver, device: torch.device, vocab_size: int) -> Sample:
    """Op "sample", the last to be resolved. Raises ConfigError where a preference then names an op that nobody uses."""
    sample = resolver.resolve(SAMPLE, Where(device.type, "float32"), SampleDims(V=vocab_size))
    if unused := resolver.unused_preferences():
        used = ", ".join(sorted({choice.op for choice in resolver.explain()}))
        raise ConfigError(f"--op (op_preference) names {unused[0]!r}, which this model does not use; it uses {used}")
    return sample


def op_choices(resolver: Resolver) -> list[OpChoice]:
    return [
        OpChoice(
            choice.op,
            dims_of(choice.dims),
            [OpSpan(span.tokens.first, span.tokens.last, span.name) for span in choice.table],
            list(choice.refused),
        )
        for choice in resolver.explain()
    ]


def recorded_bytes(config: EngineConfig, device: torch.device, resolver: Resolver, c: DecoderConfig) -> int:
    """Bytes that recordings of steps on a CPU may write; 0 if there are none."""
    rows = min(MAX_RECORDED_ROWS, config.max_num_seqs or CPU_NUM_SEQS)
    if device.type != "cpu" or why_not_recorded(config, device, resolver, None, rows):
        return 0
    return most_bytes(rows, c.vocab_size, c.width)


def cache_memory(config: EngineConfig, device: torch.device, mesh: Mesh, recorded: int) -> int:
    """Bytes for the cache on this rank; the same number on every rank. Unless --cache-memory says how many, they are
    what `recorded` bytes of recordings leave."""
    if config.cache_memory is not None:
        return config.cache_memory
    if device.type != "cuda":
        return min(CPU_CACHE_MEMORY, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2) - recorded
    free, total = torch.cuda.mem_get_info(device)
    memory = int(config.gpu_memory_utilization * total) - (total - free)
    memory = mesh.minimum(memory, device)
    if memory <= 0:
        raise ConfigError(
            f"--gpu-memory-utilization {config.gpu_memory_utilization} leaves nothing for the cache:"
            f" {(total - free) >> 20} MiB of {total >> 20} MiB are taken;"
            " raise it, free memory on the GPU, or use more ranks"
        )
    return memory


def split_cache(
    config: EngineConfig, specs: list[LayerSpecs], memory: int, device: torch.device, mesh: Mesh, context_len: int
) -> MemorySplit:
    """`memory` bytes, the same on every rank, divided by the config's limits, or by what the device allows for those
    left open. Raises ConfigError when the limits do not fit."""
    seqs, reason = config.max_num_seqs, "--max-num-seqs"
    if seqs is None and device.type != "cuda":
        seqs, reason = CPU_NUM_SEQS, "the default on a CPU"
    elif seqs is None:
        seqs, reason = default_num_seqs(
            specs,
            block_size=config.block_size,
            memory_bytes=memory,
            device_bytes=mesh.minimum(torch.cuda.mem_get_info(device)[1], device),
            max_model_len=config.max_model_len,
            most=MAX_ROWS,
        )
    split = split_memory(
        specs,
        block_size=config.block_size,
        memory_bytes=memory,
        max_num_seqs=seqs,
        max_model_len=config.max_model_len,
        model_max_len=context_len,
        prefix_caching=config.enable_prefix_caching,
        host_bytes=config.cpu_cache_memory or 0,
        snapshot_dtype=config.snapshot_dtype,
    )
    return replace(split, num_slots_from=reason)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _describe(weight_bytes: int, split: MemorySplit) -> list[str]:
    return [f"weights         {weight_bytes / 2**20:.2f} MiB", *split.describe()]


def describe_layer(layer: nn.Module, specs: LayerSpecs) -> str:
    parts = f"{type(layer.attn).__name__} + {type(layer.mlp).__name__}"
    token, sequence = bytes_per_token([specs]), bytes_per_sequence([specs])
    costs = [f"{cost} B per {unit}" for cost, unit in ((token, "token"), (sequence, "sequence")) if cost]
    return f"{parts}: {' and '.join(costs) or 'caches nothing'}"
