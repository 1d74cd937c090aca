"""What a family is, and what follows from it for every family alike: the weight plan and the cost of a step.

A family reads its own config keys into a DecoderConfig and gives its checkpoints' tensor names. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from thalweg.errors import ConfigError
from thalweg.models.parts.kda import KdaDims
from thalweg.models.parts.mla import MlaDims
from thalweg.models.parts.mlp import MlpDims
from thalweg.models.parts.moe import MoeDims
from thalweg.models.parts.part import WHOLE, Cost, Names, Step
from thalweg.models.parts.vocab import VocabDims
from thalweg.parallel.shards import Shards
from thalweg.quant import PLAIN, Scheme
from thalweg.weights.plan import Target

Mixer = KdaDims | MlaDims
FeedForward = MlpDims | MoeDims


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """Which part stands where in one layer."""

    mixer: Mixer
    mlp: FeedForward


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A decoder of any family, its layers counted from 0."""

    width: int
    vocab: VocabDims
    layers: tuple[LayerConfig, ...]
    eps: float  # of every RMSNorm
    context_len: int  # tokens
    dtype: str  # of the checkpoint
    eos_token_ids: tuple[int, ...]

    @property
    def vocab_size(self) -> int:
        return self.vocab.size


class Family(Protocol):
    """One family of checkpoints. mypy holds every family in `thalweg.models.FAMILIES` to this."""

    @property
    def model_types(self) -> tuple[str, ...]:
        """model_type in config.json."""

    @property
    def architectures(self) -> tuple[str, ...]:
        """architectures[0] in config.json, for a config that gives no model_type; the first names the family."""

    def read(self, raw: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
        """Read config.json's object; `where` begins every message.

        Raises ConfigError for a missing key, a wrong type, a value that changes the maths and is not supported, a key
        nobody knows, and keys that contradict each other.
        """

    def cut(self, raw: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
        """config.json's object with the first `num_layers` layers only. Raises ConfigError when it has fewer."""

    def vocab_names(self, config: DecoderConfig) -> Names:
        """Tensor names of the embedding, the last norm and the head, as VocabDims.targets takes them."""

    def mixer_names(self, config: DecoderConfig, layer: int) -> Names:
        """Tensor names of a layer's mixer, as its part's `targets` takes them."""

    def mlp_names(self, config: DecoderConfig, layer: int) -> Names:
        """Tensor names of a layer's feed-forward block, likewise."""

    def ignored(self, config: DecoderConfig) -> tuple[str, ...]:
        """Patterns (shell style) of tensors that may be in a checkpoint without being read."""


def weight_plan(family: Family, config: DecoderConfig, shards: Shards = WHOLE, scheme: Scheme = PLAIN) -> list[Target]:
    """Every parameter of this rank, the experts' stored as `scheme` says.

    Raises ConfigError naming --tensor-parallel-size if it does not divide a dimension, or --quantization if there are
    no experts.
    """
    if scheme is not PLAIN and not any(isinstance(layer.mlp, MoeDims) for layer in config.layers):
        what = f"--quantization is {scheme.name!r}, which quantizes experts"
        raise ConfigError(f"{what}, and this {family.architectures[0]} has none; leave it out")
    targets = config.vocab.targets(family.vocab_names(config), config.width, shards)
    for n, layer in enumerate(config.layers):
        mixer, mlp = family.mixer_names(config, n), family.mlp_names(config, n)
        targets += layer.mixer.targets(f"layers.{n}.attn", mixer, config.width, shards, scheme)
        targets += layer.mlp.targets(f"layers.{n}.mlp", mlp, config.width, shards, scheme)
    return targets


def step_costs(config: DecoderConfig, step: Step) -> list[Cost]:
    """Every operation of a step on one rank, in order: what its measured time is held against."""
    vocab = config.vocab.costs(config.width, step)
    parts = [part for layer in config.layers for part in (layer.mixer, layer.mlp)]
    return [*(cost for part in parts for cost in part.costs(config.width, step)), *vocab]
