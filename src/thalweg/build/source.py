"""The model folder: where it is and what its config says. No torch."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thalweg.config.bounded_json import read_object
from thalweg.config.engine import EngineConfig
from thalweg.config.hf import GenerationConfig, read_config, read_generation_config, without_keys
from thalweg.config.model_source import model_folder
from thalweg.models import family


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model folder whose config.json was read and understood. `package` is its family's."""

    folder: Path
    package: Any
    config: Any
    generation: GenerationConfig

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """What ends a text: generation_config.json's ids and config.json's."""
        ids = (*self.generation.eos_token_ids, *self.config.eos_token_ids)
        return tuple(dict.fromkeys(i for i in ids if i < self.config.vocab_size))


def open_source(config: EngineConfig) -> ModelSource:
    """Read the config.json of config.model (None: the bundled model), or config.config_file in its place.

    Raises ConfigError, CheckpointError or UnsupportedError.
    """
    if config.config_file is not None:
        path = Path(config.config_file).expanduser()
        folder, raw = path.parent, read_object(path.parent, path.name)
    else:
        path = model_folder(config.model) / "config.json"
        folder, raw = path.parent, read_config(path.parent)
    raw = without_keys(raw, config.ignore_config_key, str(path))
    package = importlib.import_module(family(raw, str(path)))
    if config.num_layers is not None:
        raw = package.cut(raw, config.num_layers)
    return ModelSource(folder, package, package.Config.from_dict(raw, str(path)), read_generation_config(folder))
