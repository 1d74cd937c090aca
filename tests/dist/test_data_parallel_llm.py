"""`LLM(data_parallel_size=2)` answers as with one rank, and refuses what it does not offer."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.tiny_model import write_tiny_model
from thalweg import LLM, Grammar, SamplingParams
from thalweg.cli import main
from thalweg.engine.data_parallel import DataParallelEngine
from thalweg.errors import EngineDeadError, InvalidRequest
from thalweg.profiler.chrome import read_trace

PROMPTS = [[5, 9, 2, 7] * (1 + 3 * n) for n in range(7)]
GREEDY = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)
PARAMS = [
    SamplingParams(max_tokens=3 + i, seed=i, temperature=i % 2, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    for i in range(len(PROMPTS))
]
GRAMMAR = SamplingParams(max_tokens=20, temperature=0, grammar=Grammar("regex", "[a-z]{4,12}!"))
OPTIONS = {"max_num_seqs": 3, "max_num_batched_tokens": 64}


def answers(llm: LLM) -> list[object]:
    """Of every kind of request, without what differs from run to run."""
    together = [(o.outputs[0].token_ids, o.outputs[0].finish_reason) for o in llm.generate(PROMPTS, PARAMS)]
    texts = [o.outputs[0].text for o in llm.chat([{"role": "user", "content": "a"}], GREEDY)]
    streamed = [t for delta in llm.stream(PROMPTS[2], GREEDY) for t in delta.token_ids]
    session = llm.session("one", PROMPTS[6] * 4)
    first = session.generate([3, 4], GREEDY).outputs[0].token_ids
    other, *_ = llm.fork(session, 2)
    continued = [each.generate([7], GREEDY).outputs[0].token_ids for each in (session, other)]
    session.roll_back(0)
    return [
        together,
        texts,
        streamed,
        first,
        continued,
        session.token_ids,
        llm.generate("b", GRAMMAR)[0].outputs[0].text,
    ]


@pytest.mark.slow
def test_same_answers_as_one_rank(tmp_path: Path) -> None:
    folder = str(write_tiny_model(tmp_path / "tiny"))
    with LLM(folder, **OPTIONS) as llm:
        expected = answers(llm)
    with LLM(folder, data_parallel_size=2, enable_expert_parallel=True, **OPTIONS) as llm:
        assert isinstance(llm.engine, DataParallelEngine)
        with pytest.raises(InvalidRequest, match="data_parallel_size 1"):
            llm.prompt_logits([1, 2])
        with pytest.raises(InvalidRequest, match="600 tokens"):
            llm.generate([[1], [2] * 600], GREEDY)
        with pytest.raises(InvalidRequest, match="grammar"):
            llm.generate(["a", "b"], [GREEDY, SamplingParams(grammar=Grammar("regex", "("))])
        assert answers(llm) == expected
        for session in ("one", "one/1", "one/2"):
            llm.session(session).delete()

        # Callers of several threads, one of whom leaves early; then nothing is left of them.
        stream = llm.stream(PROMPTS[0], SamplingParams(max_tokens=300, ignore_eos=True))
        assert next(stream).token_ids
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda i: llm.generate([PROMPTS[i]], PARAMS[i])[0].outputs[0].token_ids, range(6)))
        stream.close()
        assert found == [tokens for tokens, _ in expected[0][:6]]  # type: ignore[index]
        engine = llm.engine
    with pytest.raises(EngineDeadError, match="closed"):
        engine.pump.keep("a", "", [1])
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate("a")


@pytest.mark.slow
@pytest.mark.parametrize(("each", "when"), [(1, []), (1, ["--prefill"]), (2, [])])
def test_profile_records_the_same_steps_of_all_ranks(
    each: int, when: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = tmp_path / "t.json.gz", write_tiny_model(tmp_path / "tiny")
    options = ["--data-parallel-size", "2", "--enable-expert-parallel", "-tp", str(each), "--device", "cpu", *when]
    sizes = ["--steps", "3", "--batch-size", "2", "--input-len", "8"]
    assert main(["profile", str(folder), "--output", str(file), *options, *sizes]) == 0
    said = capsys.readouterr().out
    assert ("3 x step of 2 decode rows\n" if not when else "1 x step of 16 prompt tokens\n") in said
    slices = read_trace(str(file))
    steps = sorted((s.process, s.ts, s.end) for s in slices if s.name == "step")
    names = [f"rank {rank}" for rank in range(2 * each)]
    assert [process for process, _, _ in steps] == [name for name in names for _ in range(3)]
    for i in range(3):  # ranks meet in every layer of experts
        same = steps[i::3]
        assert max(begin for _, begin, _ in same) < min(end for _, _, end in same)
    found = {s.track.partition(": ")[2] for s in slices if s.category == "request"}
    assert found == {"profile-0", "profile-1"}


@pytest.mark.slow
def test_bench_latency_measures_all_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, folder = tmp_path / "out.json", write_tiny_model(tmp_path / "tiny")
    options = ["--data-parallel-size", "2", "--enable-expert-parallel", "--device", "cpu", "--output-json", str(path)]
    sizes = ["--batch-size", "1,5", "--input-len", "8", "--output-len", "4", "--num-iters", "1"]
    assert main(["bench", "latency", str(folder), *options, *sizes]) == 0
    figures = json.loads(path.read_text())
    assert figures["engine"]["data_parallel_size"] == 2
    assert float(figures["machine"]["link_GB_per_s"]) > 0
    one, five = figures["results"]
    for r in (one, five):
        assert r["median_tpot_ms"] > 0
        assert r["launches_per_step"] is None
        assert r["host_us_per_step"] is None  # ranks plan in processes of their own
    assert 0 < one["floor"]["step_sent"] < five["floor"]["step_sent"]
    assert one["floor"]["step_bytes"] < five["floor"]["step_bytes"]
    assert main(["bench", "decode", str(folder), *options[:5]]) == 2
    assert "thalweg bench latency" in capsys.readouterr().err
