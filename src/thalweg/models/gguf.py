"""The architectures of GGUF files: which family each is, its hyperparameters and the names of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from thalweg.config.gguf.keys import GgufKeys
from thalweg.errors import UnsupportedError
from thalweg.models.family import DecoderConfig, Family, Layout
from thalweg.models.kimi_k2 import gguf as kimi_k2
from thalweg.models.kimi_k2.family import KimiK2
from thalweg.models.kimi_linear import gguf as kimi_linear
from thalweg.models.kimi_linear.family import KimiLinear
from thalweg.models.parts.gguf import GgufParts
from thalweg.models.parts.gguf_keys import common_keys
from thalweg.models.parts.moe import MoeDims
from thalweg.models.qwen import gguf as qwen
from thalweg.models.qwen.family import Qwen3Next, Qwen35
from thalweg.weights.gguf_names import Change, GgufNames

IGNORED = ("rope_freqs.weight",)


@dataclass(frozen=True, slots=True)
class Architecture:
    """`config` gives config.json's object, `metadata` the keys that say the same in a file. `spelt` are names that a
    checkpoint's layout is told by, as its family does: those that its tensors are given when the file is loaded;
    `published` those of the layout that it is converted to."""

    name: str
    family: Family
    config: Callable[[GgufKeys], dict[str, Any]]
    metadata: Callable[[DecoderConfig], dict[str, Any]]
    spelt: frozenset[str] = frozenset()
    published: frozenset[str] = frozenset()
    norms: Change = "none"
    tiled_heads: bool = False
    mlp_norm: str = "ffn_norm"

    def layout(self, config: DecoderConfig, *, published: bool = False) -> Layout:
        return self.family.layout(config, self.published if published else self.spelt)

    def keys(self, config: DecoderConfig) -> dict[str, Any]:
        """All hyperparameters to write. Raises UnsupportedError for what llama.cpp's files cannot say."""
        keys = common_keys(
            width=config.width,
            vocab_size=config.vocab_size,
            eps=config.eps,
            context_len=config.context_len,
            blocks=[layer.mlp for layer in config.layers],
            drafting=int(config.mtp is not None),
        )
        return {f"{self.name}.{key}": value for key, value in (keys | self.metadata(config)).items()}

    def names(self, config: DecoderConfig, layout: Layout, have: Collection[str] = ()) -> GgufNames:
        """How a file with tensors `have` holds a checkpoint of `layout`; how one is written without. The layer that
        drafts tokens belongs to it if config.mtp is there."""
        names = GgufNames()
        parts = GgufParts(names, config.width, have, self.norms, self.tiled_heads, self.mlp_norm)
        parts.vocab(layout.vocab, config.vocab.size, tied=config.vocab.tied)
        for n, layer in enumerate(config.layers):
            parts.mixer(layout.mixer(n), f"blk.{n}.", layer.mixer)
            parts.feed_forward(layout.mlp(n), f"blk.{n}.", layer.mlp)
        if config.mtp is not None and layout.mtp is not None:
            at = f"blk.{len(config.layers)}."
            parts.drafting(layout.mtp.own, at)
            parts.mixer(layout.mtp.mixer, at, config.mtp.mixer)
            parts.feed_forward(layout.mtp.mlp, at, config.mtp.mlp)
        return names

    def ignored(self, config: DecoderConfig) -> tuple[str, ...]:
        """Patterns of tensors that need not be read: what drafts tokens stands behind the last layer."""
        return (*IGNORED, f"blk.{len(config.layers)}.*")


_QWEN: dict[str, Any] = {
    "config": qwen.config,
    "spelt": qwen.SPELT,
    "norms": "shifted",
    "mlp_norm": "post_attention_norm",
}

ARCHITECTURES = (
    Architecture(kimi_linear.ARCHITECTURE, KimiLinear(), kimi_linear.config, kimi_linear.metadata),
    Architecture(kimi_k2.ARCHITECTURE, KimiK2(), kimi_k2.config, kimi_k2.metadata),
    Architecture(qwen.NEXT, Qwen3Next(), metadata=qwen.metadata, published=qwen.PACKED, **_QWEN),
    Architecture(qwen.DENSE, Qwen35(), metadata=qwen.metadata_35, published=qwen.SPELT, tiled_heads=True, **_QWEN),
    Architecture(qwen.MOE, Qwen35(), metadata=qwen.metadata_35, published=qwen.SPELT, tiled_heads=True, **_QWEN),
)


def architecture_of(keys: GgufKeys) -> Architecture:
    """Raises UnsupportedError naming the known ones."""
    known = {architecture.name: architecture for architecture in ARCHITECTURES}
    if keys.architecture not in known:
        raise UnsupportedError(
            f"{keys.where}: general.architecture is {keys.architecture!r:.80}; expected one of {', '.join(known)}"
        )
    return known[keys.architecture]


def architecture_for(family: Family, config: DecoderConfig) -> Architecture:
    """What a model of `family` is written as."""
    fitting = [architecture for architecture in ARCHITECTURES if type(architecture.family) is type(family)]
    if len(fitting) > 1:
        has_experts = isinstance(config.layers[0].mlp, MoeDims)
        fitting = [architecture for architecture in fitting if (architecture.name == qwen.MOE) == has_experts]
    return fitting[0]
