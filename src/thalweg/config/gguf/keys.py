"""Typed reading of a GGUF model's hyperparameters: each family's keys begin with its architecture's name."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from thalweg.config.gguf.model import GgufModel
from thalweg.errors import ConfigError

_MISSING: Any = object()


class GgufKeys:
    """Getters by a key's name behind the architecture's. A wrong type raises ConfigError, and so does a missing key
    without a default. Bounds are checked by the family, which reads what these become as any config.json."""

    def __init__(self, model: GgufModel) -> None:
        self.architecture = model.architecture
        self.where = str(model.path)
        self.tensors = model.tensors
        self._metadata: Mapping[str, Any] = model.metadata

    def get_int(self, key: str, default: Any = _MISSING) -> Any:
        """A number, or an array with one for each layer if those that are not 0 are the same."""
        value = self._get(key, default, "an integer")
        if isinstance(value, list) and value is not default:
            numbers = [number for number in value if type(number) is int and number != 0]
            if not all(type(number) is int for number in value) or len(set(numbers)) != 1:
                raise self.error(key, "an integer, or one and the same for each layer")
            return numbers[0]
        return self._typed(key, default, int, "an integer")

    def get_bool(self, key: str, default: Any = _MISSING) -> Any:
        return self._typed(key, default, bool, "a bool")

    def get_str(self, key: str, default: Any = _MISSING) -> Any:
        return self._typed(key, default, str, "a string")

    def get_float(self, key: str, default: Any = _MISSING) -> Any:
        """As the shortest decimal that is the same in float32: 1e-05, not 9.99999974e-06."""
        value = self._typed(key, default, float, "a number")
        return value if value is default else shortest(value)

    def get_list(self, key: str, default: Any = _MISSING) -> Any:
        return self._typed(key, default, list, "an array")

    def per_layer(self, key: str, layers: int) -> list[int]:
        """An array with an entry per layer, or a number that holds for all."""
        value = self._get(key, _MISSING, "an integer for each layer")
        values = value if isinstance(value, list) else [value] * layers
        if len(values) < layers or not all(isinstance(v, int) for v in values):
            raise self.error(key, f"an integer for each of {layers} layers")
        return [int(v) for v in values[:layers]]

    def agree(self, key: str, derived: Any) -> None:
        """Refuse a key that repeats what others say but says something else. A missing one agrees."""
        value = self._get(key, derived, "")
        if value != derived:
            raise self.error(key, f"{derived!r}, from the other keys and the tensors")

    def error(self, key: str, expected: str) -> ConfigError:
        full = f"{self.architecture}.{key}"
        return ConfigError(f"{self.where}: {full} is {self._metadata.get(full)!r:.80}; expected {expected}")

    def _get(self, key: str, default: Any, expected: str) -> Any:
        full = f"{self.architecture}.{key}"
        if full in self._metadata:
            return self._metadata[full]
        if default is _MISSING:
            raise ConfigError(f"{self.where}: {full} is missing; expected {expected}")
        return default

    def _typed(self, key: str, default: Any, kind: type, expected: str) -> Any:
        value = self._get(key, default, expected)
        if value is default:
            return value
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(key, expected)
        return value


_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_msg|>")


def end_ids(model: GgufModel, vocab_size: int) -> list[int]:
    """Ids that end a text: the file's own, and by name those that end a turn, since some files name the end of a
    document alone."""
    tokens = model.metadata.get("tokenizer.ggml.tokens")
    ids = [model.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    if isinstance(tokens, list):
        ids += [i for i, token in enumerate(tokens) if token in _TURN_ENDS]
    return list(dict.fromkeys(i for i in ids if type(i) is int and 0 <= i < vocab_size))


_SAMPLING = {
    "temperature": "general.sampling.temp",
    "top_p": "general.sampling.top_p",
    "top_k": "general.sampling.top_k",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


def sampling_defaults(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling values that a file suggests, by SamplingParams' names. What is not a number is passed over."""
    given = {name: metadata.get(key) for name, key in _SAMPLING.items()}
    return {
        name: shortest(value) if isinstance(value, float) else value
        for name, value in given.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def sampling_metadata(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that suggest them."""
    return {
        _SAMPLING[name]: value if name == "top_k" else float(value)
        for name, value in sampling.items()
        if name in _SAMPLING
    }


def shortest(value: float) -> float:
    """The number of the fewest decimal digits that rounds to the same float32."""
    try:
        packed = struct.pack("<f", value)
    except OverflowError:
        return value
    for digits in range(1, 9):
        number = float(f"{value:.{digits}g}")
        if struct.pack("<f", number) == packed:
            return number
    return value
