"""`thalweg eval`: accuracy of a model on word problems."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from thalweg.cli.options import engine_config, takes
from thalweg.config.engine import EngineConfig

if TYPE_CHECKING:
    from thalweg.evals.runner import Score

evals = typer.Typer(help="Measure a model's accuracy.")

NumQuestions = Annotated[int, typer.Option(metavar="N", min=1, max=100_000, help="Problems to ask.")]
Parallel = Annotated[int, typer.Option(metavar="N", min=1, help="Problems under way at once.")]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of one answer at most.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

# --parallel says how many run at once.
takes_engine = takes(config=engine_config, leave_out=("max_num_seqs",))


@evals.command()
@takes_engine
def arith(
    config: EngineConfig,
    num_questions: NumQuestions = 500,
    parallel: Parallel = 64,
    max_new_tokens: MaxNewTokens = 256,
    as_json: AsJson = False,
) -> None:
    """Arithmetic word problems of the kind the bundled model learned, from the held-out split.

    Asked through the chat template and answered greedily; --seed chooses the problems. An answer is right when the
    number after its last #### is.
    """
    from thalweg.engine.llm import LLM
    from thalweg.evals.arith import evaluate_arith

    with LLM(**replace(config, max_num_seqs=parallel).to_dict()) as llm, _progress(num_questions) as advance:
        score = evaluate_arith(llm, num_questions, config.seed, max_new_tokens, advance)
    _print(score, as_json)


@evals.command()
@takes_engine
def gsm8k(
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
    parallel: Parallel = 64,
    max_new_tokens: MaxNewTokens = 512,
    as_json: AsJson = False,
) -> None:
    """GSM8K, or any file in its form: few-shot prompts, answered greedily up to the next "Question".

    The questions are those that follow the examples in the file. An answer is right when the number after its last
    ####, or else its last number, is.
    """
    from thalweg.engine.llm import LLM
    from thalweg.evals.gsm8k import evaluate_gsm8k, read_examples

    examples = read_examples(data_path, num_shots + num_questions)
    total = max(0, len(examples) - num_shots)
    with LLM(**replace(config, max_num_seqs=parallel).to_dict()) as llm, _progress(total) as advance:
        score = evaluate_gsm8k(llm, examples, num_shots, max_new_tokens, advance)
    _print(score, as_json)


def _print(score: Score, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(score)))
        return
    print(f"Questions: {score.num_questions}")
    print(f"Accuracy: {score.accuracy:.3f}")
    print(f"Invalid: {score.invalid:.3f}")
    print(f"Latency: {score.latency_s:.3f} s")
    print(f"Output throughput: {score.output_throughput:.3f} token/s")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr, where that is a terminal; gives a callback that moves it on by one."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
