"""`thalweg bench serve`: load on any OpenAI-compatible server, and what its clients see."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thalweg.cli.bench_serve_parts import progress, read_object, read_percentiles, write
from thalweg.config import env
from thalweg.errors import ConfigError, ThalwegError

if TYPE_CHECKING:
    from thalweg.bench.serve_data import BenchRequest, Conversation
    from thalweg.bench.serve_load import Load, Outcome, Target
    from thalweg.bench.serve_profile import ProfiledServer
    from thalweg.http_client import HttpClient

DATASETS = ("random", "prefix_repetition", "multi_turn", "custom")
_DATA, _LOAD, _OUT = "Dataset", "Load", "Output"


def _option(panel: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, **more)


def serve(
    base_url: Annotated[str, typer.Option(metavar="URL", help="The server, without /v1.")] = "http://127.0.0.1:8000",
    endpoint: Annotated[
        str, typer.Option(metavar="PATH", help="/v1/completions or /v1/chat/completions.")
    ] = "/v1/completions",
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the model in requests. Default: the server's first.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="The server's key. Default: THALWEG_API_KEY, or no key.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        _option(_DATA, metavar="FOLDER", help="Draw random tokens from this tokenizer. Default: the bundled model's."),
    ] = None,
    dataset_name: Annotated[
        str, _option(_DATA, metavar="NAME", help="random, prefix_repetition, multi_turn, or custom: JSON lines.")
    ] = "random",
    dataset_path: Annotated[
        str | None, _option(_DATA, metavar="FILE", help='For custom: {"prompt": ...} or {"messages": ...} a line.')
    ] = None,
    num_prompts: Annotated[
        int, _option(_DATA, metavar="N", min=1, help="Requests to send; conversations of multi_turn.")
    ] = 1000,
    random_input_len: Annotated[int, _option(_DATA, metavar="TOKENS", min=1, help="Tokens of a prompt.")] = 1024,
    random_output_len: Annotated[int, _option(_DATA, metavar="TOKENS", min=1, help="Tokens to generate.")] = 128,
    random_range_ratio: Annotated[
        float, _option(_DATA, metavar="R", help="Lengths vary by up to this share, both ways; 0 to below 1.")
    ] = 0.0,
    prefix_repetition_prefix_len: Annotated[int, _option(_DATA, metavar="TOKENS", min=1)] = 256,
    prefix_repetition_suffix_len: Annotated[int, _option(_DATA, metavar="TOKENS", min=1)] = 256,
    prefix_repetition_num_prefixes: Annotated[int, _option(_DATA, metavar="N", min=1)] = 10,
    prefix_repetition_output_len: Annotated[int, _option(_DATA, metavar="TOKENS", min=1)] = 128,
    multi_turn_num_turns: Annotated[int, _option(_DATA, metavar="N", min=1, help="Turns of a conversation.")] = 8,
    multi_turn_first_len: Annotated[int, _option(_DATA, metavar="TOKENS", min=1, help="Its first prompt.")] = 2048,
    multi_turn_input_len: Annotated[int, _option(_DATA, metavar="TOKENS", min=1, help="What each turn adds.")] = 256,
    multi_turn_output_len: Annotated[int, _option(_DATA, metavar="TOKENS", min=1, help="Its answers.")] = 128,
    multi_turn_think_time: Annotated[
        float, _option(_DATA, metavar="SECONDS", min=0, help="Mean time from an answer to the next turn.")
    ] = 0.0,
    custom_output_len: Annotated[
        int, _option(_DATA, metavar="TOKENS", min=1, help="Where a line has no output_len.")
    ] = 256,
    request_rate: Annotated[
        float, _option(_LOAD, metavar="R", help="Requests per second, as a Poisson process; inf sends all at once.")
    ] = math.inf,
    burstiness: Annotated[
        float, _option(_LOAD, metavar="B", help="Gaps are gamma-distributed: below 1 in bursts, above 1 more even.")
    ] = 1.0,
    max_concurrency: Annotated[int | None, _option(_LOAD, metavar="N", min=1, help="Requests under way at most.")] = (
        None
    ),
    ignore_eos: Annotated[bool, _option(_LOAD, "--ignore-eos", help="Every request generates all its tokens.")] = False,
    temperature: Annotated[float, _option(_LOAD, metavar="T", help="Sampling temperature; 0 is greedy.")] = 0.0,
    extra_body: Annotated[
        str | None, _option(_LOAD, metavar="JSON", help='More fields of each request, e.g. {"top_p": 0.9}.')
    ] = None,
    request_timeout: Annotated[
        float, _option(_LOAD, metavar="SECONDS", help="A request that takes longer counts as failed.")
    ] = 3600.0,
    num_warmups: Annotated[
        int, _option(_LOAD, metavar="N", min=0, help="Requests sent one by one before those that count.")
    ] = 1,
    profile: Annotated[
        bool,
        _option(_LOAD, "--profile", help="Let the server record a trace of the load; it needs --enable-profiler DIR."),
    ] = False,
    profile_steps: Annotated[
        int | None, _option(_LOAD, metavar="N", min=1, help="Steps of that trace. Default: what the server allows.")
    ] = None,
    seed: Annotated[int, _option(_LOAD, metavar="S", help="Of prompts, lengths and arrivals.")] = 0,
    percentile_metrics: Annotated[
        str, _option(_OUT, metavar="NAME,...", help="Latencies to print: ttft, tpot, itl, e2el.")
    ] = "ttft,tpot,itl,e2el",
    metric_percentiles: Annotated[str, _option(_OUT, metavar="P,...", help="Percentiles of each.")] = "99",
    goodput: Annotated[
        list[str] | None,
        _option(
            _OUT, metavar="NAME:MS", help="Bound that a good request keeps, for ttft, tpot or e2el. May be repeated."
        ),
    ] = None,
    save_result: Annotated[bool, _option(_OUT, "--save-result", help="Write the figures to a JSON file.")] = False,
    save_detailed: Annotated[
        bool, _option(_OUT, "--save-detailed", help="Also write every request's times and text.")
    ] = False,
    result_dir: Annotated[str, _option(_OUT, metavar="FOLDER", help="Folder of that file.")] = ".",
    result_filename: Annotated[
        str | None, _option(_OUT, metavar="NAME", help="Name of that file. Default: made of model, rate and time.")
    ] = None,
    plot: Annotated[
        str | None, _option(_OUT, metavar="FILE.svg", help="Draw latency percentiles and throughput over time.")
    ] = None,
) -> None:
    """Send requests to an OpenAI-compatible server, streamed, and report latencies and throughput.

    Exits with 1 when a request failed.
    """
    from thalweg.bench import serve_figures as figures
    from thalweg.bench.serve_load import CHAT, COMPLETIONS, Load
    from thalweg.bench.serve_profile import ProfiledServer
    from thalweg.http_client import HttpClient

    if endpoint not in (CHAT, COMPLETIONS):
        raise ConfigError(f"--endpoint is {endpoint!r}; expected {COMPLETIONS} or {CHAT}")
    if not 0 <= random_range_ratio < 1:
        raise ConfigError(f"--random-range-ratio is {random_range_ratio}; expected 0 or more and below 1")
    for option, value in (("--request-rate", request_rate), ("--burstiness", burstiness)):
        if not value > 0 or (value == math.inf and option == "--burstiness"):
            raise ConfigError(f"{option} is {value}; expected a number above 0")
    if not 0 < request_timeout < math.inf:
        raise ConfigError(f"--request-timeout is {request_timeout}; expected seconds")
    if dataset_name not in DATASETS or (dataset_name == "custom") != (dataset_path is not None):
        raise ConfigError(
            f"--dataset-name is {dataset_name!r} and --dataset-path {dataset_path!r}; expected one of"
            f" {', '.join(DATASETS)}, and a path for custom alone"
        )
    metrics = [name for name in percentile_metrics.split(",") if name]
    if not set(metrics) <= set(figures.METRICS):
        raise ConfigError(f"--percentile-metrics is {percentile_metrics!r}; expected {','.join(figures.METRICS)}")
    percentiles, bounds = read_percentiles(metric_percentiles), figures.read_goodput(goodput or [])
    options: dict[str, Any] = {"temperature": temperature} | ({"ignore_eos": True} if ignore_eos else {})
    options |= read_object(extra_body)
    for option, path in (("--result-dir", Path(result_dir) / "x"), ("--plot", Path(plot or "x"))):
        if not path.expanduser().resolve().parent.is_dir():
            raise ConfigError(
                f"{option} is {plot if option == '--plot' else result_dir!r}, a folder that does not exist"
            )

    requests: list[BenchRequest] = []
    conversations: list[Conversation] = []
    if dataset_path is not None:
        from thalweg.bench.serve_data import read_requests

        requests = read_requests(dataset_path, num_prompts, custom_output_len)
    else:
        from thalweg.bench.serve_data import RandomPrompts
        from thalweg.config.model_source import model_folder
        from thalweg.tokenizer.load import load_tokenizer

        folder = model_folder(None) if tokenizer is None else Path(tokenizer).expanduser()
        prompts = RandomPrompts(load_tokenizer(folder), seed, as_text=endpoint == CHAT)
        if dataset_name == "random":
            requests = prompts.random(num_prompts, random_input_len, random_output_len, random_range_ratio)
        elif dataset_name == "multi_turn":
            lengths = multi_turn_first_len, multi_turn_input_len, multi_turn_output_len
            conversations = prompts.multi_turn(num_prompts, multi_turn_num_turns, *lengths, multi_turn_think_time)
        else:
            requests = prompts.prefix_repetition(
                num_prompts,
                prefix_repetition_prefix_len,
                prefix_repetition_suffix_len,
                prefix_repetition_num_prefixes,
                prefix_repetition_output_len,
            )

    load = Load(request_rate, burstiness, max_concurrency, seed)
    http = HttpClient(base_url, env.read("THALWEG_API_KEY") if api_key is None else api_key)
    if profile_steps is not None and not profile:
        raise ConfigError(f"--profile-steps is {profile_steps} and --profile is not given; expected both")
    profiled = ProfiledServer(profile, profile_steps)
    date = time.strftime("%Y%m%d-%H%M%S")
    name, outcomes, duration = asyncio.run(
        _measure(
            http, endpoint, model, options, request_timeout, requests or conversations, load, num_warmups, profiled
        )
    )
    found = figures.summarise(outcomes, duration, bounds, percentiles)
    print(*figures.lines(found, metrics, percentiles), sep="\n")
    if profiled.outcome is not None:
        print(profiled.outcome)
    if save_result or save_detailed:
        settings = {
            "date": date,
            "base_url": base_url,
            "endpoint": endpoint,
            "model_id": name,
            "dataset_name": dataset_name,
            "num_prompts": num_prompts,
            "request_rate": request_rate if math.isfinite(request_rate) else "inf",
            "burstiness": burstiness,
            "max_concurrency": max_concurrency,
            "seed": seed,
        }
        details = {"requests": [asdict(o) for o in outcomes]} if save_detailed else {}
        file = Path(result_dir).expanduser() / (
            result_filename or f"{name.replace('/', '-')}-{request_rate}-{date}.json"
        )
        write(file, json.dumps({**settings, **found, **details}, indent=2) + "\n", "--result-dir")
    if plot is not None:
        from thalweg.bench.serve_plot import draw

        write(Path(plot).expanduser(), draw(outcomes, f"{name}, {len(outcomes)} requests, {date}"), "--plot")
    if found["failed"]:
        raise typer.Exit(1)


async def _measure(
    http: HttpClient,
    endpoint: str,
    model: str | None,
    options: dict[str, Any],
    timeout_s: float,
    work: Sequence[BenchRequest | Conversation],
    load: Load,
    num_warmups: int,
    profiled: ProfiledServer,
) -> tuple[str, list[Outcome], float]:
    from thalweg.bench.serve_data import Conversation
    from thalweg.bench.serve_load import Target, run_load

    try:
        name = model or await http.first_model()
        target = Target(http, endpoint, name, options, timeout_s)
        requests = [each.turns[0] if isinstance(each, Conversation) else each for each in work]
        for request in requests:
            target.body(request)  # refuses what the endpoint does not take before anything is sent
        await _warm_up(target, requests, num_warmups)
        async with profiled.while_(http):
            with progress(sum(len(each.turns) if isinstance(each, Conversation) else 1 for each in work)) as on_done:
                outcomes, duration = await run_load(target, work, load, on_done)
    finally:
        http.close()
    return name, outcomes, duration


async def _warm_up(target: Target, requests: list[BenchRequest], count: int) -> None:
    """A server that cannot answer one request is not worth a thousand. Prompts begin otherwise than those of the
    requests, so that a prefix cache has nothing of these, and have no more tokens; messages stay as they are."""
    for i in range(count):
        request = requests[i % len(requests)]
        prompt = request.prompt
        if isinstance(prompt, str):  # backwards it would have twice the tokens
            half = len(prompt) // 2
            # Cut and joined it may have a few tokens more, for which a tenth of the half makes room.
            request = replace(request, prompt=prompt[half:] + prompt[: half * 9 // 10])
        elif not isinstance(prompt[0], dict):
            request = replace(request, prompt=prompt[::-1])
        outcome = await target.send(request)
        if outcome.error is not None:
            raise ThalwegError(f"the first request failed: {outcome.error}")
