"""`thalweg chat`: a conversation on the terminal."""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from thalweg.cli.answer import Answer, stream_answer
from thalweg.cli.options import GivenParams, engine_config, sampling_params, takes
from thalweg.config.engine import EngineConfig
from thalweg.core import SamplingParams
from thalweg.errors import InvalidRequest

if TYPE_CHECKING:
    from thalweg.engine.llm import LLM


@takes(params=partial(sampling_params, max_tokens=None), config=engine_config)
def chat(
    config: EngineConfig,
    params: GivenParams,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message to begin with.")] = None,
) -> None:
    """Talk with a model. /reset forgets the conversation, /exit or Ctrl-D ends it.

    If stdin is not a terminal, each of its lines is a turn.
    """
    from rich.console import Console

    from thalweg.engine.llm import LLM

    notes = Console(stderr=True, highlight=False)
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # line editing and history, where Python has it
            import readline  # noqa: F401
    start = [] if system is None else [{"role": "system", "content": system}]
    with LLM.of(config) as llm:
        llm.codec.chat_template()  # refuses a model that cannot chat before the first line is typed
        messages = list(start)
        if interactive:
            notes.print(f"{llm.info.name} on {llm.info.device}; /reset, /exit", style="dim")
        while (line := _read_line(interactive)) is not None:
            if line == "/exit":
                break
            if line == "/reset":
                messages = list(start)
                notes.print("the conversation is forgotten", style="dim")
                continue
            if not line:
                continue
            turn = {"role": "user", "content": line}
            try:
                answer = _answer(llm, [*messages, turn], params.over(llm.suggested))
            except InvalidRequest as e:  # the conversation has outgrown the context, most likely
                print(f"error: {e}; /reset begins anew", file=sys.stderr)
                continue
            messages += [turn, {"role": "assistant", "content": answer.text}]
            notes.print(answer.figures, style="dim")


def _answer(llm: LLM, messages: list[dict[str, str]], params: SamplingParams) -> Answer:
    answer = stream_answer(llm, llm.codec.chat_ids(messages), params, lambda text: print(text, end="", flush=True))
    print(flush=True)
    return answer


def _read_line(interactive: bool) -> str | None:
    """The next turn; None at the end of input."""
    try:
        return input("> " if interactive else "").strip()
    except EOFError:
        return None
