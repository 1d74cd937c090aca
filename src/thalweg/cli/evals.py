"""`thalweg eval`: accuracy on word problems, of a model in this process or of a server."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thalweg.cli.options import engine_config, takes
from thalweg.cli.results_file import check_writable, write_json
from thalweg.config import env
from thalweg.config.engine import EngineConfig
from thalweg.errors import ConfigError

if TYPE_CHECKING:
    from thalweg.evals.runner import Score, Task

evals = typer.Typer(help="Measure the accuracy of a model, or of a server with --base-url.")

NumQuestions = Annotated[int, typer.Option(metavar="N", min=1, max=100_000, help="Problems to ask.")]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Most tokens of one answer.")]


@dataclass(frozen=True, slots=True)
class Run:
    """Where answers come from, how many at once, and where the figures go."""

    base_url: str | None
    model: str | None
    api_key: str | None
    timeout_s: float
    max_retries: int
    parallel: int
    as_json: bool
    output_json: str | None


def run_options(
    base_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Ask this OpenAI-compatible server, given without /v1, instead of MODEL."),
    ] = None,
    served_model: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME", help="Name of the server's model. Default: its first."),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="The server's key. Default: THALWEG_API_KEY, or no key.")
    ] = None,
    request_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="An answer of a server that takes longer counts as failed.")
    ] = 600.0,
    max_retries: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, max=100, help="How often a request is sent again that a server refused for now or lost."
        ),
    ] = 3,
    parallel: Annotated[int, typer.Option(metavar="N", min=1, max=65_536, help="Problems under way at once.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    output_json: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write the figures and every answer there, for `thalweg bench compare`."),
    ] = None,
) -> Run:
    if base_url is None and (served_model is not None or api_key is not None):
        option = "--model" if served_model is not None else "--api-key"
        raise ConfigError(f"{option} is for a server; expected --base-url too, or MODEL instead")
    if not 0 < request_timeout < math.inf:
        raise ConfigError(f"--request-timeout is {request_timeout}; expected seconds")
    check_writable(output_json)
    return Run(base_url, served_model, api_key, request_timeout, max_retries, parallel, as_json, output_json)


# --parallel says how many run at once.
takes_engine = takes(run=run_options, config=engine_config, leave_out=("max_num_seqs", "generation_config"))


@evals.command()
@takes_engine
def arith(
    run: Run, config: EngineConfig, num_questions: NumQuestions = 500, max_new_tokens: MaxNewTokens = 256
) -> None:
    """Arithmetic word problems of the kind the bundled model learned, from the held-out split.

    Asked as chats and answered greedily; --seed chooses the problems. An answer is right when the number after its
    last #### is. Exits with 1 when a request failed.
    """
    from thalweg.evals.arith import arith_task

    parameters = {"num_questions": num_questions, "max_new_tokens": max_new_tokens, "seed": config.seed}
    task = arith_task(num_questions, config.seed, max_new_tokens)
    _evaluate(run, config, {"eval": "arith", **parameters}, task)


@evals.command()
@takes_engine
def gsm8k(
    run: Run,
    config: EngineConfig,
    data_path: Annotated[
        str,
        typer.Option(metavar="FILE", help='JSON lines with "question" and "answer", such as GSM8K\'s test.jsonl.'),
    ],
    num_questions: NumQuestions = 200,
    num_shots: Annotated[
        int,
        typer.Option(metavar="N", min=0, max=64, help="Solved examples before each question: the file's first ones."),
    ] = 5,
    max_new_tokens: MaxNewTokens = 512,
) -> None:
    """GSM8K, or any file in its form: few-shot prompts, answered greedily up to the next "Question".

    The questions are those that follow the examples in the file. An answer is right when the number after its last
    ####, or else its last number, is. Exits with 1 when a request failed.
    """
    from thalweg.evals.gsm8k import gsm8k_task, read_examples

    examples = read_examples(data_path, num_shots + num_questions)
    task = gsm8k_task(examples, num_shots, max_new_tokens)
    parameters = {"num_questions": len(task.questions), "num_shots": num_shots, "max_new_tokens": max_new_tokens}
    _evaluate(run, config, {"eval": "gsm8k", **parameters}, task)


@evals.command()
@takes(config=engine_config, leave_out=("max_num_seqs", "max_num_batched_tokens", "cache_memory", "generation_config"))
def mtp_acceptance(
    config: EngineConfig,
    num_questions: NumQuestions = 500,
    max_new_tokens: MaxNewTokens = 256,
    draft_tokens: Annotated[int, typer.Option(metavar="N", min=1, max=16, help="Tokens drafted in a row.")] = 3,
    parallel: Annotated[int, typer.Option(metavar="N", min=1, max=65_536, help="Problems under way at once.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    output_json: Annotated[str | None, typer.Option(metavar="FILE", help="Write the figures there.")] = None,
) -> None:
    """What the model's MTP layer drafts while it answers the problems of `arith`, and how much would be accepted.

    Answers are greedy. For 1 draft per step, for 2, and so on: the share of drafts that the model then says itself, of
    all, of the first, second, ... of a step; and tokens per step, the model's own included.
    """
    from thalweg.assembly.drafter import build_drafter
    from thalweg.evals.arith import arith_task
    from thalweg.evals.drafts import acceptance, draft
    from thalweg.text.codec import load_codec

    check_writable(output_json)
    task, codec = arith_task(num_questions, config.seed, max_new_tokens), load_codec(config)
    prompts = [codec.chat_ids(question.prompt) for question in task.questions if not isinstance(question.prompt, str)]
    drafter, end_ids = build_drafter(config), frozenset(codec.source.eos_token_ids)
    with _progress(len(prompts)) as advance:
        answers = draft(
            drafter,
            prompts,
            end_ids,
            max_new_tokens=max_new_tokens,
            depth=draft_tokens,
            parallel=parallel,
            advance=lambda: advance(False),
        )
    parameters = {"num_questions": num_questions, "max_new_tokens": max_new_tokens, "seed": config.seed}
    rows = acceptance(answers, draft_tokens)
    found = {"eval": "mtp-acceptance", **parameters, "results": rows}
    write_json(output_json, found)
    if as_json:
        print(json.dumps(found))
        return
    for row in rows:
        places = ", ".join(f"{share:.4f}" for share in row["by_place"])
        accepted = f"{row['draft_tokens']} per step: accepted {row['accepted']:.4f} (by place {places})"
        print(f"{accepted}, {row['tokens_per_step']:.3f} tokens per step")


def _evaluate(run: Run, config: EngineConfig, what: dict[str, Any], task: Task) -> None:
    retries = 0
    if run.base_url is not None:
        _refuse_engine_options(replace(config, seed=0) if "seed" in what else config)  # it chose the problems
        score, asked, retries = asyncio.run(_ask_server(run, run.base_url, task))
    else:
        score, asked = _ask_engine(run, config, task)
    row = {**what, **score.summary(), "retries": retries, "answers": [asdict(r) for r in score.results]}
    write_json(run.output_json, {"engine": asked, "results": [row]})
    if run.as_json:
        print(json.dumps({**score.summary(), "retries": retries}))
    else:
        _print(score, retries)
    if score.errors:
        raise typer.Exit(1)


def _ask_engine(run: Run, config: EngineConfig, task: Task) -> tuple[Score, dict[str, Any]]:
    from thalweg.engine.llm import LLM
    from thalweg.evals.offline import evaluate_offline

    with LLM.of(replace(config, max_num_seqs=run.parallel)) as llm, _progress(len(task.questions)) as advance:
        score = evaluate_offline(llm, task, lambda: advance(False))
    info = llm.info
    asked = {name: getattr(info, name) for name in ("name", "device", "dtype", "quantization", "tensor_parallel_size")}
    return score, asked


async def _ask_server(run: Run, base_url: str, task: Task) -> tuple[Score, dict[str, Any], int]:
    from thalweg.evals.server import Examiner, Patience
    from thalweg.http_client import HttpClient

    http = HttpClient(base_url, env.read("THALWEG_API_KEY") if run.api_key is None else run.api_key)
    try:
        name = run.model or await http.first_model()
        examiner = Examiner(http, name, run.parallel, Patience(run.timeout_s, run.max_retries))
        with _progress(len(task.questions)) as advance:
            score = await examiner.evaluate(task, lambda reply: advance(reply.error is not None))
    finally:
        http.close()
    return score, {"name": name, "base_url": base_url}, examiner.retries


def _refuse_engine_options(config: EngineConfig) -> None:
    default = EngineConfig()
    for name in (f.name for f in fields(config)):
        if getattr(config, name) != getattr(default, name):
            option = "MODEL" if name == "model" else "--" + name.replace("_", "-")
            raise ConfigError(
                f"{option} is for an engine in this process, and --base-url asks a server; expected one of the two"
            )


def _print(score: Score, retries: int) -> None:
    print(f"Questions: {score.num_questions}")
    print(f"Accuracy: {score.accuracy:.3f}")
    print(f"Invalid: {score.invalid:.3f}")
    print(f"Latency: {score.latency_s:.3f} s")
    if score.output_throughput is None:
        print("Output throughput: not measured, the server counts no tokens (usage)")
    else:
        print(f"Output throughput: {score.output_throughput:.3f} token/s")
    if retries:
        print(f"Retries: {retries}")
    if score.errors:
        print(f"Errors: {score.errors}, counted as invalid")
        reasons = Counter(r.error for r in score.results if r.error is not None)
        for reason, count in reasons.most_common(20):
            print(f"failed: {count} x {reason}")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[bool], None]]:
    """A bar on stderr, where that is a terminal; gives a callback that moves it on by one, which may have failed."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda has_failed: None  # a disabled bar of rich 13 and 14 still prints an empty line
        return
    columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[failed]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task, failed = bar.add_task("", total=total, failed=""), 0

        def done(has_failed: bool) -> None:
            nonlocal failed
            failed += has_failed
            bar.update(task, advance=1, failed=f"{failed} failed" if failed else "")

        yield done
