"""Data-parallel ranks on two GPUs over NCCL: same tokens as on one, in graphs and eagerly; how they end."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.dist.processes import needs_proc, serving
from tests.dist.test_faults import DATA_PARALLEL, WITHIN, check_death
from tests.dist.test_hosts import KEY, free_ports, host
from tests.e2e.tiny_model import CONTEXT, EOS, VOCAB, write_tiny_model
from tests.models import random_checkpoint as random
from tests.models.served import BF16_LOGPROB, FAMILIES, KIMI, PARAMS, prompts
from thalweg import LLM, SamplingParams
from thalweg.config.engine import EngineConfig
from thalweg.engine.processes.client import EngineClient

pytestmark = [pytest.mark.gpu, needs_proc]
OPTIONS: dict[str, Any] = {
    "device": "cuda",
    "dtype": "float32",
    "cache_memory": 1 << 30,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 40,
}


def two_devices() -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, not {torch.cuda.device_count()}")


Answer = tuple[list[int], list[float]]  # tokens, and their log-probabilities


def answers(
    folder: Path, asked: list[list[int]], params: list[SamplingParams], hosts: int = 1, **options: Any
) -> list[Answer]:
    """Together, and then the first and the last alone, while the other rank has nothing. Of two hosts, the other is a
    launch of its own with the second device."""
    given: dict[str, Any] = {**OPTIONS, **options}
    if hosts == 1:
        return _answers(folder, asked, params, given)
    given |= {"nnodes": 2, "master_port": free_ports(2)}
    words = ["--data-parallel-size", "2", "--enable-expert-parallel", "--node-rank", "1"]
    for name, value in {**given, "device": "cuda:1"}.items():
        words += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    tmp = folder / "other"
    tmp.mkdir()
    with pytest.MonkeyPatch.context() as patch, host(tmp / "log", tmp, str(folder), *words) as other:
        patch.setenv("THALWEG_CLUSTER_KEY", KEY)
        found = _answers(folder, asked, params, given)
        assert other.ended()[0] == 0
        return found


def _answers(folder: Path, asked: list[list[int]], params: list[SamplingParams], given: dict[str, Any]) -> list[Answer]:

    async def answer(client: EngineClient, prompt: list[int], p: SamplingParams) -> Answer:
        tokens, logprobs = [], []
        async for delta in client.generate(prompt, p):
            tokens += delta.token_ids
            logprobs += [] if delta.logprobs is None else [delta.logprobs.logprob]
        return tokens, logprobs

    async def all_answers() -> list[Answer]:
        config = EngineConfig(str(folder), data_parallel_size=2, enable_expert_parallel=True, **given)
        client = EngineClient(config)
        await client.start()
        try:
            wanted = "eager" if given["dtype"] != "bfloat16" else "CUDA graphs"
            assert client.info.decode_steps.startswith(wanted), client.info.decode_steps
            assert client.info.prefill_steps.startswith(wanted), client.info.prefill_steps
            found = await asyncio.wait_for(asyncio.gather(*map(answer, [client] * len(asked), asked, params)), 60)
            alone = [await asyncio.wait_for(answer(client, asked[i], params[i]), 60) for i in (0, -1)]
            return [*found, *alone]
        finally:
            await client.close()

    return asyncio.run(all_answers())


@pytest.mark.parametrize(("family", "hosts"), [("kimi_linear", 1), ("qwen3_next", 1), ("kimi_linear", 2)])
def test_same_tokens_in_float32(family: str, hosts: int, tmp_path: Path) -> None:
    two_devices()
    folder = FAMILIES[family]().write(tmp_path)
    asked, params = prompts(6), PARAMS * 2
    with LLM(str(folder), **OPTIONS) as llm:
        expected = [o.outputs[0].token_ids for o in llm.generate(asked, params)]
    found = [tokens for tokens, _ in answers(folder, asked, params, hosts, enforce_eager=True)]
    assert found == [*expected, expected[0], expected[-1]]


@pytest.mark.parametrize(("family", "hosts"), [("kimi_linear", 1), ("qwen3_next", 1), ("kimi_linear", 2)])
def test_graphs_say_what_prompts_of_one_rank_say(family: str, hosts: int, tmp_path: Path) -> None:
    """In bfloat16, for which there are kernels that can be captured: of the same tokens, since rounding turns ties."""
    import torch

    two_devices()
    folder = FAMILIES[family]().write(tmp_path)
    asked = prompts(6)
    params = [SamplingParams(max_tokens=24, temperature=i % 3, seed=i, logprobs=0, ignore_eos=True) for i in range(6)]
    found, differences = answers(folder, asked, params, hosts, dtype="bfloat16"), []
    with LLM(str(folder), **{**OPTIONS, "dtype": "bfloat16"}) as llm:
        for prompt, (tokens, logprobs) in zip([*asked, asked[0], asked[-1]], found, strict=True):
            rows = llm.prompt_logits(prompt + tokens).float().cpu()[len(prompt) - 1 : -1].log_softmax(-1)
            own = rows.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            differences.append((torch.tensor(logprobs) - own).abs())
    assert torch.cat(differences).mean() < BF16_LOGPROB


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer that every kernel serves, for the HTTP server."""
    two_devices()
    pytest.importorskip("fastapi")  # or the skip names what is missing
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    c = random.config(**{**KIMI, "vocab": VOCAB, "context": CONTEXT}, eos_token_id=EOS)
    return random.write(folder, c, random.weights(c))


SERVE = (*DATA_PARALLEL, "--device", "cuda", "--max-num-seqs", "4", "--cache-memory", "1GiB")


def test_an_exit_says_nothing_of_process_groups(folder: Path, tmp: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "log", tmp, str(folder), *SERVE) as server:
        url = server.url()
        server.all_of(2, "engine")
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 9}, timeout=60)
        assert answer.status_code == 200, answer.text
        server.process.send_signal(signal.SIGTERM)
        assert server.check_gone(WITHIN) == 0
    said = (tmp_path / "log").read_text()
    for word in ("ProcessGroup", "destroy_process_group", "NCCL", "Warning", "WARN"):
        assert word not in said, said


@pytest.mark.parametrize(("point", "victim"), [("decode", "server"), ("idle", "engine 1")])
def test_a_death_ends_all(folder: Path, tmp: Path, tmp_path: Path, point: str, victim: str) -> None:
    with serving(tmp_path / "log", tmp, str(folder), *SERVE, "--sse-ping-interval", "0.1") as server:
        check_death(server, point, victim, server.url(), server.all_of(2, "engine")[victim])
