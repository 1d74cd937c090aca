"""The MTP layer: its weights from every layout, its forward pass against a float64 twin, drafts along an answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from tests.models import naive_qwen_mtp, random_qwen
from thalweg import LLM, SamplingParams
from thalweg.assembly.drafter import Drafter, build_drafter
from thalweg.cli.app import app
from thalweg.config.engine import EngineConfig
from thalweg.config.model_source import model_folder
from thalweg.errors import CheckpointError, ConfigError
from thalweg.evals.arith_problems import problems
from thalweg.evals.drafts import Drafted, acceptance, draft
from thalweg.layers.batch import Batch
from thalweg.models import family_of
from thalweg.models.family import weight_plan
from thalweg.text.codec import load_codec
from thalweg.weights.plan import checkpoint_shapes

TINY_GDN = Path(__file__).resolve().parents[2] / "models" / "thalweg-tiny-gdn"
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["mtp.fc"],
}
STACKED = {
    "model.language_model.embed_tokens.weight",
    "lm_head.weight",
    "mtp.fc.weight",
    "mtp.layers.0.mlp.experts.gate_up_proj",
}
CASES = {
    "dense": (random_qwen.config(dense=48), ()),
    "experts": (random_qwen.config(heads=6), ()),
    "experts stacked": (random_qwen.config(), STACKED),
    "dense fp8": (random_qwen.config(dense=136, hidden=144, quantization_config=FP8), ()),
    "experts fp8": (random_qwen.config(inner=136, hidden=144, quantization_config=FP8), ()),
    "tied": (random_qwen.config(dense=40, tie_word_embeddings=True), ()),
}


def write(folder: Path, c: dict[str, Any], tensors: Sequence[str] | set[str] = ()) -> dict[str, Tensor]:
    """A checkpoint with random weights in the layout that `tensors` say, or else the published one; what it stores."""
    family = family_of(c)
    plan = weight_plan(family, family.read(c), tensors=tensors, mtp=True)
    generator = torch.Generator().manual_seed(len(plan))
    stored: dict[str, Tensor] = {}
    for name, shape in checkpoint_shapes(plan).items():
        w = torch.randn(shape, generator=generator)
        if name.endswith("_scale_inv"):
            stored[name] = (w.abs() + 0.5).mul(shape[-1] ** -0.5 / 8).bfloat16()
        elif f"{name}_scale_inv" in checkpoint_shapes(plan):
            stored[name] = w.to(torch.float8_e4m3fn)
        else:
            stored[name] = w * (0.2 if len(shape) == 1 else 1.0 if "embed" in name else shape[-1] ** -0.5)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**c, "dtype": "float32"}))
    save_file(stored, folder / "model.safetensors")
    return stored


def dequantized(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = {}
    for name, w in stored.items():
        scales = stored.get(f"{name}_scale_inv")
        if scales is not None:
            rows, cols = w.shape
            by_element = scales.double().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
            w = w.double() * by_element
        weights[name] = w.double()
    return weights


def chunk(start: int, ids: Sequence[int], block_size: int) -> Batch:
    """Tokens of one sequence after `start` others: a decode row if it is one behind others, else a prefill."""
    positions, decode = torch.arange(start, start + len(ids)), len(ids) == 1 and start > 0
    blocks = torch.arange(1, 33, dtype=torch.int32).flip(0)[None]  # not in order
    return Batch(
        token_ids_T=torch.tensor(ids),
        positions_T=positions,
        num_decodes=int(decode),
        prefill_offsets=[0] if decode else [0, len(ids)],
        starts=[] if decode else [start],
        slots_B=torch.tensor([1]),
        block_tables_BN=blocks,
        block_rows_T=blocks[0, positions // block_size].long() * block_size + positions % block_size,
        context_lens_B=torch.tensor([start + 1] if decode else [], dtype=torch.int32),
        logit_rows_R=None,
    )


def hidden_states(drafter: Drafter, ids: list[int]) -> Tensor:
    """Behind the decoder's last norm, float64 [T, D]."""
    size = drafter.opened.config.block_size
    return drafter.head.hidden(drafter.decoder.stream(chunk(0, ids, size), drafter.cache(32, 1))).double()


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder, (c, tensors) = tmp_path_factory.mktemp("model"), CASES[request.param]
    write(folder, c, tensors)
    return folder, c


def stored_in(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return dequantized(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("size", [29, 1, 4, 7])
def test_forward_is_the_twins_however_it_is_fed(model: tuple[Path, dict[str, Any]], size: int) -> None:
    folder, c = model
    drafter = build_drafter(EngineConfig(str(folder), device="cpu", block_size=4))
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(29, c["hidden_size"], generator=generator)
    embedded = torch.randn(29, c["hidden_size"], generator=generator)
    cache = drafter.cache(32, 1).layers[-1]
    parts = [
        drafter.mtp(
            hidden[at : at + size], embedded[at : at + size], chunk(at, range(at, min(at + size, 29)), 4), cache
        )
        for at in range(0, 29, size)
    ]
    expected = naive_qwen_mtp.mtp(c, stored_in(folder), hidden, embedded)
    torch.testing.assert_close(torch.cat(parts).double(), expected, atol=2e-4, rtol=0)


def test_drafts_along_an_answer_are_the_twins(model: tuple[Path, dict[str, Any]]) -> None:
    """Whatever else is answered beside it; and the answer is the one that the engine gives."""
    folder, c = model
    prompts = [[5, 9, 3, 77, 20], [8], [60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70]]
    with LLM(str(folder), device="cpu") as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=6, temperature=0, ignore_eos=True))
    drafter = build_drafter(EngineConfig(str(folder), device="cpu", block_size=4))
    answers = draft(drafter, prompts, frozenset(), max_new_tokens=6, depth=3, parallel=2)
    assert [answer.token_ids for answer in answers] == [output.outputs[0].token_ids for output in outputs]

    w = stored_in(folder)
    embed = w["model.language_model.embed_tokens.weight"]
    head = w.get("lm_head.weight", embed)
    for prompt, answer in zip(prompts, answers, strict=True):
        for place, drafted in enumerate(answer.drafts):
            known = prompt + answer.token_ids[: place + 1]
            hidden = hidden_states(drafter, known[:-1])
            for token in drafted:
                out = naive_qwen_mtp.mtp(c, w, hidden, embed[known[1:]])
                logits = out[-1] @ head.T
                assert logits[token] >= logits.max() - 1e-3
                known, hidden = [*known, token], torch.cat([hidden, out[-1:]])


def test_published_names_and_counts() -> None:
    """15 tensors if dense; in bf16 785 for 256 experts, and 1560 in float8."""
    counts = {}
    for name, c in {
        "dense": random_qwen.config(dense=48),
        "bf16": random_qwen.config(experts=256),
        "fp8": random_qwen.config(experts=256, quantization_config=FP8),
    }.items():
        family = family_of(c)
        plan = weight_plan(family, family.read(c), mtp=True)
        counts[name] = sum(tensor.startswith("mtp.") for tensor in checkpoint_shapes(plan))
    assert counts == {"dense": 15, "bf16": 785, "fp8": 1560}


def test_parameters_of_the_27b(tmp_path: Path) -> None:
    c = random_qwen.config(hidden=5120, heads=24, kv_heads=4, head_dim=256, dense=17408)
    family = family_of(c)
    shapes = checkpoint_shapes(weight_plan(family, family.read(c), mtp=True))
    assert sum(torch.Size(s).numel() for name, s in shapes.items() if name.startswith("mtp.")) == 424_699_392


def test_serving_leaves_it_unread_and_wants_none(tmp_path: Path) -> None:
    c = random_qwen.config(dense=48)
    stored = write(tmp_path, c)
    with LLM(str(tmp_path), device="cpu") as llm:
        with_layer = llm.prompt_logits([3, 4, 5])
        parameters = llm.info.parameters
    rest = {name: w for name, w in stored.items() if not name.startswith("mtp.")}
    assert parameters == sum(w.numel() for w in rest.values())
    save_file(rest, tmp_path / "model.safetensors")
    with LLM(str(tmp_path), device="cpu") as llm:
        assert torch.equal(llm.prompt_logits([3, 4, 5]), with_layer)
    with pytest.raises(ConfigError, match="this model has no MTP layer"):
        build_drafter(EngineConfig(str(tmp_path), device="cpu"))


def test_a_layer_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    stored = write(tmp_path, random_qwen.config(dense=48))
    del stored["mtp.layers.0.self_attn.q_norm.weight"]
    save_file({**stored, "mtp.layers.1.input_layernorm.weight": torch.zeros(32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing: mtp\.layers\.0.*1 unexpected: mtp\.layers\.1"):
        build_drafter(EngineConfig(str(tmp_path), device="cpu"))


def test_acceptance_counts_what_a_step_would_take() -> None:
    """Drafts 2, 9 then 4, 5: one step takes 2 and gives 3 itself, the next takes 4 and ends the answer."""
    answer = Drafted([1, 2, 3, 4], [[2, 9], [7, 7], [4, 5], [0, 0]])
    one, two = acceptance([answer], 2)
    assert one == {"draft_tokens": 1, "accepted": 1.0, "by_place": [1.0], "tokens_per_step": 1.5}
    assert two == {"draft_tokens": 2, "accepted": 2 / 3, "by_place": [1.0, 0.0], "tokens_per_step": 1.5}


def test_acceptance_on_a_trained_model() -> None:
    """As its card has it. With inputs swapped, or shifted by one token, a layer still drafts but is seldom right."""
    config = EngineConfig(str(TINY_GDN), device="cpu")
    codec = load_codec(config)
    prompts = [codec.chat_ids([{"role": "user", "content": p.question}]) for p in problems("eval", 7, 16)]
    drafter, ends = build_drafter(config), frozenset(codec.source.eos_token_ids)
    answers = draft(drafter, prompts, ends, max_new_tokens=160, depth=3, parallel=16)
    assert all(answer.token_ids[-1] in ends for answer in answers)
    assert [row["accepted"] > floor for row, floor in zip(acceptance(answers, 3), (0.99, 0.99, 0.93), strict=True)] == [
        True, True, True,
    ]  # fmt: skip


def test_command_prints_acceptance_by_number_of_drafts(tmp_path: Path) -> None:
    bundled = model_folder(None)
    vocab = json.loads((bundled / "config.json").read_text())["vocab_size"]
    write(tmp_path, random_qwen.config(dense=48, vocab=vocab))
    command = ["eval", "mtp-acceptance", str(tmp_path), "--tokenizer", str(bundled), "--num-questions", "3"]
    result = CliRunner().invoke(app, [*command, "--max-new-tokens", "8", "--output-json", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    assert [line[:11] for line in result.stdout.splitlines()] == ["1 per step:", "2 per step:", "3 per step:"]
    rows = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [row["draft_tokens"] for row in rows] == [1, 2, 3]
    assert all(0 <= row["accepted"] <= 1 <= row["tokens_per_step"] for row in rows)

    refused = CliRunner().invoke(app, ["eval", "mtp-acceptance", "--num-questions", "1"])
    assert refused.exit_code != 0
    assert "no MTP layer" in str(refused.exception)
