"""The model families, each a package with config.py, model.py and weights.py, looked up by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thalweg.config.hf import ConfigReader
from thalweg.errors import UnsupportedError

# model_type in config.json -> package
FAMILIES = {"kimi_linear": "thalweg.models.kimi_linear"}

# architectures[0] in config.json -> model_type, for a config that gives no model_type
ARCHITECTURES = {"KimiLinearForCausalLM": "kimi_linear"}


def family(raw: Mapping[str, Any], where: str = "config.json") -> str:
    """The package of the family that config.json names by model_type, or else by architectures.

    Raises UnsupportedError naming the known families.
    """
    reader = ConfigReader(raw, where)
    name = reader.get_str("model_type", None)
    key = "model_type" if name is not None else "architectures"
    if name is None:
        architectures = reader.get_str_list("architectures", [])
        name = next((ARCHITECTURES[a] for a in architectures if a in ARCHITECTURES), None)
    if name not in FAMILIES:
        raise UnsupportedError(f"{reader.error(key, 'one of ' + ', '.join(sorted(FAMILIES)))}")
    return FAMILIES[name]
