"""Data-parallel ranks with divided experts answer as one rank does, whoever has requests, and end together."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.e2e.tiny_model import write_tiny_model
from tests.models import random_checkpoint as kimi
from tests.models import random_qwen as qwen
from thalweg import LLM, Grammar, SamplingParams
from thalweg.assembly.inspect import describe
from thalweg.config.engine import EngineConfig
from thalweg.engine.processes.client import EngineClient
from thalweg.engine.start import Engine
from thalweg.errors import ConfigError, EngineDeadError, InvalidRequest

PROMPTS = [[3 + i, 7, 11 * i % 100, 5] * (1 + 3 * i) for i in range(7)]
OPTIONS = {"max_num_seqs": 3, "max_num_batched_tokens": 32, "block_size": 8}  # prompts come in chunks
PARAMS = [
    SamplingParams(max_tokens=12, temperature=0, ignore_eos=True),
    SamplingParams(max_tokens=5, temperature=0, ignore_eos=True),
    SamplingParams(max_tokens=9, seed=3, ignore_eos=True),
]


def params(i: int) -> SamplingParams:
    return PARAMS[i % len(PARAMS)]


@pytest.fixture(scope="module")
def kimi_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    c = kimi.config(experts=6, context=4000)
    return kimi.write(tmp_path_factory.mktemp("kimi"), c, kimi.weights(c))


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    c = qwen.config(experts=6)
    tensors = qwen.published(c, qwen.weights(c), stacked=True)
    return qwen.write(tmp_path_factory.mktemp("qwen"), qwen.nested(c), tensors)


def run(folder: Path | None, ranks: int, body: Callable[[EngineClient], Awaitable[None]], **options: object) -> None:
    async def main() -> None:
        model = None if folder is None else str(folder)
        config = EngineConfig(
            model, data_parallel_size=ranks, enable_expert_parallel=True, **{"dtype": "float32", **OPTIONS, **options}
        )
        client = EngineClient(config)
        await client.start()
        try:
            await asyncio.wait_for(body(client), 60)
        finally:
            await client.close()

    asyncio.run(main())


async def tokens(client: EngineClient, i: int, **changes: object) -> list[int]:
    given = SamplingParams(**{**_fields(params(i)), **changes}) if changes else params(i)
    return [t async for delta in client.generate(PROMPTS[i], given) for t in delta.token_ids]


def _fields(p: SamplingParams) -> dict[str, object]:
    return {"max_tokens": p.max_tokens, "temperature": p.temperature, "seed": p.seed, "ignore_eos": p.ignore_eos}


def alone(folder: Path | None) -> list[list[int]]:
    with LLM(None if folder is None else str(folder), dtype="float32", **OPTIONS) as llm:
        outputs = llm.generate(PROMPTS, [params(i) for i in range(len(PROMPTS))])
        return [o.outputs[0].token_ids for o in outputs]


async def check_same_tokens(client: EngineClient, expected: list[list[int]]) -> None:
    """Together, one after another with the other ranks idle, and beside requests that are aborted."""
    everyone = range(len(PROMPTS))
    assert await asyncio.gather(*(tokens(client, i) for i in everyone)) == expected
    for i in everyone[:3]:
        assert await tokens(client, i) == expected[i]

    async def leave_early(i: int) -> None:
        stream = client.generate(PROMPTS[i], SamplingParams(max_tokens=200, ignore_eos=True))
        count = 0
        async for delta in stream:
            count += len(delta.token_ids)
            if count > 3:
                break
        await stream.aclose()

    *_, last, first = await asyncio.gather(leave_early(5), leave_early(1), tokens(client, 6), tokens(client, 0))
    assert [first, last] == [expected[0], expected[6]]


async def idle(client: EngineClient) -> None:
    """Every rank is without requests, and holds nothing."""
    for _ in range(100):
        await asyncio.sleep(0.05)
        stats = client.stats
        assert stats is not None
        if not (stats.num_running or stats.num_waiting or stats.blocks_used or stats.slots_used):
            return
    raise AssertionError(stats)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_same_tokens_as_one_rank(kimi_folder: Path, ranks: int) -> None:
    expected = alone(kimi_folder)

    async def body(client: EngineClient) -> None:
        await check_same_tokens(client, expected)
        await idle(client)
        served = {rank: stats.generation_tokens for rank, stats in client.rank_stats.items()}
        assert set(served) == set(range(ranks))
        assert all(served.values()), served

    run(kimi_folder, ranks, body)


@pytest.mark.slow
def test_same_tokens_if_each_is_several_tensor_parallel_ranks(kimi_folder: Path) -> None:
    expected = alone(kimi_folder)

    async def body(client: EngineClient) -> None:
        await check_same_tokens(client, expected)
        await idle(client)
        assert client.info.tensor_parallel_size == client.info.data_parallel_size == 2

    run(kimi_folder, 2, body, tensor_parallel_size=2)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["kimi_k2_int4", "kimi_k2_fp8"])
def test_same_tokens_of_published_experts_over_eight_ranks(shared_dir: Path, name: str) -> None:
    """Of Kimi-K2's formats, with an expert on each rank."""
    folder = shared_dir / "oracles" / name
    expected = alone(folder)

    async def body(client: EngineClient) -> None:
        assert client.info.experts is not None
        assert client.info.experts.startswith("1 of 8 on each of 8 data-parallel ranks")
        await check_same_tokens(client, expected)
        await idle(client)

    run(folder, 8, body)


@pytest.mark.exhaustive
def test_same_tokens_wherever_experts_and_their_copies_are(kimi_folder: Path, tmp_path: Path) -> None:
    rows = [[5, 1, 0, 3, 2, 4, 0, 1], [0, 1, 2, 3, 4, 5, 0, 1], [0, 2, 4, 5, 1, 3, 5, 2]]
    file = tmp_path / "placement.json"
    file.write_text(json.dumps({"physical_to_logical_map": rows}))
    expected = alone(kimi_folder)

    async def body(client: EngineClient) -> None:
        assert client.info.experts == "4 of 6 on each of 2 data-parallel ranks with 2 copies in all"
        await check_same_tokens(client, expected)

    run(kimi_folder, 2, body, expert_placement=str(file))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_same_tokens_as_one_rank_with_gated_experts(qwen_folder: Path, ranks: int) -> None:
    expected = alone(qwen_folder)
    run(qwen_folder, ranks, lambda client: check_same_tokens(client, expected))


@pytest.mark.exhaustive
def test_same_tokens_as_one_rank_with_the_bundled_model() -> None:
    expected = alone(None)
    run(None, 2, lambda client: check_same_tokens(client, expected))


@pytest.mark.slow
def test_grammars_stops_and_requests_without_a_seed(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    prompts = [[5, 9, 2, 7] * (n + 1) for n in range(4)]
    grammar = Grammar("regex", "[a-z]{4,30}!")
    given = [SamplingParams(max_tokens=40, seed=i, grammar=grammar if i % 2 else None) for i in range(4)]
    with LLM(str(folder), max_num_seqs=3) as llm:
        expected = [o.outputs[0].token_ids for o in llm.generate(prompts, given)]

    async def answer(client: EngineClient, prompt: list[int], p: SamplingParams) -> list[int]:
        return [t async for delta in client.generate(prompt, p) for t in delta.token_ids]

    async def body(client: EngineClient) -> None:
        assert await asyncio.gather(*map(answer, [client] * 4, prompts, given)) == expected
        with pytest.raises(InvalidRequest, match="grammar"):
            await answer(client, prompts[0], SamplingParams(grammar=Grammar("regex", "(")))
        assert await answer(client, prompts[1], given[1]) == expected[1]
        # Each of these is the next request of its rank: with one seed for all ranks they would be alike.
        free = SamplingParams(max_tokens=12, ignore_eos=True)
        first, second = await asyncio.gather(*(answer(client, prompts[0], free) for _ in range(2)))
        assert first != second
        await idle(client)

    run(folder, 2, body, block_size=64)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["decode", pytest.param("idle", marks=pytest.mark.exhaustive)])
def test_a_rank_that_is_killed_ends_every_request_and_all_ranks(kimi_folder: Path, when: str) -> None:
    async def body(client: EngineClient) -> None:
        forever = SamplingParams(max_tokens=3000, ignore_eos=True)
        streams = [client.generate(PROMPTS[i], forever) for i in range(4)]
        for stream in streams:
            while not (await anext(stream)).token_ids:
                pass
        if when == "idle":
            for stream in streams:
                await stream.aclose()
            await idle(client)
        os.kill(client.engines[1].process.pid, signal.SIGKILL)
        began = time.monotonic()
        if when == "idle":
            while client.dead is None:
                await asyncio.sleep(0.05)
        else:
            for stream in streams:
                with pytest.raises(EngineDeadError, match="rank"):
                    async for _ in stream:
                        pass
        with pytest.raises(EngineDeadError, match="rank"):
            await tokens(client, 0)
        await asyncio.gather(*(engine.end() for engine in client.engines))
        assert time.monotonic() - began < 10

    run(kimi_folder, 2, body)


@pytest.mark.exhaustive
@pytest.mark.parametrize("delay", [0.0, 0.3, 1.5])
def test_a_rank_that_is_killed_while_the_engines_start_is_reported(kimi_folder: Path, delay: float) -> None:
    pids: list[int] = []

    async def main() -> None:
        config = EngineConfig(str(kimi_folder), data_parallel_size=2, enable_expert_parallel=True)
        client = EngineClient(config)
        start = asyncio.ensure_future(client.start())
        while len(client.engines) < 2:
            await asyncio.sleep(0)
        pids.extend(engine.process.pid for engine in client.engines)
        await asyncio.sleep(delay)
        os.kill(pids[1], signal.SIGKILL)
        await start
        await client.close()

    began = time.monotonic()
    with pytest.raises(EngineDeadError):
        asyncio.run(main())
    assert time.monotonic() - began < 12
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.exhaustive
def test_a_rank_that_hangs_ends_the_engines(kimi_folder: Path) -> None:
    async def body(client: EngineClient) -> None:
        assert await tokens(client, 0)
        os.kill(client.engines[1].process.pid, signal.SIGSTOP)
        with pytest.raises(EngineDeadError, match="--step-timeout"):
            await asyncio.gather(tokens(client, 1), tokens(client, 2))

    run(kimi_folder, 2, body, step_timeout=2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_parallel_size": 2}, "needs --enable-expert-parallel"),
        ({"enable_expert_parallel": True}, "--data-parallel-size is 1, raise it"),
        (
            {"data_parallel_size": 2, "enable_expert_parallel": True, "distributed_executor_backend": "ray"},
            "--data-parallel-size is 2, whose ranks Ray does not place; start the hosts with --nnodes",
        ),
        (
            {
                "data_parallel_size": 2,
                "enable_expert_parallel": True,
                "cache_folder": "x",
                "cpu_cache_memory": 1,
            },
            "--cache-folder is for one rank",
        ),
    ],
)
def test_what_is_not_offered_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**options)  # type: ignore[arg-type]


def test_engines_that_are_driven_step_by_step_have_one_rank(kimi_folder: Path) -> None:
    with pytest.raises(ConfigError, match="expected 1: this drives the steps of one rank; `thalweg bench latency`"):
        Engine(EngineConfig(str(kimi_folder), data_parallel_size=2, enable_expert_parallel=True))


@pytest.mark.exhaustive
def test_experts_that_ranks_do_not_divide_are_refused(kimi_folder: Path) -> None:
    with pytest.raises(
        ConfigError, match="--data-parallel-size is 4; it must divide the number of experts, which is 6"
    ):
        run(kimi_folder, 4, lambda client: asyncio.sleep(0))


def test_inspect_says_how_experts_are_divided(kimi_folder: Path) -> None:
    found = describe(EngineConfig(str(kimi_folder), device="cpu", data_parallel_size=3, enable_expert_parallel=True))
    assert found.experts == "2 of 6 on each of 3 data-parallel ranks"
    alone = describe(EngineConfig(str(kimi_folder), device="cpu"))
    assert (found.parameters, found.active_parameters) == (alone.parameters, alone.active_parameters)
    assert found.cost.weight_bytes < alone.cost.weight_bytes
    assert alone.experts is None
