"""Where tables are printed: as wide as the terminal, and wide enough for whole lines where there is none."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

PIPE_WIDTH = 160


def stdout_console() -> Console:
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


def plain_table(*headings: str, numbers: bool = False) -> Table:
    """A table without lines; without headings it is a list of facts. `numbers` are kept whole, at the right."""
    table = Table(box=None, padding=(0, 2 if not numbers else 1, 0, 0), show_header=bool(headings))
    for heading in headings:
        table.add_column(heading, justify="right" if numbers else "left", no_wrap=numbers, overflow="fold")
    return table
