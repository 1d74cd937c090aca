"""`thalweg convert`: a model folder as a GGUF file, or a GGUF file as a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thalweg.config.engine import EngineConfig
from thalweg.errors import ConfigError

FORMATS = ("gguf", "safetensors")


def convert(
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="gguf or safetensors.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="PATH", help="The .gguf file, or the folder, to write.")
    ],
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Model folder or GGUF file. Default: the bundled model.")
    ] = None,
    outtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="f32, f16, bf16, and in GGUF files q8_0, q6_k or q4_k_m. Default: f16 in GGUF files, else bf16.",
        ),
    ] = None,
) -> None:
    """Convert a model to or from GGUF, llama.cpp's format, with its tokenizer and chat template."""
    from thalweg.assembly.convert import to_gguf, to_safetensors

    if to not in FORMATS:
        raise ConfigError(f"--to is {to!r}; expected {' or '.join(FORMATS)}")
    config = EngineConfig(model=model)
    if to == "gguf":
        to_gguf(config, output.expanduser(), outtype or "f16")
    else:
        to_safetensors(config, output.expanduser(), outtype or "bf16")
