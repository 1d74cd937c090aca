"""Training of thalweg-tiny-gdn: its maths against a float64 twin and an oracle, its losses and figures, a whole run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.fixtures.tiny_gdn import ROOT, Twin, small_config, train_tiny_scripts


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    with train_tiny_scripts() as modules:
        yield modules


def random_checkpoint(scripts: SimpleNamespace, config: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """A float64 training model with weights far from their first values, and its checkpoint."""
    torch.manual_seed(0)
    model = scripts.model.Model(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += torch.randn_like(parameter) * (0.1 if "A_log" in name or parameter.ndim > 1 else 0.3)
    tensors = model.official_tensors()
    model.load_official(tensors)
    return model.double(), tensors


def test_the_model_gives_the_oracles_logits(scripts: SimpleNamespace, shared_dir: Path) -> None:
    oracle = shared_dir / "oracles" / "qwen3_5_moe"
    config = json.loads((oracle / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(oracle / "model.safetensors")
    model = scripts.model.Model(config).eval()
    model.load_official(tensors)
    assert model.official_tensors().keys() == tensors.keys()
    ids = torch.from_numpy(np.load(oracle / "ids.npy")).long()
    expected = torch.from_numpy(np.load(oracle / "logits.npy"))
    rows, real = torch.nn.functional.pad(ids, (0, 26)), torch.arange(96) < 70
    with torch.no_grad():
        chunked = model(rows, real.long().expand(len(ids), -1))[:, :70]
    torch.testing.assert_close(chunked, expected, atol=2e-4, rtol=0)
    recurrent = scripts.decode.Recurrent(tensors, config)
    stepped = torch.stack([recurrent.step(ids[:, position]) for position in range(70)], 1)
    torch.testing.assert_close(stepped, expected, atol=2e-4, rtol=0)


def test_packed_rows_give_what_a_float64_twin_gives_alone(scripts: SimpleNamespace) -> None:
    """Every layer kind and the MTP layer, over documents that end inside a chunk and cross a chunk's border."""
    config = small_config()
    model, tensors = random_checkpoint(scripts, config)
    lengths = [9, 37, 14]
    ids = torch.randint(0, 77, (sum(lengths),))
    rows = torch.nn.functional.pad(ids, (0, 64 - len(ids)))[None]
    documents = torch.tensor([1] * 9 + [2] * 37 + [3] * 14 + [0] * 4)[None]
    with torch.no_grad():
        (hidden, further, furthest), _ = model.hiddens(rows, documents)
    twin, start = Twin(tensors, config), 0
    for length in lengths:
        part = ids[start : start + length].tolist()
        expected = twin(part)
        torch.testing.assert_close(hidden[0, start : start + length], expected, atol=1e-9, rtol=1e-9)
        predicted = twin.mtp(part[1:], expected[:-1])
        torch.testing.assert_close(further[0, start : start + length - 1], predicted, atol=1e-9, rtol=1e-9)
        chained = twin.mtp(part[2:], predicted[:-1])
        torch.testing.assert_close(furthest[0, start : start + length - 2], chained, atol=1e-9, rtol=1e-9)
        start += length


def test_drafts_are_chained_from_the_mtp_layers_own_output(scripts: SimpleNamespace) -> None:
    config = small_config()
    _, tensors = random_checkpoint(scripts, config)
    model, twin = scripts.decode.Recurrent(tensors, config, dtype=torch.float64), Twin(tensors, config)
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    outputs, drafts = scripts.evaluate.greedy(model, prompts, end_ids={76}, max_new=4, drafting=True)
    for prompt, output, drafted in zip(prompts, outputs, drafts, strict=True):
        assert len(drafted) == len(output) - 1
        for given, guesses in enumerate(drafted, start=1):
            known = [*prompt, *output[:given]]
            hiddens, tokens, expected = twin(known[:-1]), known[1:], []
            for _ in range(3):
                predicted = twin.mtp(tokens, hiddens)[-1]
                expected.append(int((twin.t["lm_head.weight"] @ predicted).argmax()))
                tokens, hiddens = [*tokens, expected[-1]], torch.cat([hiddens, predicted[None]])
            assert guesses == expected


def test_greedy_output_is_the_twins(scripts: SimpleNamespace) -> None:
    config = small_config()
    _, tensors = random_checkpoint(scripts, config)
    twin, known = Twin(tensors, config), [3, 1, 4, 1, 5]
    for _ in range(5):
        known.append(int((twin(known)[-1] @ twin.t["lm_head.weight"].T).argmax()))
    model = scripts.decode.Recurrent(tensors, config, dtype=torch.float64)
    assert scripts.evaluate.greedy(model, [known[:5]], {76}, 5)[0] == [known[5:]]
    assert scripts.evaluate.greedy(model, [known[:5]], {known[6]}, 5)[0] == [known[5:7]]  # with what ended it


def test_a_balance_loss_is_1_when_experts_are_used_evenly(scripts: SimpleNamespace) -> None:
    shape = scripts.model.Shape.from_config(small_config(num_experts=4, num_experts_per_tok=1, hidden_size=4))
    moe = scripts.model.MoE(shape)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    documents = torch.tensor([[1, 1, 1, 1, 0]])
    with torch.no_grad():
        moe.gate.weight.copy_(30 * torch.eye(4))
        even, uneven = torch.eye(4)[[0, 1, 2, 3, 0]], torch.eye(4)[[0, 0, 0, 0, 1]]
        assert moe(even[None], documents)[1].item() == pytest.approx(1)
        assert moe.gate.load.tolist() == [1, 1, 1, 1]
        assert moe(uneven[None], documents)[1].item() == pytest.approx(4)


def test_targets_lie_in_their_own_document(scripts: SimpleNamespace) -> None:
    weights = torch.tensor([[0, 1, 10, 10, 0, 1, 10, 0]])
    documents = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 0]])
    assert scripts.trainer.weights_ahead(weights, documents, 1).tolist() == [[1, 10, 10, 0, 1, 10, 0, 0]]
    assert scripts.trainer.weights_ahead(weights, documents, 2).tolist() == [[10, 10, 0, 0, 10, 0, 0, 0]]


def test_acceptance_is_that_of_speculation(scripts: SimpleNamespace) -> None:
    outputs = [[1, 2, 3, 4, 5]]
    drafts = [[[2, 3, 9], [0, 0, 0], [0, 0, 0], [5, 7, 7]]]  # after 1, 2, 3 and 4
    assert scripts.evaluate.acceptance(outputs, drafts) == {
        # after 1: 2 is right; after 3: wrong; after 4: right
        "1": {"accepted": 0.6667, "by_place": [0.6667], "tokens_per_step": 1.333},
        # after 1: both right; after 4: right, and there is nothing behind it
        "2": {"accepted": 1.0, "by_place": [1.0, 1.0], "tokens_per_step": 2.0},
        "3": {"accepted": 0.75, "by_place": [1.0, 1.0, 0.0], "tokens_per_step": 2.0},
    }


def test_training_lowers_the_loss_and_what_it_saves_is_what_it_has(scripts: SimpleNamespace, tmp_path: Path) -> None:
    config = small_config(vocab_size=1280, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    torch.manual_seed(0)
    model = scripts.model.Model(config)
    trainer = scripts.trainer.Trainer(model, 1, 3e-3, "cpu")
    row = next(scripts.documents.rows(scripts.documents.DocumentMaker(scripts.families.load_text("qwen3_5"), 0)))
    batch = torch.from_numpy(np.stack(row).astype(np.int64))[:, None]
    losses = []
    for _ in range(6):
        trainer.step(batch, 3e-3)
        losses.append([trainer.loss.item(), *trainer.answer_losses.tolist()])
    first, last = losses[0], losses[-1]
    assert len(first) == 1 + 3
    assert all(after < before - 0.5 for before, after in zip(first, last, strict=True))
    scripts.train.save(model, "qwen3_5", tmp_path, {"steps": 6})
    assert json.loads((tmp_path / "training.json").read_text(encoding="utf-8")) == {"steps": 6}
    again = scripts.model.Model(config)
    again.load_official(load_file(tmp_path / "model.safetensors"))
    model.load_official(model.official_tensors())  # rounded as stored
    with torch.no_grad():
        torch.testing.assert_close(again(*batch[[0, 2]]), model(*batch[[0, 2]]), atol=0, rtol=0)


def test_the_learning_rate_falls_to_zero_with_the_time(
    scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(scripts.train.time, "perf_counter", lambda: now)
    clock = scripts.train.Clock(steps=1000, minutes=2)
    now = 160.0  # a minute of compilation
    clock.start()
    assert clock.share(5) == pytest.approx(0.005)
    now = 190.0
    assert clock.share(300) == pytest.approx(0.5)  # half of the minute that was left
    assert clock.share(900) == pytest.approx(0.9)
    assert scripts.train.learning_rate(300, 1000, 0.5, peak=2.0) == pytest.approx(1.0)
    now = 220.0
    assert clock.share(300) >= 1
    assert scripts.train.learning_rate(300, 1000, clock.share(300), peak=2.0) == 0


def test_a_whole_run(scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(vocab_size=1280, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    monkeypatch.setattr(scripts.train, "read_config", lambda family: config)
    monkeypatch.setattr(scripts.evaluate, "read_config", lambda family: config)
    monkeypatch.setattr(scripts.evaluate, "MAX_NEW", 4)
    arguments = ["--family", "qwen3_5", "--out", str(tmp_path), "--steps", "4", "--rows", "1", "--shard-rows", "4"]
    arguments += ["--workers", "1", "--problems", "2", "--evaluation-minutes", "0"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    scripts.train.main()
    report = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert report["steps"] == 4
    assert report["tokens"] == 4096
    assert set(report["evaluation"]) == {"chat"}  # out of time for the others
    assert set(report["evaluation"]["chat"]["drafts"]) == {"1", "2", "3"}
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "tokenizer.json", "model.safetensors"}
    assert not list(tmp_path.glob("*.partial"))
