"""The command's verbs, and how each ends: with 0, or with one line on stderr and exit code 2 (3: the engine died)."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from thalweg import __version__
from thalweg.cli.bench import bench
from thalweg.cli.bench_functions import functions
from thalweg.cli.bench_kernels import kernels
from thalweg.cli.bench_serve import serve as bench_serve
from thalweg.cli.bench_soak import soak
from thalweg.cli.chat import chat
from thalweg.cli.convert import convert
from thalweg.cli.evals import evals
from thalweg.cli.generate import generate
from thalweg.cli.inspect import inspect
from thalweg.cli.place_experts import place_experts
from thalweg.cli.profile import profile
from thalweg.cli.serve import serve
from thalweg.cli.trace import trace
from thalweg.config.extras import why_missing
from thalweg.config.streams import forgo_stdout, hold_closed_streams, say, why_unwritable
from thalweg.errors import EngineDeadError, ThalwegError

READER_GONE, ERROR, ENGINE_DIED, INTERRUPTED = 1, 2, 3, 130

# The class of every complaint about the command line itself. typer does not export it under one name in all versions.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="thalweg",
    help="Thalweg runs language models that mix linear attention with full attention. MODEL is a folder in Hugging "
    "Face layout, OWNER/NAME on Hugging Face, or a GGUF file. Without MODEL, every command takes the small model that "
    "comes with the package.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate)
app.command()(chat)
app.command()(serve)
app.command()(inspect)
app.command()(convert)
app.command()(place_experts)
app.command()(profile)
app.command()(trace)
bench.command()(functions)
bench.command()(kernels)
bench.command()(bench_serve)
bench.command()(soak)
app.add_typer(evals, name="eval")
app.add_typer(bench, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"thalweg {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line (None: this process's). Returns the exit code: 2 after a mistake, or if the output cannot be
    written, each of which is one line on stderr; 3 if the engine died; 1, without a word, if the reader of the output
    has seen enough (`| head`)."""
    hold_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters that a model has
    try:
        code = _run(args)
        sys.stdout.flush()
    except OSError as e:
        reason = why_unwritable(e)
        if reason is None:
            raise
        forgo_stdout()
        code = READER_GONE if isinstance(e, BrokenPipeError) else _fail(f"the output cannot be written: {reason}")
    except SystemExit as e:  # how click and rich leave, with READER_GONE, when the reader has gone
        forgo_stdout()
        code = e.code if isinstance(e.code, int) else ERROR
    return code


def _run(args: Sequence[str] | None) -> int:
    try:
        code = app(args=None if args is None else list(args), prog_name="thalweg", standalone_mode=False)
    except _UsageError as e:
        return _fail(e.format_message(), e)  # type: ignore[attr-defined]
    except EngineDeadError as e:
        _fail(str(e))
        return ENGINE_DIED
    except ThalwegError as e:
        return _fail(str(e))
    except ModuleNotFoundError as e:
        if (reason := why_missing(e)) is None:
            raise
        return _fail(reason)
    except (KeyboardInterrupt, typer.Abort):
        say("", error=True)
        return INTERRUPTED
    return code if isinstance(code, int) else 0


def _fail(message: str, usage: Exception | None = None) -> int:
    line = " ".join(message.split())
    context = getattr(usage, "ctx", None)
    hint = f" (see `{context.command_path} --help`)" if context is not None else ""
    say(f"error: {line}{hint}", error=True)
    return ERROR
