"""The architectures of GGUF files: which family each is, its hyperparameters and the names of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from thalweg.config.gguf.keys import GgufKeys
from thalweg.errors import UnsupportedError
from thalweg.models.family import DecoderConfig, Family, Layout
from thalweg.models.kimi_linear import gguf as kimi_linear
from thalweg.models.kimi_linear.family import KimiLinear
from thalweg.models.parts.gguf import GgufParts
from thalweg.weights.gguf_names import Change, GgufNames

IGNORED = ("rope_freqs.weight",)


@dataclass(frozen=True, slots=True)
class Architecture:
    """`config` gives config.json's object. `spelt` are names that a checkpoint's layout is told by, as its family does:
    those that its tensors are given when the file is loaded."""

    name: str
    family: Family
    config: Callable[[GgufKeys], dict[str, Any]]
    spelt: frozenset[str] = frozenset()
    norms: Change = "none"
    tiled_heads: bool = False
    mlp_norm: str = "ffn_norm"

    def layout(self, config: DecoderConfig) -> Layout:
        return self.family.layout(config, self.spelt)

    def names(self, config: DecoderConfig, layout: Layout, have: Collection[str] = ()) -> GgufNames:
        """How a file with tensors `have` holds a checkpoint of `layout`; how one is written without."""
        names = GgufNames()
        parts = GgufParts(names, config.width, have, self.norms, self.tiled_heads, self.mlp_norm)
        parts.vocab(layout.vocab, config.vocab.size, tied=config.vocab.tied)
        for n, layer in enumerate(config.layers):
            parts.mixer(layout.mixer(n), f"blk.{n}.", layer.mixer)
            parts.feed_forward(layout.mlp(n), f"blk.{n}.", layer.mlp)
        return names

    def ignored(self, config: DecoderConfig) -> tuple[str, ...]:
        """Patterns of tensors that are not read: what drafts tokens stands behind the last layer."""
        return (*IGNORED, f"blk.{len(config.layers)}.*")


ARCHITECTURES = (Architecture(kimi_linear.ARCHITECTURE, KimiLinear(), kimi_linear.config),)


def architecture_of(keys: GgufKeys) -> Architecture:
    """Raises UnsupportedError naming the known ones."""
    known = {architecture.name: architecture for architecture in ARCHITECTURES}
    if keys.architecture not in known:
        raise UnsupportedError(
            f"{keys.where}: general.architecture is {keys.architecture!r:.80}; expected one of {', '.join(known)}"
        )
    return known[keys.architecture]
