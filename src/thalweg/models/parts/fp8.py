"""Checkpoints that store matrices in float8 with a scale for each block of 128 x 128 (DeepSeek's layout)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from thalweg.config.hf import ConfigReader
from thalweg.errors import UnsupportedError
from thalweg.quant.blocks import BLOCK


@dataclass(frozen=True, slots=True)
class Fp8Checkpoint:
    """Every linear is in float8 but for the modules whose names are `kept` or begin with one of them and a dot."""

    kept: tuple[str, ...]


# What published checkpoints keep in the model's dtype, whether or not their lists say so.
_ALWAYS_KEPT = ("embed_tokens", "lm_head", "norm", "layernorm", "conv1d", "gate", "shared_expert_gate")


def fp8_test(config: Fp8Checkpoint | None, tensors: Collection[str]) -> Callable[[str], bool]:
    """Whether a checkpoint stores the tensor of a name in float8: as its tensors say, or, where none are known, as
    config.json says."""
    if config is None:
        return lambda _: False
    if tensors:
        return lambda name: f"{name}_scale_inv" in tensors

    def listed(name: str) -> bool:
        module = name.removesuffix(".weight")
        last = module.rsplit(".", 1)[-1]
        if last in _ALWAYS_KEPT or last.endswith(("norm", "in_proj_a", "in_proj_b", "in_proj_ba")):
            return False
        return name.endswith(".weight") and not any(module == k or module.startswith(f"{k}.") for k in config.kept)

    return listed


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
    section.only("scale_fmt", None)
    kept = section.get_str_list("modules_to_not_convert", section.get_str_list("ignored_layers", []))
    section.finish()
    return Fp8Checkpoint(tuple(kept))
