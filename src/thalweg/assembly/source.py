"""The model folder or GGUF file: where it is and what its config says. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.assembly.expert_placement import read_placements
from thalweg.config.bounded_json import read_object
from thalweg.config.engine import EngineConfig
from thalweg.config.gguf.keys import GgufKeys, end_ids, sampling_defaults
from thalweg.config.gguf.model import is_gguf, model_name, open_gguf
from thalweg.config.hf import GenerationConfig, read_config, read_generation_config, without_keys
from thalweg.config.hub import hub_name
from thalweg.config.model_source import model_folder
from thalweg.core import SamplingParams
from thalweg.errors import ConfigError, InvalidRequest
from thalweg.models import family_of
from thalweg.models.family import DecoderConfig, Family, weight_plan
from thalweg.models.gguf import Architecture, architecture_of
from thalweg.models.parts.part import WHOLE
from thalweg.models.parts.quantized import GgmlCheckpoint
from thalweg.parallel.placement import Placement
from thalweg.parallel.shards import Shards
from thalweg.quant import GgmlRows, scheme_named
from thalweg.quant.ggml_types import TYPES
from thalweg.weights.plan import Target

if TYPE_CHECKING:
    from thalweg.weights.checkpoint import WeightFiles
    from thalweg.weights.gguf import GgufCheckpoint


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model folder whose config.json was read and understood, or a GGUF file whose metadata was."""

    folder: Path
    family: Family
    config: DecoderConfig
    generation: GenerationConfig
    architecture: str  # as config.json names it
    tensors: frozenset[str] = frozenset()  # names in the checkpoint, once it is open
    mtp: bool = False  # whether the MTP layer belongs to what is loaded
    gguf: Architecture | None = None  # of a GGUF file, which `folder` is then
    placements: Mapping[int, Placement] = field(default_factory=dict)  # of experts over ranks, by layer
    raw: Mapping[str, Any] = field(default_factory=dict)  # config.json's object, or what a GGUF file says as one

    @property
    def name(self) -> str:
        if self.gguf is not None:
            return model_name(self.folder)
        return hub_name(self.folder) or self.folder.resolve().name

    def open_weights(self) -> WeightFiles:
        """Raises CheckpointError or UnsupportedError."""
        from thalweg.weights.checkpoint import Checkpoint
        from thalweg.weights.gguf import GgufCheckpoint

        if self.gguf is None:
            return Checkpoint(self.folder)
        model = open_gguf(self.folder)
        names = self.gguf.names(self.config, self.gguf.layout(self.config), model.tensors)
        return GgufCheckpoint(model, names, self.gguf.ignored(self.config))

    def fitted(
        self,
        checkpoint: WeightFiles | None,
        *,
        mtp: bool = False,
        dequantize: bool | None = False,
        halves: bool = False,
    ) -> ModelSource:
        """With what the checkpoint's tensors say and config.json does not: whether weights stay in blocks, too, and
        with `halves` those in 16 bits as they are, if there are no blocks."""
        tensors = frozenset(checkpoint.tensors) if checkpoint is not None else frozenset()
        config = self.family.fitted(self.config, tensors)
        if checkpoint is not None and self.gguf is not None and not dequantize:
            from thalweg.weights.gguf import GgufCheckpoint

            assert isinstance(checkpoint, GgufCheckpoint)
            config = replace(config, quantized=_blocks(checkpoint, halves))
        return replace(self, config=config, tensors=tensors, mtp=mtp)

    @property
    def ignored(self) -> tuple[str, ...]:
        """Patterns of tensors that may lie in the folder unread."""
        layout = self.family.layout(self.config, self.tensors)
        return layout.ignored if self.mtp or layout.mtp is None else (*layout.ignored, layout.mtp.pattern)

    def plan(self, shards: Shards = WHOLE, quantization: str | None = None) -> list[Target]:
        """The weights of one rank. Raises ConfigError if ranks or --quantization do not suit the model, or it has no
        MTP layer and that is wanted."""
        scheme = scheme_named(quantization)
        return weight_plan(
            self.family, self.config, shards, scheme, self.tensors, mtp=self.mtp, placements=self.placements
        )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """What ends a text: generation_config.json's ids and config.json's."""
        ids = (*self.generation.eos_token_ids, *self.config.eos_token_ids)
        return tuple(dict.fromkeys(i for i in ids if i < self.config.vocab_size))


def open_source(config: EngineConfig) -> ModelSource:
    """Read the config.json of config.model (None: the bundled model), or config.config_file in its place.

    Raises ConfigError, CheckpointError or UnsupportedError.
    """
    architecture_gguf = None
    if config.config_file is not None:
        path = Path(config.config_file).expanduser()
        if not path.is_file():
            raise ConfigError(f"--config-file is {config.config_file!r}, and there is no such file")
        folder, raw = path.parent, read_object(path.parent, path.name)
    elif is_gguf(path := model_folder(config.model, config.revision, weights=config.load_format != "dummy")):
        folder = path
        architecture_gguf, raw = _read_gguf(path)
    else:
        folder, raw = path, read_config(path)
        path = folder / "config.json"
    raw = without_keys(raw, config.ignore_config_key, str(path))
    family = family_of(raw, str(path))
    if config.num_layers is not None:
        raw = family.cut(raw, config.num_layers)
    named = [name for name in family.architectures if name in (raw.get("architectures") or [])]
    architecture = (named or family.architectures)[0]
    generation = _read_generation(folder, config.generation_config)
    read = family.read(raw, str(path))
    placements = {}
    if config.expert_placement is not None:
        placements = read_placements(config.expert_placement, read, config.data_parallel_size)
    return ModelSource(
        folder, family, read, generation, architecture, gguf=architecture_gguf, placements=placements, raw=raw
    )


def _blocks(checkpoint: GgufCheckpoint, halves: bool) -> GgmlCheckpoint | None:
    """What a GGUF file stores in blocks, or else in 16 bits; None if all are plain numbers."""
    kinds: dict[str, str] = {}
    tiles = {name: info.tile for name, info in checkpoint.tensors.items() if info.tile is not None}
    elements: Counter[str] = Counter()
    for name, info in checkpoint.tensors.items():
        kinds[name] = info.dtype
        elements[info.dtype] += prod(info.shape)
    halves = halves and all(TYPES[kind].is_plain for kind in elements)
    kept = {kind: count for kind, count in elements.items() if TYPES[kind].is_kept(halves)}
    return GgmlCheckpoint(kinds, GgmlRows.average(kept), tiles, halves) if kept else None


def _read_gguf(path: Path) -> tuple[Architecture, dict[str, Any]]:
    """A file's architecture, and its hyperparameters as config.json's object."""
    model = open_gguf(path)
    keys = GgufKeys(model)
    architecture = architecture_of(keys)
    raw = architecture.config(keys)
    return architecture, {**raw, "eos_token_id": end_ids(model, raw["vocab_size"])}


def _read_generation(folder: Path, source: str) -> GenerationConfig:
    """As --generation-config says: "auto" from the model's folder, "vllm" or "none" without sampling defaults, else
    from another folder. Raises ConfigError for what no request could have."""
    if source in ("vllm", "none"):
        return GenerationConfig(read_generation_config(folder).eos_token_ids)
    if source != "auto":
        folder = Path(source).expanduser()
        if not (folder / "generation_config.json").is_file():
            raise ConfigError(
                f"--generation-config is {source!r}; expected auto, vllm, none or a folder with generation_config.json"
            )
    if is_gguf(folder):
        generation = GenerationConfig(sampling=sampling_defaults(open_gguf(folder).metadata), where=folder.name)
    else:
        generation = replace(read_generation_config(folder), where=str(folder / "generation_config.json"))
    try:
        SamplingParams(**generation.sampling)
    except InvalidRequest as e:
        raise ConfigError(f"{generation.where}: {e}; --generation-config none ignores its defaults") from None
    return generation
