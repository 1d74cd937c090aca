"""The files of thalweg-tiny-gdn: names, tokenizer, chat template, and chats in training laid out as by the template."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.fixtures.tiny_gdn import FOLDER, train_tiny_scripts
from thalweg.errors import InvalidRequest
from thalweg.tokenizer.load import load_tokenizer
from thalweg.tokenizer.template import ChatTemplate, load_template


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    with train_tiny_scripts() as modules:
        yield modules


def test_config_has_the_published_keys(scripts: SimpleNamespace, shared_dir: Path) -> None:
    published = json.loads((shared_dir / "configs" / "qwen3_5_35b_a3b.json").read_text(encoding="utf-8"))
    own = scripts.families.read_config("qwen3_5")
    assert set(own) == set(published) - {"vision_config"}
    assert set(own["text_config"]) == set(published["text_config"]) | {"pad_token_id"}
    text = own["text_config"]
    assert text["linear_num_value_heads"] > text["linear_num_key_heads"]
    assert text["layer_types"] == ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2


def test_a_checkpoint_has_the_published_names_and_fits(scripts: SimpleNamespace) -> None:
    config = scripts.families.read_config("qwen3_5")
    tensors = scripts.model.Model(config).official_tensors()
    assert sum(tensor.nbytes for tensor in tensors.values()) < 11_900_000
    exact = ("A_log", "dt_bias", "linear_attn.norm.weight")
    assert all((t.dtype == torch.float32) == name.endswith(exact) for name, t in tensors.items())
    top = "model.language_model.layers."
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    assert shapes["lm_head.weight"] == shapes["model.language_model.embed_tokens.weight"] == [1280, 192]
    assert shapes[top + "0.linear_attn.in_proj_qkv.weight"] == [2 * 2 * 64 + 4 * 64, 192]
    assert shapes[top + "0.linear_attn.conv1d.weight"] == [512, 1, 4]
    assert shapes[top + "0.linear_attn.A_log"] == [4]
    assert shapes[top + "3.self_attn.q_proj.weight"] == [2 * 4 * 64, 192]
    assert shapes[top + "3.mlp.experts.gate_up_proj"] == [8, 128, 192]
    assert shapes["mtp.fc.weight"] == [192, 384]
    mtp = {name.removeprefix("mtp.") for name in tensors if name.startswith("mtp.")}
    mlp = {f"{part}_proj.weight" for part in ("gate", "up", "down")}
    assert mtp == {
        "fc.weight", "pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight", "norm.weight",
        *(f"layers.0.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")),
        *(f"layers.0.self_attn.{p}.weight" for p in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
        *(f"layers.0.mlp.{name}.weight" for name in ("gate", "shared_expert_gate")),
        *(f"layers.0.mlp.shared_expert.{name}" for name in mlp),
        *(f"layers.0.mlp.experts.{e}.{name}" for e in range(8) for name in mlp),
    }  # fmt: skip


def test_the_tokenizer_splits_as_qwen_does(scripts: SimpleNamespace) -> None:
    text = scripts.families.load_text("qwen3_5")
    tokenizer = load_tokenizer(FOLDER)
    assert [text.decode([i]) for i in text.encode("1234")] == ["1", "2", "3", "4"]
    for sample in ("Mia has 3 apples.\n\nHow many?", "日本語 n\u0303 e\u0301!\r\n\t x", "😀 don't  stop\n"):
        assert text.encode(sample) == tokenizer.encode(sample)
        assert tokenizer.decode(tokenizer.encode(sample)) == tokenizer.decode(text.encode(sample))
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"  # NFC
    vocabulary = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert len(vocabulary) == 1248
    assert not any(len(token) > 1 and any(c in "0123456789ĊČ" for c in token) for token in vocabulary)
    config = scripts.families.read_config("qwen3_5")["text_config"]
    generation = json.loads((FOLDER / "generation_config.json").read_text(encoding="utf-8"))
    names = tokenizer.added_tokens
    assert [names["<|endoftext|>"], names["<|im_start|>"], names["<|im_end|>"]] == [1248, 1249, 1250]
    assert names["<|vision_start|>"] - names["<|endoftext|>"] == 248053 - 248044
    assert generation["eos_token_id"] == [names["<|im_end|>"], names["<|endoftext|>"]]
    assert config["eos_token_id"] == names["<|endoftext|>"]
    assert max(names.values()) < config["vocab_size"]
    assert "<think>" not in tokenizer.special_tokens


def test_tokenizer_config_holds_the_template_of_the_scripts(scripts: SimpleNamespace) -> None:
    shipped = json.loads((FOLDER / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert scripts.tokenizer.tokenizer_config(1248) == shipped


@pytest.mark.slow
def test_the_tokenizer_script_gives_the_shipped_files(scripts: SimpleNamespace, tmp_path: Path) -> None:
    own = scripts.tokenizer
    counts = scripts.train_tokenizer.corpus(own.SPLIT_PATTERN, own.LAYOUT)
    own.write(tmp_path, *scripts.train_tokenizer.train(counts, own.RANKS))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    found = load_template(FOLDER, load_tokenizer(FOLDER))
    assert found is not None
    return found


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
ANSWER = "There are 6 x 12 = 72 pears.\nThat leaves 72 - 7 = 65 pears.\n#### 65"


@pytest.mark.parametrize("tools", [[], [TOOL, TOOL]])
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("thinking", [True, False])
def test_training_chats_are_what_the_template_renders(
    scripts: SimpleNamespace, template: ChatTemplate, tools: list[Any], system: str | None, turns: int, thinking: bool
) -> None:
    text = scripts.families.load_text("qwen3_5")
    rng = random.Random(0)
    rng.random = lambda: 0.0 if thinking else 1.0
    pieces = text.chat([("Q?", ANSWER)] * turns, system, tools, rng)
    worked, _, final = ANSWER.rpartition("\n")
    earlier = {"role": "assistant", "content": final if thinking else ANSWER}
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": "user", "content": "Q?"}, earlier] * turns
    if thinking:
        messages[-1] = {"role": "assistant", "content": final, "reasoning_content": worked}
    ids = template.encode_chat(messages, tools=tools or None, add_generation_prompt=False)
    assert text.ids(pieces) == ids
    prompt = template.encode_chat(
        messages[:-1], tools=tools or None, add_generation_prompt=True, enable_thinking=thinking
    )
    assert ids[: len(prompt)] == prompt
    told = [i for piece in pieces if piece[1] for i in text.ids([piece])]
    assert told[-len(ids[len(prompt) : -1]) :] == ids[len(prompt) : -1]  # all but the last line break


def test_evaluation_prompts_are_what_the_template_renders(scripts: SimpleNamespace, template: ChatTemplate) -> None:
    text = scripts.families.load_text("qwen3_5")
    prompts = text.chat_prompts([("Q?", ANSWER)], "R?")
    messages = [
        {"role": "user", "content": "Q?"},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": "R?"},
    ]
    assert text.ids(prompts["chat"]) == template.encode_chat(messages)
    assert text.ids(prompts["chat, thinking"]) == template.encode_chat(messages, enable_thinking=True)


CALL_TEXT = (
    "<tool_call>\n<function=f>\n<parameter=a>\nx y\n</parameter>\n<parameter=b>\n[1, true]\n</parameter>\n"
    "</function>\n</tool_call>"
)
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": "x y", "b": [1, True]}}}
USER, START, END = {"role": "user", "content": "Q?"}, "<|im_start|>", "<|im_end|>\n"
RESULTS = f"{START}user\n<tool_response>\n4\n</tool_response>\n<tool_response>\n5\n</tool_response>{END}"
ASKED = f"{START}user\nQ?{END}"


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (
            [
                USER,
                {"role": "assistant", "content": "So:", "reasoning_content": "hm", "tool_calls": [CALL, CALL]},
                {"role": "tool", "content": "4"},
                {"role": "tool", "content": "5"},
            ],
            f"{ASKED}{START}assistant\n<think>\nhm\n</think>\n\nSo:\n\n{CALL_TEXT}\n{CALL_TEXT}{END}{RESULTS}",
        ),
        (  # reasoning of earlier turns is dropped, also where it stands in the content
            [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"}, USER],
            f"{ASKED}{START}assistant\n4{END}{ASKED}",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": "?"}]}],
            ASKED,
        ),
    ],
)  # fmt: skip
def test_chat_layout(template: ChatTemplate, messages: list[dict[str, Any]], expected: str) -> None:
    assert template.render(messages, add_generation_prompt=False) == expected
    off, on = "<think>\n\n</think>\n\n", "<think>\n"
    assert template.render(messages) == f"{expected}{START}assistant\n{off}"
    assert template.render(messages, enable_thinking=True) == f"{expected}{START}assistant\n{on}"


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "Be brief."}],
        [USER, {"role": "system", "content": "Be brief."}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
        [USER, {"role": "critic", "content": "no"}],
    ],
)
def test_chats_that_the_template_refuses(template: ChatTemplate, messages: list[dict[str, Any]]) -> None:
    with pytest.raises(InvalidRequest):
        template.render(messages)
