"""config.json is read strictly: typed, bounded, and with no key passed over in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from thalweg.config.bounded_json import MAX_FILE_BYTES, parse_object
from thalweg.config.hf import ConfigReader, checkpoint_dtype, read_config, read_generation_config, without_keys
from thalweg.errors import CheckpointError, ConfigError, ThalwegError, UnsupportedError
from thalweg.models import FAMILIES, family_of


def reader(**raw: Any) -> ConfigReader:
    return ConfigReader(raw, "config.json")


def test_getters_give_typed_values_and_defaults() -> None:
    r = reader(
        i=3,
        f=1,
        s="x",
        b=False,
        ints=[1, 2],
        strings=["a"],
        section={"k": 1},
        one=7,
        many=[7, 8, 7],
        null=None,
    )
    assert r.get_int("i") == 3
    assert (r.get_float("f"), type(r.get_float("f"))) == (1.0, float)
    assert r.get_str("s") == "x"
    assert r.get_bool("b") is False
    assert r.get_int_list("ints") == [1, 2]
    assert r.get_str_list("strings") == ["a"]
    section = r.get_section("section")
    assert section is not None
    assert section.get_int("k") == 1
    assert (r.get_token_ids("one"), r.get_token_ids("many"), r.get_token_ids("none")) == ((7,), (7, 8), ())
    assert (r.get_int("null", 5), r.get_int("absent", None), r.get_section("absent")) == (5, None, None)
    r.finish()
    section.finish()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: reader(hidden_size="64").get_int("hidden_size"),
            "hidden_size is '64' (str); expected an integer",
        ),
        (lambda: reader(n=True).get_int("n"), "n is true (bool); expected an integer"),
        (lambda: reader(n=3.0).get_int("n"), "n is 3.0 (float); expected an integer"),
        (lambda: reader(n=-1).get_int("n"), "n is -1; expected an integer from 0 to 2147483647"),
        (lambda: reader(n=2**31).get_int("n"), "n is 2147483648; expected an integer from 0 to 2147483647"),
        (lambda: reader().get_int("n"), "n is missing; expected an integer"),
        (lambda: reader(n=None).get_int("n"), "n is missing; expected an integer"),
        (lambda: reader(x="1").get_float("x"), "x is '1' (str); expected a number"),
        (lambda: reader(x=float("nan")).get_float("x"), "x is nan; expected a finite number"),
        (lambda: reader(x=float("inf")).get_float("x"), "x is inf; expected a finite number"),
        (lambda: reader(x=10**400).get_float("x", low=0, high=1), "expected a finite number from 0 to 1"),
        (lambda: reader(b=0).get_bool("b"), "b is 0 (int); expected true or false"),
        (lambda: reader(s=1).get_str("s"), "s is 1 (int); expected a string"),
        (lambda: reader(v=[1, "2"]).get_int_list("v"), "v is [1, '2'] (list); expected a list of integers"),
        (lambda: reader(v=[1]).get_str_list("v"), "v is [1] (list); expected a list of strings"),
        (
            lambda: reader(v=[-1]).get_token_ids("v"),
            "v is [-1] (list); expected a token id or a list of them",
        ),
        (lambda: reader(v={}).get_token_ids("v"), "v is {} (dict); expected a token id or a list of them"),
        (lambda: reader(v=[]).get_section("v"), "v is [] (list); expected an object"),
        (lambda: reader(act="gelu").only("act", "silu"), "act is 'gelu'; only 'silu' is supported"),
        (lambda: reader(rank=3).only("rank", None), "rank is 3; only null is supported"),
        (lambda: reader(n=0).only("n", False), "n is 0; only false is supported"),
        (lambda: reader().only("nope", True, default=False), "nope is false; only true is supported"),
        (lambda: reader(n=3).agree("n", 4), "n is 3; expected 4 from the other keys"),
        (
            lambda: reader(a=1, b=2, c=3).finish({"b"}),
            "unknown keys a, c, not supported; if it does not change the model, --ignore-config-key a ignores",
        ),
        (lambda: reader(s="x\ny" * 100).get_int("s"), "expected an integer"),
    ],
)
def test_errors_are_one_line_with_key_value_and_expectation(call: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    text = str(caught.value)
    assert text.startswith("config.json: ")
    assert message in text
    assert "\n" not in text
    assert len(text) < 300


def test_a_nested_reader_names_where_it_is() -> None:
    section = reader(linear_attn_config={"gate_lower_bound": -5}).get_section("linear_attn_config")
    assert section is not None
    with pytest.raises(ConfigError, match=r"config\.json: linear_attn_config: unknown key gate_lower_bound") as caught:
        section.finish()
    assert "--ignore-config-key linear_attn_config.gate_lower_bound" in str(caught.value)


NOTHING: list[Any] = [None, False, "", [], {}, {"enabled": False, "layers": [], "inner": {"window": None}}]
SOMETHING: list[Any] = [True, 0, 0.0, 1, 4096, "swa", [0], [None], {"enabled": True}, {"window": 0}]


@pytest.mark.parametrize("value", NOTHING)
def test_an_unknown_key_that_says_nothing_is_passed_over(value: Any) -> None:
    reader(sliding_window=value).finish()
    reader(quantization_config=value).only("quantization_config", None)


@pytest.mark.parametrize("value", SOMETHING)
def test_an_unknown_key_that_says_something_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="unknown key sliding_window"):
        reader(sliding_window=value).finish()
    with pytest.raises(ConfigError, match="only null is supported"):
        reader(quantization_config=value).only("quantization_config", None)


def test_keys_can_be_passed_over_by_name() -> None:
    raw = {"a": 1, "b": {"c": 2, "d": 3}, "e.f": 4}
    assert without_keys(raw, ["a", "b.c", "e.f"]) == {"b": {"d": 3}}
    assert raw["b"] == {"c": 2, "d": 3}
    for absent in ("x", "b.x", "a.c", "b.c.d", "", "."):
        with pytest.raises(ConfigError, match=r"--ignore-config-key is .*, which config\.json does not have"):
            without_keys(raw, [absent])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"\xff{}", "is not valid JSON"),
        (b"[1]", "holds a JSON list; expected an object"),
        (b'{"a": 1, "a": 2}', "key 'a' is given twice"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "nested too deeply"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
    ],
)
def test_bad_json_is_one_line(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_object(data, "config.json")
    assert str(caught.value).startswith("config.json")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_folder_file_and_size(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder; expected a model folder with config"):
        read_config(tmp_path / "absent")
    (tmp_path / "file").write_text("{}")
    with pytest.raises(CheckpointError, match="is not a folder; expected a model folder"):
        read_config(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"no config\.json in it"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b" " * (MAX_FILE_BYTES + 1))
    with pytest.raises(CheckpointError, match="is larger than"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    assert read_config(tmp_path) == {"model_type": "x"}


def test_generation_config(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path).eos_token_ids == ()
    path = tmp_path / "generation_config.json"
    said = {"eos_token_id": [5, 6], "temperature": 0.6, "top_k": 20, "max_new_tokens": 9}
    path.write_text(json.dumps({**said, "do_sample": False, "top_p": None, "some_other_key": {}}))
    read = read_generation_config(tmp_path)
    assert read.eos_token_ids == (5, 6)
    assert read.sampling == {"temperature": 0.6, "top_k": 20, "max_tokens": 9}
    assert read.describe() == "temperature 0.6, top_k 20, max_tokens 9 (generation_config.json)"
    path.write_text(json.dumps({"eos_token_id": "5"}))
    with pytest.raises(ConfigError, match=r"generation_config.json: eos_token_id is '5' \(str\)"):
        read_generation_config(tmp_path)


def test_checkpoint_dtype() -> None:
    assert checkpoint_dtype({"torch_dtype": "torch.bfloat16"}) == "bfloat16"
    assert checkpoint_dtype({"dtype": "float16", "torch_dtype": "float32"}) == "float16"
    assert checkpoint_dtype({}) == "float32"
    with pytest.raises(ConfigError, match="dtype is 'int4'; expected bfloat16, float16, float32"):
        checkpoint_dtype({"dtype": "int4"})


def test_family_lookup_names_the_known_ones() -> None:
    assert family_of({"model_type": "kimi_linear"}) is FAMILIES[0]
    assert family_of({"architectures": ["KimiLinearForCausalLM"]}) is FAMILIES[0]
    for raw in ({"model_type": "llama"}, {"architectures": ["Other"]}, {}):
        with pytest.raises(UnsupportedError, match="expected one of deepseek_v3, kimi_k2, kimi_k25, kimi_linear"):
            family_of(raw)
    with pytest.raises(ThalwegError):
        family_of({"model_type": ["kimi_linear"]})
