"""The files of the bundled model as they lie in the package: layout, names, sizes, and how they were made."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open

import thalweg
from thalweg.tokenizer.load import load_tokenizer
from thalweg.tokenizer.template import ChatTemplate

FOLDER = Path(thalweg.__file__).parent / "bundled" / "thalweg-tiny"
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "train_tiny"
LAYOUT = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 10: "<|im_system|>",
          11: "<|tool_calls_section_begin|>", 12: "<|tool_calls_section_end|>", 13: "<|tool_call_begin|>",
          14: "<|tool_call_argument_begin|>", 15: "<|tool_call_end|>", 17: "<|im_middle|>", 22: "<think>",
          23: "</think>"}  # fmt: skip


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    source = (FOLDER / "chat_template.jinja").read_text(encoding="utf-8")
    return ChatTemplate(source, load_tokenizer(FOLDER))


@pytest.fixture
def training_model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from kimi_linear import model

    return model


def test_the_folder_holds_what_a_checkpoint_holds() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tiktoken.model", "tokenizer_config.json",
    }  # fmt: skip
    assert (FOLDER / "model.safetensors").stat().st_size <= 12_000_000


def test_config_has_the_published_keys(config: dict[str, Any], shared_dir: Path) -> None:
    published = json.loads((shared_dir / "configs" / "kimi_linear_48b_a3b.json").read_text(encoding="utf-8"))
    assert set(config) == set(published) - {"auto_map"}
    linear = config["linear_attn_config"]
    assert set(linear) == set(published["linear_attn_config"])
    assert sorted(linear["kda_layers"] + linear["full_attn_layers"]) == [1, 2, 3, 4, 5, 6]
    assert config["mla_use_nope"]
    assert config["first_k_dense_replace"] == 1


def test_every_sharded_dimension_is_even(config: dict[str, Any]) -> None:
    heads = (config["num_attention_heads"], config["linear_attn_config"]["num_heads"])
    widths = (config["intermediate_size"], config["moe_intermediate_size"], config["vocab_size"])
    assert all(size % 2 == 0 for size in (*heads, *widths))


def test_vocabulary() -> None:
    lines = (FOLDER / "tiktoken.model").read_text(encoding="ascii").splitlines()
    tokens = [base64.b64decode(line.split()[0], validate=True) for line in lines]
    assert [int(line.split()[1]) for line in lines] == list(range(len(lines)))
    assert len(set(tokens)) == len(tokens) <= 2048
    assert set(tokens[:256]) == {bytes([b]) for b in range(256)}
    # Digits stay single tokens and line breaks apart: arithmetic and prompts that end before a line break need it.
    assert not any(len(token) > 1 and any(byte in b"0123456789\r\n" for byte in token) for token in tokens)


def test_special_tokens_lie_where_kimi_has_them(config: dict[str, Any], shared_dir: Path) -> None:
    own = json.loads((FOLDER / "tokenizer_config.json").read_text(encoding="utf-8"))["added_tokens_decoder"]
    ranks = len((FOLDER / "tiktoken.model").read_text(encoding="ascii").splitlines())
    assert config["vocab_size"] == ranks + 256
    assert {int(i) - ranks: entry["content"] for i, entry in own.items()}.items() >= LAYOUT.items()
    reference = json.loads((shared_dir / "tokenizers/kimi_like/tokenizer_config.json").read_text(encoding="utf-8"))
    special = {entry["content"]: entry["special"] for entry in reference["added_tokens_decoder"].values()}
    assert {e["content"]: e["special"] for e in own.values()}.items() >= special.items()
    assert config["bos_token_id"] == ranks
    assert config["eos_token_id"] == ranks + 2
    assert own[str(config["pad_token_id"])]["content"] == "[PAD]"
    generation = json.loads((FOLDER / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == config["eos_token_id"]


def test_weights_are_the_training_models_tensors(config: dict[str, Any], training_model: ModuleType) -> None:
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model = training_model.Model(config)
    model.load_official(stored)
    again = model.official_tensors()
    assert again.keys() == stored.keys()
    for name, tensor in stored.items():
        exact = name.endswith(("A_log", "dt_bias", "e_score_correction_bias"))
        assert tensor.dtype == (torch.float32 if exact else torch.bfloat16), name
        assert torch.equal(again[name], tensor), name
        assert tensor.isfinite().all(), name
    assert stored["model.layers.0.self_attn.A_log"].shape == (1, 1, 4, 1)
    assert stored["model.layers.0.self_attn.dt_bias"].shape == (256,)
    assert stored["model.layers.0.self_attn.q_conv1d.weight"].shape == (256, 1, 4)


def test_the_training_forms_agree_and_documents_do_not_leak(config: dict[str, Any], training_model: ModuleType) -> None:
    """Two documents packed into one row give what each gives alone, one token at a time."""
    from kimi_linear import decode  # beside the training model, on the path while its fixture lasts

    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model = training_model.Model(config).eval()
    model.load_official(stored)
    ids = torch.randint(0, 1024, (2, 40), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[1] * 40 + [2] * 40])
    with torch.no_grad():
        packed = model(ids.reshape(1, 80), documents).reshape(2, 40, -1)
    recurrent = decode.Recurrent(stored, config)
    alone = torch.stack([recurrent.step(ids[:, position]) for position in range(40)], 1)
    torch.testing.assert_close(packed, alone, atol=3e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_tokenizer_script_gives_the_shipped_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import train_tokenizer
    from kimi_linear import tokenizer

    tokens, _ = train_tokenizer.train(
        train_tokenizer.corpus(tokenizer.SPLIT_PATTERN, tokenizer.LAYOUT), tokenizer.RANKS
    )
    lines = (FOLDER / "tiktoken.model").read_text(encoding="ascii").splitlines()
    assert tokens == [base64.b64decode(line.split()[0]) for line in lines]
    shipped = json.loads((FOLDER / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert tokenizer.tokenizer_config(len(tokens)) == shipped


USER = {"role": "user", "content": "2 + 2?"}
USER_TEXT = "<|im_user|>user<|im_middle|>2 + 2?<|im_end|>"
OPEN = "<|im_assistant|>assistant<|im_middle|>"


@pytest.mark.parametrize(
    ("messages", "arguments", "expected"),
    [
        ([USER], {}, USER_TEXT + OPEN),
        ([USER], {"add_generation_prompt": False}, USER_TEXT),
        (
            [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "4"}, USER],
            {},
            f"<|im_system|>system<|im_middle|>Be brief.<|im_end|>{USER_TEXT}{OPEN}4<|im_end|>{USER_TEXT}{OPEN}",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]}],
            {},
            USER_TEXT + OPEN,
        ),
        (
            [USER],
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            '<|im_system|>tool_declare<|im_middle|>[{"type":"function","function":{"name":"f"}}]<|im_end|>'
            + USER_TEXT
            + OPEN,
        ),
        (
            [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
                    ],
                },
                {"role": "tool", "tool_call_id": "functions.f:0", "content": "4"},
            ],
            {},
            (
                f"{USER_TEXT}{OPEN}<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0"
                '<|tool_call_argument_begin|>{"a":1}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
                f"<|im_system|>tool<|im_middle|>## Return of functions.f:0\n4<|im_end|>{OPEN}"
            ),
        ),
    ],
)
def test_chat_layout(
    template: ChatTemplate, messages: list[dict[str, Any]], arguments: dict[str, Any], expected: str
) -> None:
    assert template.render(messages, **arguments) == expected


def test_a_chat_is_encoded_as_in_training(template: ChatTemplate) -> None:
    ids = template.encode_chat([USER])
    assert ids[0] == 1024 + 3
    assert ids[-1] == 1024 + 17
    assert ids.count(1024 + 2) == 1
