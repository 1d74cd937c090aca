"""Checkpoints that store matrices quantized: all linears in float8 with a scale for each block of 128 x 128 (DeepSeek's
layout), or experts in int4 with a scale for each group of 32 (compressed-tensors, pack-quantized)."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from thalweg.config.hf import ConfigReader
from thalweg.errors import ConfigError, UnsupportedError
from thalweg.quant import FP8_EXPERTS, FP8_LINEARS, INT4_EXPERTS, PLAIN, Scheme
from thalweg.quant.blocks import BLOCK
from thalweg.quant.ggml import Tile
from thalweg.quant.ggml_types import TYPES
from thalweg.quant.int4 import GROUP

# What published checkpoints keep in the model's dtype, whether or not their lists say so.
_ALWAYS_KEPT = ("embed_tokens", "lm_head", "norm", "layernorm", "conv1d", "gate", "shared_expert_gate")
_PATTERN = "re:"  # before an entry of compressed-tensors' `ignore` that is a regular expression


def _may_be_quantized(name: str) -> bool:
    last = name.removesuffix(".weight").rsplit(".", 1)[-1]
    kept = last in _ALWAYS_KEPT or last.endswith(("norm", "in_proj_a", "in_proj_b", "in_proj_ba"))
    return name.endswith(".weight") and not kept


def _with_parents(module: str) -> Iterator[str]:
    """The name, and those of the modules around it. A plan asks for each matrix of each expert, so a list of modules is
    not gone through for every one of them."""
    end = len(module)
    while end > 0:
        yield module[:end]
        end = module.rfind(".", 0, end)


@dataclass(frozen=True, slots=True)
class Fp8Checkpoint:
    """Every linear is in float8 but for the modules whose names are `kept` or begin with one of them and a dot."""

    kept: frozenset[str]

    name = "fp8"
    schemes = (FP8_EXPERTS, FP8_LINEARS, FP8_EXPERTS)

    def suffixed(self, name: str) -> str:
        return f"{name}_scale_inv"

    def lists(self, name: str) -> bool:
        return _may_be_quantized(name) and not any(m in self.kept for m in _with_parents(name.removesuffix(".weight")))


@dataclass(frozen=True, slots=True)
class Int4Checkpoint:
    """Every linear is in int4 but for the modules that `ignore` names, or matches from the start after "re:"."""

    ignore: tuple[str, ...]

    name = "int4"
    schemes = (INT4_EXPERTS, PLAIN, PLAIN)

    def suffixed(self, name: str) -> str:
        return f"{name}_packed"

    def lists(self, name: str) -> bool:
        """Names are matched with the prefix of a text model beside a vision model and without it."""
        module = name.removesuffix(".weight")
        spelt = {module, module.removeprefix("language_model."), f"language_model.{module}"}
        return _may_be_quantized(name) and not any(self._is_ignored(m) for m in spelt)

    def _is_ignored(self, module: str) -> bool:
        return any(
            re.match(entry.removeprefix(_PATTERN), module) if entry.startswith(_PATTERN) else module == entry
            for entry in self.ignore
        )


@dataclass(frozen=True, slots=True)
class GgmlCheckpoint:
    """A GGUF file some of whose tensors are blocks: `kinds` has every tensor's type by its name, `tiles` of those with
    columns in another order what that is. `average` stands for all matrices. `halves`: matrices in 16 bits are kept as
    they are too."""

    kinds: Mapping[str, str]
    average: Scheme
    tiles: Mapping[str, Tile] = field(default_factory=dict)
    halves: bool = False

    @property
    def name(self) -> str:
        """The types of blocks that it has, or of halves."""
        return ", ".join(sorted({kind for kind in self.kinds.values() if TYPES[kind].is_kept(self.halves)}))

    @property
    def schemes(self) -> tuple[Scheme, Scheme, Scheme]:
        return self.average, self.average, self.average

    def stored_as(self, name: str) -> str:
        return self.kinds.get(name, "none")


Quantized = Fp8Checkpoint | Int4Checkpoint | GgmlCheckpoint
"""`schemes` are those of routed experts, of linears and of shared experts."""


def stored_as(config: Quantized | None, tensors: Collection[str]) -> Callable[[str], str]:
    """What a checkpoint stores the tensor of a name as ("none": no scheme): as its tensors say, or, where none are
    known, as config.json says."""
    if config is None:
        return lambda _: "none"
    if isinstance(config, GgmlCheckpoint):
        return config.stored_as
    if tensors:
        return lambda name: config.name if config.suffixed(name) in tensors else "none"
    return lambda name: config.name if config.lists(name) else "none"


def read_quantized(reader: ConfigReader) -> Quantized | None:
    """quantization_config in any of the formats, or None without one. Raises UnsupportedError naming another one."""
    section = reader.get_section("quantization_config")
    if section is not None and section.get_str("quant_method") == "compressed-tensors":
        return _read_int4(section)
    return read_fp8(reader)


def read_fp8(reader: ConfigReader) -> Fp8Checkpoint | None:
    """quantization_config, or None without one. Raises UnsupportedError naming a method that is not this one."""
    section = reader.get_section("quantization_config")
    if section is None:
        return None
    method = section.get_str("quant_method")
    if method != "fp8":
        raise UnsupportedError(
            f"{section.where}: quant_method is {method!r}; only 'fp8' in blocks of {BLOCK} x {BLOCK} is supported"
        )
    if section.get_int_list("weight_block_size", []) != [BLOCK, BLOCK]:
        raise UnsupportedError(f"{section.error('weight_block_size', f'[{BLOCK}, {BLOCK}]')}")
    section.only("fmt", "e4m3")
    section.only("activation_scheme", "dynamic")
    section.get_str("scale_fmt", None)  # of activations, which are not quantized here
    kept = section.get_str_list("modules_to_not_convert", section.get_str_list("ignored_layers", []))
    section.finish()
    return Fp8Checkpoint(frozenset(kept))


def _read_int4(section: ConfigReader) -> Int4Checkpoint:
    for key, expected in (("format", "pack-quantized"), ("quantization_status", "compressed")):
        section.only(key, expected)
    section.only("kv_cache_scheme", None)
    ignore = section.get_str_list("ignore", [])
    section.skip("global_compression_ratio", "version")
    group = _only_group(section)
    group.only("targets", ["Linear"])
    for key in ("input_activations", "output_activations"):
        group.only(key, None)
    group.only("format", "pack-quantized")
    weights = group.get_section("weights")
    if weights is None:
        raise group.error("weights", "an object")
    for key, value in (("num_bits", 4), ("type", "int"), ("strategy", "group"), ("group_size", GROUP)):
        weights.only(key, value)
    weights.only("symmetric", True)
    for key in ("dynamic", "actorder", "block_structure"):
        weights.only(key, None)
    weights.skip("observer", "observer_kwargs", "scale_dtype", "zp_dtype")  # of how it was quantized
    for part in (weights, group, section):
        part.finish()
    for entry in ignore:
        try:
            re.compile(entry.removeprefix(_PATTERN))
        except re.error as e:
            raise ConfigError(f"{section.where}: ignore has {entry!r}, no regular expression: {e}") from None
    return Int4Checkpoint(tuple(ignore))


def _only_group(section: ConfigReader) -> ConfigReader:
    groups = section.get_section("config_groups")
    group = None if groups is None else groups.get_section("group_0")
    if groups is None or group is None:
        raise section.error("config_groups", "one group, 'group_0'")
    groups.finish()
    return group
