"""The model folder: where it is and what its config says. No torch."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thalweg.config.hf import GenerationConfig, read_config, read_generation_config
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


def open_source(model: str | None) -> ModelSource:
    """Read the folder's config (None: the bundled model). Raises ConfigError, CheckpointError or UnsupportedError."""
    folder = model_folder(model)
    raw = read_config(folder)
    where = str(folder / "config.json")
    package = importlib.import_module(family(raw, where))
    return ModelSource(folder, package, package.Config.from_dict(raw, where), read_generation_config(folder))
