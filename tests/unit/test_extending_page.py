"""The family that docs/extending.md builds runs: its config is read, its checkpoint loaded and its tokens generated."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import thalweg.models
from tests.models import random_checkpoint
from thalweg import LLM, SamplingParams
from thalweg.errors import ConfigError
from thalweg.models.family import weight_plan

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
CONFIG = dict(
    architectures=["BrookForCausalLM"], model_type="brook", hidden_act="silu", torch_dtype="float32", hidden_size=32,
    num_heads=2, intermediate_size=48, vocab_size=64, num_hidden_layers=2, rms_norm_eps=1e-5,
    max_position_embeddings=128, eos_token_id=1,
)  # fmt: skip


@pytest.fixture
def brook(monkeypatch: pytest.MonkeyPatch) -> Any:
    section = PAGE.read_text().split("## A model family in an hour")[1].split("\n## ")[0]
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(block, names)
    family = names["Brook"]()
    monkeypatch.setattr(thalweg.models, "FAMILIES", (*thalweg.models.FAMILIES, family))
    return family


def test_it_generates_from_a_checkpoint_under_its_names(brook: Any, tmp_path: Path) -> None:
    plan = weight_plan(brook, brook.read(CONFIG))
    shapes = {source.name: source.shape for target in plan for source in target.sources}
    assert shapes["model.layers.1.self_attn.q_proj.weight"] == (128, 32)
    generator = torch.Generator().manual_seed(0)
    w = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    folder = random_checkpoint.write(tmp_path, CONFIG, w)
    with LLM(str(folder), device="cpu", max_num_seqs=2, cache_memory=1 << 24) as llm:
        [output] = llm.generate([[3, 4, 5]], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 5


def test_it_refuses_a_key_that_it_does_not_read(brook: Any) -> None:
    with pytest.raises(ConfigError, match="sliding_window"):
        brook.read({**CONFIG, "sliding_window": 7})
