"""The pages of the repository: links lead somewhere, tables have as many cells in each row, options exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from thalweg.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(p for room in ("docs", "src", "scripts") for p in ROOT.glob(f"{room}/**/*.md"))])
# Options of other programs, and one of ours that exists to be refused.
OTHERS = {"--tasks", "--no-deps", "--backend", "--lm-eval", "--trust-remote-code"}


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_rows_of_a_table_have_as_many_cells(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = table.splitlines()
        assert re.fullmatch(r"\|[-| :]+\|", rows[1]), rows[0]
        assert len({row.replace(r"\|", "").count("|") for row in rows}) == 1, rows[0]


def options(command: object) -> set[str]:
    """Of a command and those below it."""
    own = {name for param in getattr(command, "params", ()) for name in getattr(param, "opts", ())}
    return own.union(*map(options, getattr(command, "commands", {}).values()))


def test_options_exist() -> None:
    known = options(typer.main.get_command(app)) | OTHERS
    assert "--num-prompts" in known
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md")]:
        unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", page.read_text())) - known
        assert not unknown, page.name
