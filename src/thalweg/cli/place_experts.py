"""`thalweg place-experts`: from the counts of a server to a file for --expert-placement."""

from __future__ import annotations

from math import isnan
from pathlib import Path
from typing import Annotated

import typer

from thalweg.errors import ConfigError


def place_experts(
    metrics: Annotated[
        Path,
        typer.Argument(metavar="METRICS", help="What /metrics of a server with --expert-metrics said, in a file."),
    ],
    ranks: Annotated[
        int, typer.Option("--data-parallel-size", "-dp", metavar="N", min=2, help="Ranks to place experts on.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write.")],
    redundant: Annotated[
        int, typer.Option("--redundant", metavar="N", min=0, help="Copies of experts in each layer, over all ranks.")
    ] = 0,
) -> None:
    """Place a model's experts, and copies of the busiest, so that data-parallel ranks get equal work."""
    from thalweg.assembly.expert_placement import counted, placed_by

    try:
        text = metrics.expanduser().read_text()
    except (OSError, ValueError) as e:
        raise ConfigError(f"METRICS is {str(metrics)!r}, which cannot be read: {e}") from None
    written, shares = placed_by(counted(text, str(metrics)), redundant, ranks)
    try:
        output.expanduser().write_text(written)
    except OSError as e:
        raise ConfigError(f"--output is {str(output)!r}, which cannot be written: {e.strerror}") from None
    before, after = (sum(each) / len(shares) for each in zip(*shares, strict=True))
    in_order = "" if isnan(before) else f", {before:.2f} times with experts in order"
    print(f"{output}: the busiest rank gets {after:.2f} times the mean{in_order}")
