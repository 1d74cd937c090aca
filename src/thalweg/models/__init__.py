"""The model families, looked up by what config.json calls them. Importing this needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thalweg.config.hf import ConfigReader
from thalweg.errors import UnsupportedError
from thalweg.models.family import Family
from thalweg.models.kimi_k2.family import KimiK2
from thalweg.models.kimi_linear.family import KimiLinear
from thalweg.models.qwen.family import Qwen3Next, Qwen35

FAMILIES: tuple[Family, ...] = (KimiLinear(), KimiK2(), Qwen3Next(), Qwen35())


def family_of(raw: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family that config.json names by model_type, or else by architectures.

    Raises UnsupportedError naming the known model types.
    """
    by_type = {name: family for family in FAMILIES for name in family.model_types}
    by_architecture = {name: family for family in FAMILIES for name in family.architectures}
    reader = ConfigReader(raw, where)
    name = reader.get_str("model_type", None)
    if name is not None and name in by_type:
        return by_type[name]
    if name is None:
        for architecture in reader.get_str_list("architectures", []):
            if architecture in by_architecture:
                return by_architecture[architecture]
    key = "model_type" if name is not None else "architectures"
    raise UnsupportedError(f"{reader.error(key, 'one of ' + ', '.join(sorted(by_type)))}")
