"""What a model would be here, without its weights: built on torch's meta device, from config.json and headers alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from thalweg import ops as _ops  # noqa: F401 -- registers every op's implementations
from thalweg.assembly.expert_placement import describe_experts
from thalweg.assembly.info import OpChoice
from thalweg.assembly.model import choose_device, shards_of
from thalweg.assembly.rank import (
    cache_memory,
    describe_layer,
    device_name,
    op_choices,
    recorded_bytes,
    resolve_sample,
    split_cache,
)
from thalweg.assembly.source import ModelSource, open_source
from thalweg.assembly.steps import choose_steps
from thalweg.cache.memory import MemorySplit
from thalweg.cache.specs import LayerSpecs, bytes_per_sequence, bytes_per_token
from thalweg.config.engine import EngineConfig
from thalweg.errors import ConfigError
from thalweg.layers.context import BuildContext
from thalweg.models.decoder import Decoder
from thalweg.models.family import idle_parameters
from thalweg.models.parts.quantized import GgmlCheckpoint
from thalweg.ops.registry import Choice, Resolver, Where
from thalweg.parallel.data_ranks import DataRanks
from thalweg.parallel.mesh import Mesh
from thalweg.quant.ggml_types import TYPES
from thalweg.weights.checkpoint import WeightFiles
from thalweg.weights.load import check
from thalweg.weights.plan import Target, parameters

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}


class Cost(msgspec.Struct, frozen=True):
    """Bytes on one rank when computed in `dtype`, with weights quantized so."""

    dtype: str
    quantization: str | None  # of the experts' weights
    weight_bytes: int
    bytes_per_token: int
    bytes_per_sequence: int


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """Plain data about a model under an engine's options."""

    name: str
    folder: str
    architecture: str
    device: str
    tensor_parallel_size: int
    data_parallel_size: int
    experts: str | None  # how data-parallel ranks divide them
    vocab_size: int
    context_len: int  # tokens, the model's own
    sampling_defaults: str  # of requests, and which file they come from
    parameters: int  # over all ranks, as the checkpoint counts them
    active_parameters: int  # that one token is multiplied with
    layer_kinds: dict[str, int]
    layers: list[str]  # one line each: what it is and what it caches
    weight_files: str  # what the folder's weight files are, and that they fit
    cost: Cost
    checkpoint_cost: Cost  # the same in the checkpoint's own dtype, which may not be what is computed in here
    memory: MemorySplit | None  # None: it does not fit, for the reason below
    memory_error: str | None
    decode_steps: str | None  # how steps of decode rows alone would run, and why; None if the memory does not do
    prefill_steps: str | None  # and those with prompts
    ops: list[OpChoice]


@dataclass(frozen=True, slots=True)
class _MetaContext(BuildContext):
    """Parameters on the meta device, ops as they would be resolved on `target`."""

    target: torch.device = field(kw_only=True)

    @property
    def where(self) -> Where:
        return Where(self.target.type, self.dtype_name)


def describe(config: EngineConfig) -> Inspection:
    """Look at the model that `config` names, for the device it names. No weight is read or allocated.

    Weight files are compared with config.json by their headers, where there are any. Limits that do not fit in memory
    are told, not raised. Raises ConfigError, CheckpointError or UnsupportedError as starting the engine would.
    """
    source = open_source(config)
    checkpoint = _open_checkpoint(source, config)
    c = source.config
    device = choose_device(config, 0)
    config = config.resolve(
        device=str(device), checkpoint_dtype=c.dtype, context_len=c.context_len, layers=len(c.layers)
    )
    source = source.fitted(checkpoint, dequantize=config.dequantize, halves=config.keeps_halves)
    c = source.config
    plan = source.plan(shards_of(config), config.quantization)
    resolver = Resolver(config.op_preference, quantize_activations=config.quantize_activations)
    model = _build(source, config, config.dtype, device, resolver, config.quantization)
    resolve_sample(resolver, device, c.vocab_size)
    plain = config.dtype == c.dtype and config.quantization is None
    native = model if plain else _build(source, config, c.dtype, device, Resolver())
    cost = _cost(model, config.dtype, config.quantization)
    recorded = recorded_bytes(config, device, resolver, c)
    memory, memory_error = _split(config, model.cache_specs, device, cost.weight_bytes, recorded, c.context_len)
    steps = None if memory is None else choose_steps(config, device, resolver, memory, recorded)
    kinds = Counter(f"{type(layer.attn).__name__} + {type(layer.mlp).__name__}" for layer in model.layers)
    return Inspection(
        name=source.name,
        folder=str(source.folder),
        architecture=source.architecture,
        device=device_name(device),
        tensor_parallel_size=config.tensor_parallel_size,
        data_parallel_size=config.data_parallel_size,
        experts=describe_experts(c, source.placements, config.data_parallel_size),
        vocab_size=c.vocab_size,
        context_len=c.context_len,
        sampling_defaults=source.generation.describe(),
        parameters=parameters(plan),
        active_parameters=parameters(plan) - idle_parameters(c),
        layer_kinds=dict(kinds),
        layers=[describe_layer(*x) for x in zip(model.layers, model.cache_specs, strict=True)],
        weight_files=_describe_weights(source, plan, checkpoint, config),
        cost=cost,
        checkpoint_cost=_cost(native, c.dtype),
        memory=memory,
        memory_error=memory_error,
        decode_steps=None if steps is None else steps.decodes,
        prefill_steps=None if steps is None else steps.prefills,
        ops=op_choices(resolver),
    )


def resolve_ops(config: EngineConfig) -> tuple[str, list[Choice]]:
    """The name of the model that `config` names, and the ops that it resolves on a rank. No weight is looked at.

    Raises ConfigError, CheckpointError or UnsupportedError as starting the engine would.
    """
    source, device = open_source(config), choose_device(config, 0)
    c = source.config
    config = config.resolve(
        device=str(device), checkpoint_dtype=c.dtype, context_len=c.context_len, layers=len(c.layers)
    )
    resolver = Resolver(config.op_preference, quantize_activations=config.quantize_activations)
    _build(source, config, config.dtype, device, resolver, config.quantization)
    resolve_sample(resolver, device, c.vocab_size)
    return source.name, resolver.explain()


def _build(
    source: ModelSource,
    config: EngineConfig,
    dtype: str,
    device: torch.device,
    resolver: Resolver,
    quantization: str | None = None,
) -> Any:
    data = DataRanks(0, config.data_parallel_size)
    mesh, meta = Mesh(0, config.tensor_parallel_size, data=data), torch.device("meta")
    context = _MetaContext(
        meta,
        getattr(torch, dtype),
        mesh,
        resolver,
        config.state_dtype,
        {target.name: target for target in source.plan(shards_of(config), quantization)},
        block_size=config.block_size,
        placements=source.placements,
        target=device,
    )
    return Decoder(context, source.config)


def _cost(model: Any, dtype: str, quantization: str | None = None) -> Cost:
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    specs = model.cache_specs
    return Cost(dtype, quantization, weight_bytes, bytes_per_token(specs), bytes_per_sequence(specs))


def _split(
    config: EngineConfig,
    specs: list[LayerSpecs],
    device: torch.device,
    weight_bytes: int,
    recorded: int,
    context_len: int,
) -> tuple[MemorySplit | None, str | None]:
    """The split under the given limits, or why they do not fit."""
    try:
        memory = cache_memory(config, device, Mesh(), recorded)
        if device.type == "cuda" and config.cache_memory is None:
            memory -= weight_bytes  # an engine measures what is left once they are there
        return split_cache(config, specs, memory, device, Mesh(), context_len), None
    except ConfigError as e:
        return None, str(e)


def _open_checkpoint(source: ModelSource, config: EngineConfig) -> WeightFiles | None:
    """The weight files' headers; None if the folder has none, or other layers are asked for than it has."""
    if config.config_file is not None or config.num_layers is not None:
        return None
    held = source.gguf or any(p.suffix in WEIGHT_SUFFIXES for p in source.folder.iterdir())
    return source.open_weights() if held else None


def _describe_weights(
    source: ModelSource, plan: list[Target], checkpoint: WeightFiles | None, config: EngineConfig
) -> str:
    """One line about the weight files; raises what loading would for files that are damaged or do not fit."""
    if checkpoint is None and (config.config_file is not None or config.num_layers is not None):
        return f"not looked at ({'--config' if config.config_file else '--num-layers'})"
    if checkpoint is None:
        return "no weight files in the folder; only --load-format dummy can run it"
    check(plan, checkpoint, source.ignored)
    tensors = checkpoint.tensors
    files = len({checkpoint.path_of(name) for name in tensors})
    dtypes = ", ".join(sorted({t.dtype for t in tensors.values()}))
    count = f"{checkpoint.count:,} tensors in {files} file{'s' if files != 1 else ''}"
    kept = ""
    if source.gguf is not None and any(not TYPES[t.dtype].is_plain for t in tensors.values()):
        kept = "; blocks are " + (f"brought to {config.dtype} as they are loaded" if config.dequantize else "kept")
    elif isinstance(source.config.quantized, GgmlCheckpoint):
        kept = "; 16 bits are kept"
    return f"{count} ({dtypes}), all fit {checkpoint.described_by}{kept}"
