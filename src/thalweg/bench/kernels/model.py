"""What a model asks of its ops: the dimensions, and who serves how many tokens, of one built without its weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from thalweg.assembly.inspect import resolve_ops
from thalweg.config.engine import EngineConfig
from thalweg.ops.registry import Choice, Op

PUBLISHED = Path(__file__).with_name("kimi_linear_48b.json")
"""The config of Kimi-Linear-48B-A3B, whose layers the published results are about."""


@dataclass(frozen=True)
class ModelOps:
    """Ops of the model that `config` names, as they are resolved on its device. One build, when first asked."""

    config: EngineConfig

    @cached_property
    def _resolved(self) -> tuple[str, list[Choice]]:
        return resolve_ops(self.config)

    @property
    def name(self) -> str:
        file = self.config.config_file
        return self._resolved[0] if file is None else Path(file).name

    @property
    def choices(self) -> list[Choice]:
        return self._resolved[1]

    def dims(self, op: Op[Any, Any]) -> list[Any]:
        """The dimensions that layers ask for, each once, in the model's order."""
        return [c.dims for c in self.choices if c.op == op.name]

    def names(self) -> set[str]:
        return {c.op for c in self.choices}

    def serving(self, op: Op[Any, Any], dims: Any, tokens: int) -> str | None:
        """The implementation that the model runs; None if no layer asks for that."""
        found: Iterator[Choice] = (c for c in self.choices if c.op == op.name and c.dims == dims)
        return next((span.name for c in found for span in c.table if tokens in span.tokens), None)

    def shared_by(self, ranks: int) -> ModelOps:
        """One rank's ops of the same model on so many."""
        return ModelOps(replace(self.config, tensor_parallel_size=ranks))
