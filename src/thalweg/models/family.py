"""What a family is, and what follows from it for every family alike: the weight plan and the cost of a step.

A family reads its own config keys into a DecoderConfig and gives its checkpoints' tensor names. No torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from thalweg.errors import ConfigError
from thalweg.models.parts.gdn import GdnDims
from thalweg.models.parts.gqa import GqaDims
from thalweg.models.parts.kda import KdaDims
from thalweg.models.parts.mla import MlaDims
from thalweg.models.parts.mlp import MlpDims
from thalweg.models.parts.moe import MoeDims
from thalweg.models.parts.part import WHOLE, Cost, Names, PlanContext, Step
from thalweg.models.parts.quantized import GgmlCheckpoint, Quantized, stored_as
from thalweg.models.parts.vocab import VocabDims
from thalweg.parallel.placement import Placement
from thalweg.parallel.shards import Shards
from thalweg.quant import PLAIN, Scheme
from thalweg.weights.plan import Source, Target

Mixer = KdaDims | MlaDims | GdnDims | GqaDims
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
    shifted_norms: bool = False  # checkpoints store the weights of RMSNorms less one
    mtp: LayerConfig | None = None  # the layer behind the last one that drafts tokens, if checkpoints have it
    quantized: Quantized | None = None  # how checkpoints store matrices, if not in `dtype`

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

    def fitted(self, config: DecoderConfig, tensors: Collection[str]) -> DecoderConfig:
        """The config, with what a checkpoint's tensors say and config.json does not."""

    def layout(self, config: DecoderConfig, tensors: Collection[str] = ()) -> Layout:
        """The names in a checkpoint that has `tensors`; without any, in the published ones."""


def cut_layers(raw: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """Family.cut for keys that most layouts have: the number of layers and lists of one entry per layer, of config.json
    itself or of its text_config. Raises ConfigError if it has fewer than `num_layers`."""
    text = raw.get("text_config")
    if isinstance(text, Mapping):
        return {**raw, "text_config": cut_layers(text, num_layers)}
    have = raw.get("num_hidden_layers")
    if isinstance(have, int) and num_layers > have:
        raise ConfigError(f"--num-layers is {num_layers}; expected at most {have}, the layers of config.json")
    lists = {key: raw[key][:num_layers] for key in ("layer_types", "mlp_layer_types") if isinstance(raw.get(key), list)}
    return {**raw, **lists, "num_hidden_layers": num_layers}


@dataclass(frozen=True, slots=True)
class MtpNames:
    """Tensor names of the layer that drafts tokens (multi-token prediction)."""

    own: Names  # fc, embedding_norm, hidden_norm, norm
    mixer: Names
    mlp: Names
    pattern: str  # shell style, of all its tensors


class Layout(Protocol):
    """Tensor names of one checkpoint."""

    @property
    def vocab(self) -> Names:
        """Of the embedding, the last norm and the head, as VocabDims.targets takes them."""

    @property
    def ignored(self) -> tuple[str, ...]:
        """Patterns (shell style) of tensors that may be there without being read, those of `mtp` left out."""

    @property
    def mtp(self) -> MtpNames | None:
        """Of the MTP layer; None if the family has none."""

    def mixer(self, layer: int) -> Names:
        """Of a layer's mixer, as its part's `targets` takes them."""

    def mlp(self, layer: int) -> Names:
        """Of a layer's feed-forward block, likewise."""


def weight_plan(
    family: Family,
    config: DecoderConfig,
    shards: Shards = WHOLE,
    scheme: Scheme = PLAIN,
    tensors: Collection[str] = (),
    *,
    mtp: bool = False,
    placements: Mapping[int, Placement] | None = None,
) -> list[Target]:
    """Every parameter of this rank, the experts' stored as `scheme` says, from a checkpoint that has `tensors`; with
    `mtp` the MTP layer's too, below "mtp". `placements` are those of layers whose experts are not divided evenly.

    Raises ConfigError naming --tensor-parallel-size if it does not divide a dimension, or --quantization if there are
    no experts; or if there is no MTP layer.
    """
    if scheme is not PLAIN and not any(isinstance(layer.mlp, MoeDims) for layer in config.layers):
        what = f"--quantization is {scheme.name!r}, which quantizes experts"
        raise ConfigError(f"{what}, and this {family.architectures[0]} has none; leave it out")
    if scheme is not PLAIN and config.quantized is not None:
        what = f"--quantization is {scheme.name!r}"
        raise ConfigError(f"{what}, and this checkpoint is stored in {config.quantized.name} already; leave it out")
    if shards.data_size > 1 and not any(isinstance(layer.mlp, MoeDims) for layer in config.layers):
        what = f"--data-parallel-size is {shards.data_size}, and its ranks divide experts"
        raise ConfigError(f"{what}, of which this {family.architectures[0]} has none; leave it out")
    layout = family.layout(config, tensors)
    ggml = config.quantized if isinstance(config.quantized, GgmlCheckpoint) else GgmlCheckpoint({}, PLAIN)
    stored = stored_as(config.quantized, tensors)
    ctx = PlanContext(config.width, shards, scheme, config.shifted_norms, stored, ggml.tiles, ggml.halves)
    targets = config.vocab.targets(layout.vocab, ctx)
    for n, layer in enumerate(config.layers):
        targets += layer.mixer.targets(f"layers.{n}.attn", layout.mixer(n), ctx)
        of_layer = replace(ctx, placement=(placements or {}).get(n))
        targets += layer.mlp.targets(f"layers.{n}.mlp", layout.mlp(n), of_layer)
    return targets + (_mtp_plan(config, layout.mtp, ctx, tensors) if mtp else [])


def _mtp_plan(
    config: DecoderConfig, names: MtpNames | None, ctx: PlanContext, tensors: Collection[str]
) -> list[Target]:
    layer, width = config.mtp, config.width
    if layer is None or names is None or (tensors and names.own["fc"] not in tensors):
        raise ConfigError("this model has no MTP layer; expected a checkpoint with one, which drafts tokens")
    return [
        ctx.norm("mtp.embedding_norm.weight", names.own["embedding_norm"], width),
        ctx.norm("mtp.hidden_norm.weight", names.own["hidden_norm"], width),
        *ctx.linear("mtp.fc", Source(names.own["fc"], (width, 2 * width))),
        *layer.mixer.targets("mtp.layer.attn", names.mixer, ctx),
        *layer.mlp.targets("mtp.layer.mlp", names.mlp, ctx),
        ctx.norm("mtp.norm.weight", names.own["norm"], width),
    ]


def idle_parameters(config: DecoderConfig) -> int:
    """Of the parameters, those that a token is not multiplied with: the experts that it does not take, and an embedding
    that is not the head too, of which it reads one row."""
    experts = sum(layer.mlp.idle(config.width) for layer in config.layers if isinstance(layer.mlp, MoeDims))
    return experts + (0 if config.vocab.tied else config.vocab.size * config.width)


def step_costs(config: DecoderConfig, step: Step) -> list[Cost]:
    """Every operation of a step on one rank, in order: what its measured time is held against."""
    if config.quantized is not None:
        experts, linears, shared = config.quantized.schemes
        step = replace(step, scheme=experts, linears=linears, shared=shared)
    vocab = config.vocab.costs(config.width, step)
    parts = [part for layer in config.layers for part in (layer.mixer, layer.mlp)]
    return [*(cost for part in parts for cost in part.costs(config.width, step)), *vocab]
