"""Writes tests/fixtures/outside_logits.npz: what Hugging Face transformers computes on random checkpoints.

There is one of each architecture, and one of each published format of quantised weights, which are dequantised first.

tests/models/test_outside_logits.py holds the engine to it. transformers lives in an environment of its own and is no
dependency of the package; it computes in float32 on a CPU, with its plain implementations and no code of a checkpoint:

    python3 -m venv outside && outside/bin/pip install torch "transformers>=5.23" -e '.[dev]'
    outside/bin/python -m scripts.outside_logits
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tests.models.outside_cases import CASES, GREEDY, POSITIONS, STORED, prompts, write


def main() -> int:
    found: dict[str, Any] = {"transformers": np.array(transformers.__version__)}
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            path, fingerprint = write(name, Path(folder), dequantised=True)
            model = loaded(path)
        ids = prompts(model.config.vocab_size)
        with torch.inference_mode():
            logits = model(torch.from_numpy(ids), use_cache=False).logits.numpy()
            tokens = torch.from_numpy(ids[:, : POSITIONS // 2])
            for _ in range(GREEDY):
                following = model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
                tokens = torch.cat((tokens, following), 1)
        found |= {
            f"{name}_fingerprint": np.array(fingerprint),
            f"{name}_ids": ids,
            f"{name}_logits": logits,
            f"{name}_greedy": tokens[:, POSITIONS // 2 :].numpy(),
        }
        print(f"{name}: {type(model).__name__}, logits {logits.shape}, up to {np.abs(logits).max():.1f}")
    np.savez_compressed(STORED, **found)
    print(f"{STORED}: {STORED.stat().st_size} bytes")
    return 0


def loaded(folder: Path) -> Any:
    """transformers' model of the folder, of which every tensor has to have a place."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    if config["model_type"] == "kimi_k2":  # which is DeepSeek-V3's architecture by another name
        file.write_text(json.dumps(config | {"model_type": "deepseek_v3"}))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, trust_remote_code=False
    )
    wrong = {kind: sorted(names) for kind, names in info.items() if names}
    if wrong:
        sys.exit(f"error: {folder.name} does not fit transformers' model: {wrong}")
    return model.eval()


if __name__ == "__main__":
    sys.exit(main())
