"""Strict reading of config.json: typed keys, nothing unknown passed over, bounded before it is trusted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from thalweg.config.bounded_json import read_object
from thalweg.errors import ConfigError

# Keys that libraries write into every config.json and that say nothing about the forward pass.
HOUSEKEEPING_KEYS = frozenset(
    {
        "_attn_implementation_autoset",
        "_commit_hash",
        "_from_model_config",
        "_name_or_path",
        "add_cross_attention",
        "architectures",
        "attention_dropout",
        "auto_map",
        "bad_words_ids",
        "begin_suppress_tokens",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "length_penalty",
        "max_length",
        "min_length",
        "model_type",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "output_scores",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "router_aux_loss_coef",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "typical_p",
        "use_bfloat16",
        "use_cache",
    }
)

CHECKPOINT_DTYPES = ("bfloat16", "float16", "float32")
MAX_INT = 2**31 - 1
_REQUIRED: Any = object()


class ConfigReader:
    """Typed getters over one JSON object that remember which keys were read.

    `where` begins every message, "config.json" or "config.json: linear_attn_config". A getter raises
    ConfigError when a key is missing without a default, or has another type or a value out of bounds. An
    explicit null counts as missing.
    """

    def __init__(self, raw: Mapping[str, Any], where: str, path: str = "") -> None:
        self._raw = raw
        self.where = where
        self._path = path  # of this object in the file, "linear_attn_config." for a section
        self._read: set[str] = set()

    def get_int(self, key: str, default: Any = _REQUIRED, *, low: int = 0, high: int = MAX_INT) -> int:
        """An integer from low to high (true and 3.0 are none)."""
        value = self._get(key, default, "an integer")
        if value is default:
            return cast(int, value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(key, value, "an integer")
        if not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}")
        return value

    def get_float(self, key: str, default: Any = _REQUIRED, *, low: float = -math.inf, high: float = math.inf) -> float:
        """A finite number from low to high; integers are taken too."""
        value = self._get(key, default, "a number")
        if value is default:
            return cast(float, value)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self._wrong(key, value, "a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not (math.isfinite(number) and low <= number <= high):
            bounds = "" if math.isinf(low) and math.isinf(high) else f" from {low} to {high}"
            raise self.error(key, f"a finite number{bounds}")
        return number

    def get_str(self, key: str, default: Any = _REQUIRED) -> str:
        return cast(str, self._typed(key, default, str, "a string"))

    def get_bool(self, key: str, default: Any = _REQUIRED) -> bool:
        return cast(bool, self._typed(key, default, bool, "true or false"))

    def get_int_list(self, key: str, default: Any = _REQUIRED) -> list[int]:
        value = self._typed(key, default, list, "a list of integers")
        if value is not default and not all(isinstance(x, int) and not isinstance(x, bool) for x in value):
            raise self._wrong(key, value, "a list of integers")
        return cast(list[int], value)

    def get_str_list(self, key: str, default: Any = _REQUIRED) -> list[str]:
        value = self._typed(key, default, list, "a list of strings")
        if value is not default and not all(isinstance(x, str) for x in value):
            raise self._wrong(key, value, "a list of strings")
        return cast(list[str], value)

    def get_token_ids(self, key: str) -> tuple[int, ...]:
        """Token ids given as one integer or a list of them; () when the key is missing."""
        value = self._get(key, (), "a token id or a list of them")
        ids = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(x, int) and not isinstance(x, bool) and 0 <= x <= MAX_INT for x in ids):
            raise self._wrong(key, value, "a token id or a list of them")
        return tuple(dict.fromkeys(ids))

    def get_section(self, key: str) -> ConfigReader | None:
        """A reader of the nested object; None when the key is missing. Call its finish() too."""
        value = self._typed(key, None, dict, "an object")
        return None if value is None else ConfigReader(value, f"{self.where}: {key}", f"{self._path}{key}.")

    def only(self, key: str, supported: Any, *, default: Any = _REQUIRED) -> None:
        """Refuse any value of a key but the one that is supported; the key changes the maths.

        A missing key counts as `default`, or as supported where none is given. If null is supported, so is any value
        that says nothing.
        """
        value = self._get(key, supported if default is _REQUIRED else default, "")
        if supported is None and says_nothing(value):
            return
        if type(value) is not type(supported) or value != supported:
            raise ConfigError(f"{self.where}: {key} is {_show(value)}; only {_show(supported)} is supported")

    def agree(self, key: str, derived: Any) -> None:
        """Refuse a key that repeats what other keys say but says something else. A missing key agrees."""
        value = self._get(key, derived, "")
        if value != derived or isinstance(value, bool) != isinstance(derived, bool):
            raise ConfigError(f"{self.where}: {key} is {_show(value)}; expected {_show(derived)} from the other keys")

    def skip(self, *keys: str) -> None:
        """Count keys as read that say nothing here: dimensions of a part that no layer has."""
        self._read.update(keys)

    def error(self, key: str, expected: str) -> ConfigError:
        """The error for a value that was read but cannot be: raise what this returns."""
        return ConfigError(f"{self.where}: {key} is {_show(self._raw.get(key))}; expected {expected}")

    def finish(self, ignored: Iterable[str] = ()) -> None:
        """Raise ConfigError naming every key that was neither read nor listed as ignored and says something."""
        unknown = sorted(set(self._raw) - self._read - set(ignored))
        unknown = [key for key in unknown if not says_nothing(self._raw[key])]
        if unknown:
            names = ", ".join(_clip(k) for k in unknown[:20]) + (" ..." if len(unknown) > 20 else "")
            raise ConfigError(
                f"{self.where}: unknown {'keys' if len(unknown) > 1 else 'key'} {names}, not supported; if it does not"
                f" change the model, --ignore-config-key {_clip(self._path + unknown[0])} ignores it"
            )

    def _get(self, key: str, default: Any, expected: str) -> Any:
        self._read.add(key)
        value = self._raw.get(key)
        if value is None:
            if default is _REQUIRED:
                raise ConfigError(f"{self.where}: {key} is missing; expected {expected}")
            return default
        return value

    def _typed(self, key: str, default: Any, kind: type, expected: str) -> Any:
        value = self._get(key, default, expected)
        if value is not default and not isinstance(value, kind):
            raise self._wrong(key, value, expected)
        return value

    def _wrong(self, key: str, value: Any, expected: str) -> ConfigError:
        return ConfigError(f"{self.where}: {key} is {_show(value)} ({type(value).__name__}); expected {expected}")


def says_nothing(value: Any) -> bool:
    """Whether a key with this value is as good as left out: null, false, empty, or an object of nothing else."""
    if isinstance(value, dict):
        return all(says_nothing(v) for v in value.values())
    return value is None or value is False or value in ("", [])


def without_keys(raw: Mapping[str, Any], keys: Iterable[str], where: str = "config.json") -> dict[str, Any]:
    """`raw` as though the named keys were not in it; "section.key" is one of a nested object. Raises ConfigError for a
    key that is not there, which is spelled wrongly or belongs to another model."""
    kept = dict(raw)
    for key in keys:
        section, _, name = key.rpartition(".")
        if key in kept:
            del kept[key]
        elif isinstance(kept.get(section), dict) and name in kept[section]:
            kept[section] = {k: v for k, v in kept[section].items() if k != name}
        else:
            raise ConfigError(f"--ignore-config-key is {_clip(key)!r}, which {where} does not have; leave it out")
    return kept


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """What generation_config.json says: ids that end a text, and defaults of sampling by SamplingParams' names."""

    eos_token_ids: tuple[int, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict)
    where: str = "generation_config.json"

    def describe(self) -> str:
        """The defaults in one line."""
        given = ", ".join(f"{name} {value:g}" for name, value in self.sampling.items())
        return f"{given} ({self.where})" if given else "the engine's own"


def read_config(folder: Path) -> dict[str, Any]:
    """The object in folder/config.json. Raises CheckpointError when there is none."""
    return read_object(folder, "config.json")


def read_generation_config(folder: Path) -> GenerationConfig:
    """folder/generation_config.json, or nothing said where there is none. Other keys are passed over, as vLLM does,
    do_sample too: they steer decoding methods, not the model. Raises CheckpointError or ConfigError on a damaged file.
    """
    name = "generation_config.json"
    if not (folder / name).exists():
        return GenerationConfig()
    reader = ConfigReader(read_object(folder, name), name)
    sampling = {
        "temperature": reader.get_float("temperature", None),
        "top_p": reader.get_float("top_p", None),
        "top_k": reader.get_int("top_k", None, low=-1),
        "min_p": reader.get_float("min_p", None),
        "repetition_penalty": reader.get_float("repetition_penalty", None),
        "max_tokens": reader.get_int("max_new_tokens", None, low=1),
    }
    given = {key: value for key, value in sampling.items() if value is not None}
    return GenerationConfig(reader.get_token_ids("eos_token_id"), given)


def checkpoint_dtype(raw: Mapping[str, Any], where: str = "config.json") -> str:
    """The dtype the weights were saved in, from `dtype` or the older `torch_dtype`; without them float32."""
    reader = ConfigReader(raw, where)
    key = "dtype" if raw.get("dtype") is not None else "torch_dtype"
    name = reader.get_str(key, "float32").removeprefix("torch.")
    if name not in CHECKPOINT_DTYPES:
        raise reader.error(key, ", ".join(CHECKPOINT_DTYPES))
    return name


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return _clip(repr(value))


def _clip(text: str) -> str:
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 80 else text[:77] + "..."
