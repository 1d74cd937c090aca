"""`thalweg bench serve`: its HTTP client against servers that behave and that do not, its arrivals and its figures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from thalweg.bench.serve_data import BenchRequest, Conversation, RandomPrompts, read_requests
from thalweg.bench.serve_figures import lines, read_goodput, summarise, tokens_per_second
from thalweg.bench.serve_load import CHAT, COMPLETIONS, Load, Outcome, Target, run_load
from thalweg.bench.serve_plot import draw
from thalweg.cli import main
from thalweg.cli.bench_serve import _warm_up
from thalweg.config.model_source import model_folder
from thalweg.errors import ConfigError
from thalweg.http_client import HttpClient, HttpError
from thalweg.tokenizer.load import load_tokenizer

OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(*pieces: bytes, end: bool = True) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces) + (b"0\r\n\r\n" if end else b"")


def event(text: str | None = None, **more: Any) -> bytes:
    choices = [] if text is None else [{"index": 0, "text": text}]
    return b"data: " + json.dumps({"choices": choices, **more}).encode() + b"\n\n"


USAGE = event(usage={"prompt_tokens": 3, "completion_tokens": 5})
DONE = b"data: [DONE]\n\n"


class Scripted:
    """A server that gives the next of its answers to each request, whatever it asks. None: it hangs up."""

    def __init__(self, answers: Sequence[bytes | None]) -> None:
        self.answers, self.connections, self.bodies = list(answers), 0, []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                self.bodies.append(json.loads(await reader.readexactly(length) or b"null"))
                answer = self.answers.pop(0)
                if answer is None:
                    break
                writer.write(answer)
                await writer.drain()
                if not answer.endswith(b"0\r\n\r\n") and b"Content-Length" not in answer:
                    break
        except asyncio.IncompleteReadError:
            pass
        writer.close()


def against(answers: Sequence[bytes | None], work: Callable[[HttpClient], Awaitable[Any]]) -> tuple[Any, Scripted]:
    async def run() -> tuple[Any, Scripted]:
        scripted = Scripted(answers)
        server = await asyncio.start_server(scripted.serve, "127.0.0.1", 0)
        http = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        try:
            return await asyncio.wait_for(work(http), 10), scripted
        finally:
            http.close()
            server.close()

    return asyncio.run(run())


def send(*answers: bytes | None, timeout_s: float = 5.0, count: int = 1) -> tuple[list[Outcome], Scripted]:
    async def work(http: HttpClient) -> list[Outcome]:
        target = Target(http, COMPLETIONS, "m", {"temperature": 0}, timeout_s)
        return [await target.send(BenchRequest([1, 2, 3], 5)) for _ in range(count)]

    return against(answers, work)


def test_a_stream_is_timed_and_counted_by_the_servers_usage() -> None:
    answer = OK + chunked(event("a"), event(""), event("b"), USAGE, DONE)
    [outcome], server = send(answer)
    assert outcome.error is None
    assert (outcome.text, outcome.input_tokens, outcome.output_tokens) == ("ab", 3, 5)
    assert len(outcome.itls) == 1
    assert 0 < outcome.ttft <= outcome.latency
    assert server.bodies[0]["prompt"] == [1, 2, 3]
    assert server.bodies[0]["max_tokens"] == 5
    assert server.bodies[0]["stream_options"] == {"include_usage": True}


def test_a_token_counts_when_it_comes_and_not_when_it_is_text() -> None:
    def piece(text: str, ids: list[int]) -> bytes:
        choice = {"index": 0, "text": text, "token_ids": ids}
        return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"

    pieces = [piece("", [7]), piece("", [8]), piece("ab", [9, 10]), piece("c", []), DONE]
    [outcome], server = send(OK + chunked(*pieces))
    assert server.bodies[0]["return_token_ids"] is True
    assert (outcome.error, outcome.text, outcome.output_tokens) == (None, "abc", 4)
    assert len(outcome.itls) == 2


def test_a_server_that_refuses_to_give_token_ids_is_asked_for_text() -> None:
    body = b'{"error": {"message": "Unrecognized request argument supplied: return_token_ids"}}'
    refusal = b"HTTP/1.1 400 X\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    answer = OK + chunked(event("a"), event("b"), DONE)
    outcomes, server = send(refusal, answer, answer, count=2)
    assert [(o.error, o.output_tokens) for o in outcomes] == [(None, 2)] * 2
    assert ["return_token_ids" in body for body in server.bodies] == [True, False, False]


def talk(endpoint: str, turns: list[Any], *answers: bytes, think_s: float = 0.0) -> tuple[list[Outcome], Scripted]:
    conversation = Conversation([BenchRequest(turn, 5) for turn in turns], [0.0, *[think_s] * (len(turns) - 1)])

    async def work(http: HttpClient) -> list[Outcome]:
        target = Target(http, endpoint, "m", {"temperature": 0}, 5.0)
        outcomes, _ = await run_load(target, [conversation], Load(float("inf")), lambda _: None)
        return outcomes

    return against(answers, work)


def test_turns_of_a_conversation_go_on_from_the_answers() -> None:
    def said(ids: list[int], cached: int) -> bytes:
        usage = {"prompt_tokens": 9, "completion_tokens": len(ids), "prompt_tokens_details": {"cached_tokens": cached}}
        piece = {"choices": [{"index": 0, "text": "x", "token_ids": ids}]}
        return OK + chunked(b"data: " + json.dumps(piece).encode() + b"\n\n", event(usage=usage), DONE)

    outcomes, server = talk(COMPLETIONS, [[1, 2], [3], [4]], said([7, 8], 0), said([9], 2), said([5], 4), think_s=0.05)
    assert [body["prompt"] for body in server.bodies] == [[1, 2], [1, 2, 7, 8, 3], [1, 2, 7, 8, 3, 9, 4]]
    assert [o.cached_tokens for o in outcomes] == [0, 2, 4]
    assert outcomes[1].start - outcomes[0].start > 0.05
    figures = summarise(outcomes, 1.0)
    assert figures["total_cached_tokens"] == 6
    assert "Total cached input tokens:               6" in lines(figures, [])


def test_turns_of_a_chat_are_messages() -> None:
    def said(text: str) -> bytes:
        piece = {"choices": [{"index": 0, "delta": {"content": text}}]}
        return OK + chunked(b"data: " + json.dumps(piece).encode() + b"\n\n", DONE)

    _, server = talk(CHAT, ["hi", "and", "then"], said("one"), said("two"), said("three"))
    contents = [[(m["role"], m["content"]) for m in body["messages"]] for body in server.bodies]
    first = [("user", "hi"), ("assistant", "one"), ("user", "and")]
    assert contents == [first[:1], first, [*first, ("assistant", "two"), ("user", "then")]]


def test_a_conversation_ends_with_the_turn_that_fails() -> None:
    refusal = b"HTTP/1.1 400 X\r\nContent-Length: 2\r\n\r\n{}"
    outcomes, _ = talk(CHAT, ["a", "b", "c"], OK + chunked(event("a"), DONE), refusal)
    assert [o.error is None for o in outcomes] == [True, False]
    outcomes, _ = talk(COMPLETIONS, [[1], [2]], OK + chunked(event("a"), DONE))
    assert [o.error for o in outcomes] == [
        "the server gives no token ids; conversations need --endpoint /v1/chat/completions"
    ]


def test_conversations_have_their_lengths_and_pauses() -> None:
    prompts = RandomPrompts(load_tokenizer(model_folder(None)), 3, as_text=False)
    found = prompts.multi_turn(200, 4, 50, 7, 9, 2.0)
    assert all([len(turn.prompt) for turn in each.turns] == [50, 7, 7, 7] for each in found)
    assert all(turn.output_len == 9 for each in found for turn in each.turns)
    pauses = [pause for each in found for pause in each.pauses[1:]]
    assert 1.7 < sum(pauses) / len(pauses) < 2.3
    assert {each.pauses[0] for each in found} == {0.0}


def test_events_may_come_in_any_pieces() -> None:
    stream = event("a") + b": comment\n\n" + event("b").replace(b"\n", b"\r\n") + USAGE + DONE
    for size in (1, 7, 64):
        pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
        [outcome], _ = send(OK + chunked(*pieces))
        assert (outcome.error, outcome.text, outcome.output_tokens) == (None, "ab", 5)


def test_connections_are_used_again_and_one_closed_meanwhile_is_no_failure() -> None:
    answer = OK + chunked(event("a"), DONE)
    outcomes, server = send(answer, answer, None, answer, count=3)
    assert [o.error for o in outcomes] == [None] * 3
    assert server.connections == 2


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "without an answer"),
        (b"SSH-2.0-x\r\n\r\n", "does not speak HTTP"),
        (OK + chunked(event("a"), end=False), "broke off"),
        (OK + chunked(event("a")), "without [DONE]"),
        (OK + chunked(b"data: nonsense\n\n"), "not a JSON object"),
        (OK + chunked(event("a"), b'data: {"error": {"message": "lost"}}\n\n', DONE), "lost"),
        (b'HTTP/1.1 429 X\r\nContent-Length: 30\r\n\r\n{"error": {"message": "busy"}}', "429: busy"),
    ],
)
def test_what_goes_wrong_is_the_outcomes_error(answer: bytes | None, words: str) -> None:
    [outcome], _ = send(answer)
    assert outcome.error is not None
    assert words in outcome.error


def test_a_server_that_says_nothing_times_out() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def main_() -> Outcome:
        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        http = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        async with server:
            return await Target(http, COMPLETIONS, "m", {}, 0.1).send(BenchRequest("x", 1))

    assert asyncio.run(main_()).error == "no end within 0.1 s"


def test_nobody_listening_is_one_line() -> None:
    async def main_() -> None:
        with pytest.raises(HttpError, match="connection refused"):
            await HttpClient("http://127.0.0.1:9").json("GET", "/v1/models")

    asyncio.run(main_())
    for url in ("ftp://x", "127.0.0.1:80", "http://", "http://x:99999999"):
        with pytest.raises(ConfigError, match="--base-url"):
            HttpClient(url)


def test_arrivals_have_the_rate_and_the_same_seed_the_same_times() -> None:
    for burstiness in (0.5, 1.0, 10.0):
        times = Load(50.0, burstiness, seed=3).arrivals(5000)
        assert times == Load(50.0, burstiness, seed=3).arrivals(5000)
        assert times == sorted(times)
        assert times[-1] == pytest.approx(100, rel=0.1)
    assert Load(float("inf")).arrivals(3) == [0.0] * 3


def test_no_more_than_max_concurrency_are_under_way() -> None:
    class Slow(Target):
        now = most = 0

        async def send(self, request: BenchRequest) -> Outcome:
            Slow.now += 1
            Slow.most = max(Slow.most, Slow.now)
            await asyncio.sleep(0.001)
            Slow.now -= 1
            return Outcome(0.0, text=str(request.prompt))

    done: list[Outcome] = []
    target = Slow(HttpClient("http://x"), COMPLETIONS, "m", {})
    requests = [BenchRequest(str(i), 1) for i in range(20)]
    outcomes, seconds = asyncio.run(run_load(target, requests, Load(float("inf"), 1.0, 4), done.append))
    assert [o.text for o in outcomes] == [str(i) for i in range(20)]
    assert (Slow.most, len(done)) == (4, 20)
    assert seconds >= 0.005


def test_figures_of_known_outcomes() -> None:
    one = Outcome(10.0, ttft=0.5, itls=[0.25, 0.25], latency=1.0, input_tokens=7, output_tokens=3, text="abc")
    two = Outcome(10.5, ttft=1.0, itls=[], latency=1.0, input_tokens=3, output_tokens=1, text="d")
    lost = Outcome(10.0, error="429: busy")
    figures = summarise([one, two, lost], 2.0, read_goodput(["ttft:600", "tpot:250"]), (50, 99.9))
    assert figures["completed"] == 2
    assert figures["failed"] == 1
    assert figures["errors"] == ["1 x 429: busy"]
    assert figures["total_input_tokens"] == 10
    assert figures["output_throughput"] == 2.0
    assert figures["total_token_throughput"] == 7.0
    assert figures["request_goodput"] == 0.5
    assert figures["max_concurrent_requests"] == 2
    assert figures["mean_ttft_ms"] == 750
    assert figures["mean_tpot_ms"] == 250  # of the one request that has more than one token
    assert figures["p50_itl_ms"] == 250
    assert "p99.9_e2el_ms" in figures
    assert tokens_per_second([one, two]) == [2.0, 2.0]
    text = "\n".join(lines(figures, ["ttft", "e2el"], (50, 99.9)))
    for words in ("Successful requests:", "Failed requests:", "Mean TTFT (ms):", "P99.9 E2EL (ms):", "429: busy"):
        assert words in text
    assert "TPOT" not in text


def test_nothing_but_failures_still_gives_figures_and_a_picture() -> None:
    lost = [Outcome(1.0, error="x")]
    assert summarise(lost, 1.0)["output_throughput"] == 0
    assert lines(summarise(lost, 1.0), ["ttft"])[-1] == "failed: 1 x x"
    ElementTree.fromstring(draw(lost, "a < b & c"))


def test_the_picture_is_well_formed_and_has_a_line_for_each_panel() -> None:
    outcomes = [Outcome(i / 7, 0.1 + i / 90, [0.01] * i, 0.3 + i / 40, 5, i + 1) for i in range(40)]
    root = ElementTree.fromstring(draw(outcomes, "x"))
    assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == 6


def test_random_prompts_have_their_lengths_and_come_again_with_the_seed() -> None:
    tokenizer = load_tokenizer(model_folder(None))
    special = set(tokenizer.special_tokens.values())
    made = RandomPrompts(tokenizer, 5, as_text=False).random(50, 20, 10, 0.5)
    assert made == RandomPrompts(tokenizer, 5, as_text=False).random(50, 20, 10, 0.5)
    assert {len(r.prompt) for r in made} <= set(range(10, 31))
    assert {r.output_len for r in made} <= set(range(5, 16))
    assert len({r.output_len for r in made}) > 3
    assert not special & {i for r in made for i in r.prompt}
    assert all(isinstance(r.prompt, str) for r in RandomPrompts(tokenizer, 5, as_text=True).random(3, 8, 8, 0.0))


def test_prefixes_repeat_equally_often() -> None:
    made = RandomPrompts(load_tokenizer(model_folder(None)), 0, as_text=False).prefix_repetition(12, 6, 4, 3, 9)
    prefixes = [tuple(r.prompt[:6]) for r in made]
    assert sorted(prefixes.count(p) for p in set(prefixes)) == [4, 4, 4]
    assert {len(r.prompt) for r in made} == {10}


def test_a_file_of_prompts(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "a"}\n\n{"prompt": [1, 2], "output_len": 7}\n{"messages": [{"role": "user"}]}\n')
    made = read_requests(str(file), 4, 3)
    assert [(r.prompt, r.output_len) for r in made] == [("a", 3), ([1, 2], 7), ([{"role": "user"}], 3), ("a", 3)]
    for line in ("[]", "{}", '{"prompt": ""}', '{"prompt": [1.5]}', '{"prompt": "a", "output_len": 0}', "{"):
        file.write_text(line + "\n")
        with pytest.raises(ConfigError, match=r"--dataset-path.*line 1"):
            read_requests(str(file), 1, 3)
    with pytest.raises(ConfigError, match="--dataset-path"):
        read_requests(str(tmp_path / "none"), 1, 3)


def test_chat_sends_messages() -> None:
    target = Target(HttpClient("http://x"), CHAT, "m", {})
    assert target.body(BenchRequest("hi", 4))["messages"] == [{"role": "user", "content": "hi"}]
    with pytest.raises(ConfigError, match="token ids"):
        target.body(BenchRequest([1], 4))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--endpoint", "/v1/embeddings"], "--endpoint"),
        (["--goodput", "itl:5"], "--goodput"),
        (["--random-range-ratio", "1"], "--random-range-ratio"),
        (["--request-rate", "0"], "--request-rate"),
        (["--request-rate", "1", "--burstiness", "inf"], "--burstiness"),
        (["--dataset-name", "sharegpt"], "--dataset-name"),
        (["--dataset-name", "custom"], "--dataset-path"),
        (["--extra-body", "[]"], "--extra-body"),
        (["--percentile-metrics", "ttft,x"], "--percentile-metrics"),
        (["--metric-percentiles", "101"], "--metric-percentiles"),
        (["--plot", "/nowhere/x.svg"], "--plot"),
        (["--base-url", "http://127.0.0.1:9"], "127.0.0.1:9"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--num-prompts", "2", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


def test_a_line_the_endpoint_does_not_take_is_refused_before_anything_is_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "a"}\n{"messages": [{"role": "user", "content": "a"}]}\n')
    options = ["--base-url", "http://127.0.0.1:9", "--model", "m", "--num-warmups", "0", "--num-prompts", "2"]
    assert main(["bench", "serve", *options, "--dataset-name", "custom", "--dataset-path", str(file)]) == 2
    assert "expected --endpoint" in capsys.readouterr().err


def test_what_warms_a_server_up_is_no_prefix_of_what_is_measured() -> None:
    work = [BenchRequest([1, 2, 3], 1), BenchRequest("abcd", 1), BenchRequest([{"role": "user", "content": "c"}], 1)]

    async def warm_up(http: HttpClient) -> None:
        await _warm_up(Target(http, COMPLETIONS, "m", {}), work[:2], 3)
        await _warm_up(Target(http, CHAT, "m", {}), work[2:], 1)

    answer = OK + chunked(event("x"), USAGE, DONE)
    _, server = against([answer] * 4, warm_up)
    assert [body["prompt"] for body in server.bodies[:3]] == [[3, 2, 1], "cda", [3, 2, 1]]
    assert server.bodies[3]["messages"] == work[2].prompt


TEXTS = ["x", "Paris is the capital of France. " * 90, "déjà vu, 東京タワー!\n" * 60, "012345" * 80]


@pytest.mark.parametrize("text", TEXTS, ids=["letter", "English", "mixed", "digits"])
def test_what_warms_a_server_up_is_about_as_long_as_what_is_measured_and_never_longer(text: str) -> None:
    tokenizer = load_tokenizer(model_folder(None))

    async def warm_up(http: HttpClient) -> None:
        await _warm_up(Target(http, COMPLETIONS, "m", {}), [BenchRequest(text, 1)], 1)

    _, server = against([OK + chunked(event("x"), USAGE, DONE)], warm_up)
    measured, sent = len(tokenizer.encode(text)), len(tokenizer.encode(server.bodies[0]["prompt"]))
    assert 0.9 * measured <= sent <= measured
