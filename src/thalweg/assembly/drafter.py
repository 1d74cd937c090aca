"""A decoder with its MTP layer, both with their weights, on one rank and without a runner: for measurements."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from thalweg import ops as _ops  # noqa: F401 -- registers every op's implementations
from thalweg.assembly.model import OpenedModel, open_model
from thalweg.cache.storage import CacheStorage
from thalweg.config.engine import EngineConfig
from thalweg.errors import ConfigError
from thalweg.layers.linear import HeadInSteps
from thalweg.models.decoder import Decoder
from thalweg.models.mtp import Mtp
from thalweg.ops.registry import Resolver
from thalweg.parallel.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Drafter:
    opened: OpenedModel
    decoder: Decoder
    mtp: Mtp
    head: HeadInSteps

    @property
    def device(self) -> torch.device:
        return self.opened.device

    def cache(self, num_blocks: int, num_slots: int) -> CacheStorage:
        """Empty, one layer of it more than the decoder has: the MTP layer's, the last."""
        specs = [*self.decoder.cache_specs, self.mtp.cache_specs]
        return CacheStorage(specs, num_blocks, num_slots, self.opened.config.block_size, self.device)


def build_drafter(config: EngineConfig) -> Drafter:
    """Raises ConfigError for more than one rank or a model without an MTP layer, and what opening a model raises."""
    if config.tensor_parallel_size != 1:
        raise ConfigError(
            f"--tensor-parallel-size is {config.tensor_parallel_size}; expected 1: drafts are measured on one rank"
        )
    opened = open_model(replace(config, dequantize=True), 0, mtp=True)  # a head in blocks is not a matrix
    context = opened.context(Mesh(), Resolver(config.op_preference, quantize_activations=config.quantize_activations))
    decoder = Decoder(context, opened.source.config)
    mtp = Mtp(context.below("mtp"), opened.source.config)
    opened.fill(dict(decoder.named_parameters()) | {f"mtp.{name}": p for name, p in mtp.named_parameters()})
    return Drafter(opened, decoder, mtp, HeadInSteps(context, decoder.lm_head))
