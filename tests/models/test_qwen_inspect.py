"""`thalweg inspect` on published configs of the Qwen families: the figures that their makers give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.models import random_qwen as random
from thalweg.cli.app import main

PUBLISHED = {  # billions of parameters, of them active, GDN layers, full attention layers, KV heads
    "qwen3_5_9b": (8.95, 7.94, 24, 8, 4),
    "qwen3_5_35b_a3b": (34.66, 2.95, 30, 10, 2),
    "qwen3_next_80b_a3b": (79.67, 3.56, 36, 12, 2),
}


def inspect(capsys: pytest.CaptureFixture[str], *args: str) -> Any:
    assert main(["inspect", *args, "--dtype", "bfloat16", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(shared_dir: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    total, active, gdn, full, kv_heads = PUBLISHED[name]
    config = str(shared_dir / "configs" / f"{name}.json")
    found = inspect(capsys, "--config", config)
    assert round(found["parameters"] / 1e9, 2) == total
    assert round(found["active_parameters"] / 1e9, 2) == active
    assert found["cost"]["bytes_per_token"] == full * 2 * kv_heads * 256 * 2
    assert found["cost"]["bytes_per_sequence"] == gdn * (32 * 128 * 128 * 4 + 3 * 8192 * 2)
    assert found["cost"]["weight_bytes"] == pytest.approx(
        2 * found["parameters"], rel=1e-4
    )  # fp32: norms, A_log, dt_bias
    kinds = {kind.split(" + ")[0]: count for kind, count in found["layer_kinds"].items()}
    assert kinds == {"GatedDeltaNet": gdn, "GatedAttention": full}
    shared = inspect(capsys, "--config", config, "-tp", "8")
    assert (shared["parameters"], shared["active_parameters"]) == (found["parameters"], found["active_parameters"])
    assert shared["cost"]["bytes_per_token"] == full * 2 * 1 * 256 * 2  # ranks beyond the KV heads hold the same ones
    assert shared["cost"]["bytes_per_sequence"] == found["cost"]["bytes_per_sequence"] / 8


def test_active_parameters_of_tied_and_untied_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An embedding that is the head too is multiplied with; of one that is not, a row is read."""
    found = {}
    for tied in (False, True):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(random.config(tie_word_embeddings=tied)))
        found[tied] = inspect(capsys, "--config", str(path))
    idle_experts = 4 * (6 - 2) * 3 * 32 * 24
    assert found[True]["parameters"] - found[True]["active_parameters"] == idle_experts
    assert found[False]["parameters"] - found[True]["parameters"] == 131 * 32
    assert found[False]["active_parameters"] == found[True]["active_parameters"]


def test_a_published_fp8_config_counts_bytes_and_not_parameters(
    shared_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = json.loads((shared_dir / "configs" / "qwen3_5_35b_a3b.json").read_text())
    raw["quantization_config"] = random.in_fp8({})[1]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    found = inspect(capsys, "--config", str(tmp_path / "config.json"))
    assert round(found["parameters"] / 1e9, 2) == 34.66
    assert round(found["active_parameters"] / 1e9, 2) == 2.95
    in_bf16 = 2 * 248320 * 2048  # embedding and head
    assert found["cost"]["weight_bytes"] == pytest.approx(found["parameters"] - in_bf16 + 2 * in_bf16, rel=0.01)
