"""Engines on a CUDA device in processes of their own, which tell of every op that serves them, and give tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.models.served import FAMILIES, VOCAB, Model
from tests.models.test_gpu_kimi_k2 import model as kimi_k2
from thalweg import SamplingParams
from thalweg.config.engine import EngineConfig
from thalweg.engine.processes.client import EngineClient

pytestmark = pytest.mark.gpu

MODELS: dict[str, Callable[[], Model]] = {
    **FAMILIES,
    "kimi_linear with experts in fp8": FAMILIES["kimi_linear"],
    **{f"kimi_k2, {stored}": partial(kimi_k2, stored) for stored in ("none", "fp8", "int4")},
}
PARAMS = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


async def tokens(folder: Path, **options: Any) -> int | str:
    """How many came, or what was wrong."""
    client = EngineClient(EngineConfig(str(folder), dtype="bfloat16", device="cuda", cache_memory=1 << 30, **options))
    try:
        await client.start()
        if not client.info.decode_steps.startswith("CUDA graphs") or not client.info.ops:
            return client.info.decode_steps
        got = [t async for delta in client.generate([5, 9, 2, 7] * 9, PARAMS) for t in delta.token_ids]
        return len([t for t in got if 0 <= t < VOCAB])
    except Exception as e:  # noqa: BLE001 -- the other models' engines go on, and this one is named
        return f"{type(e).__name__}: {e}"
    finally:
        await client.close()


def test_an_engine_of_every_family_and_format_starts_and_gives_tokens(tmp_path: Path) -> None:
    """All at once, which takes as long as the slowest of them."""
    folders = {name: tmp_path / name for name in MODELS}
    for name, folder in folders.items():
        folder.mkdir()
        MODELS[name]().write(folder)

    async def all_of_them() -> list[int | str]:
        return await asyncio.gather(
            *(
                tokens(folder, max_num_seqs=4, quantization="fp8" if name.endswith("experts in fp8") else None)
                for name, folder in folders.items()
            )
        )

    assert dict(zip(folders, asyncio.run(all_of_them()), strict=True)) == dict.fromkeys(MODELS, 12)
