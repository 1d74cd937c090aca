"""The pages of the repository: links lead somewhere, tables have as many cells in each row, options exist.

And the records of experiments: a title has date, verdict and commit, a cell one number, the index the latest entries.
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import typer

from thalweg.cli.app import app
from thalweg.core import SamplingParams
from thalweg.text.results import CompletionOutput, RequestOutput

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(p for room in ("docs", "src", "scripts") for p in ROOT.glob(f"{room}/**/*.md"))])
EXPERIMENTS = sorted(page for page in ROOT.glob("docs/experiments/*.md") if page.name != "README.md")
ENTRY = re.compile(r"(\d{4}-\d\d-\d\d) ((?:Kept|Dropped|Measured|Open): .+) \(commit [0-9a-f]{7,40}\)")
# A page of the model that a parser's docstring cites, and a placeholder.
ELSEWHERE = {"docs/tool_call_guidance.md", "docs/adr/NNNN-name.md"}
# Options of other programs, and one of ours that exists to be refused.
OTHERS = {
    "--tasks",
    "--nproc-per-node",
    "--gpus",
    "--target",
    "--local-dir",
    "--no-deps",
    "--no-binary",
    "--backend",
    "--lm-eval",
    "--trust-remote-code",
}


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
def test_no_page_has_marks_of_a_merge(page: Path) -> None:
    assert not re.findall(r"^(?:<{7} .*|={7}|>{7} .*)$", page.read_text(), re.MULTILINE)


def test_pages_named_in_text_exist() -> None:
    files = [*PAGES, *(path for room in ("src", "scripts", "tests") for path in ROOT.glob(f"{room}/**/*.py"))]
    for file in files:
        for name in re.findall(r"(?<![\w/.-])docs/[\w/-]+\.md", file.read_text()):
            assert name in ELSEWHERE or (ROOT / name).exists(), f"{file.relative_to(ROOT)} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_rows_of_a_table_have_as_many_cells(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = table.splitlines()
        assert re.fullmatch(r"\|[-| :]+\|", rows[1]), rows[0]
        assert len({row.replace(r"\|", "").count("|") for row in rows}) == 1, rows[0]


def entries(page: Path) -> list[tuple[str, str]]:
    """Date and verdict with subject of each entry of a record of experiments."""
    titles = re.findall(r"^## (.*)$", page.read_text(), re.MULTILINE)
    matches = {title: ENTRY.fullmatch(title) for title in titles}
    assert all(matches.values()), [title for title, match in matches.items() if match is None]
    return [(match[1], match[2]) for match in matches.values() if match]


@pytest.mark.parametrize("page", EXPERIMENTS, ids=lambda page: page.stem)
def test_experiments_have_date_verdict_and_commit_newest_first(page: Path) -> None:
    dates = [date for date, _ in entries(page)]
    assert dates
    assert dates == sorted(dates, reverse=True)


@pytest.mark.parametrize("page", EXPERIMENTS, ids=lambda page: page.stem)
def test_experiments_have_one_number_per_cell(page: Path) -> None:
    for row in re.findall(r"^\|.*$", page.read_text(), re.MULTILINE):
        assert not re.search(r"\d\s*(/|;|\.\.)\s*\d", re.sub(r"`[^`]*`", "", row)), row


def test_index_of_experiments_has_the_latest_entry_of_each_file() -> None:
    index = (ROOT / "docs" / "experiments" / "README.md").read_text()
    rows = re.findall(r"^\| \[([\w-]+)\.md\]\(\1\.md\) \| .* \| (.*) \|$", index, re.MULTILINE)
    assert dict(rows) == {page.stem: entries(page)[0][1] for page in EXPERIMENTS}


def test_index_of_decisions_has_every_record() -> None:
    folder = ROOT / "docs" / "adr"
    rows = re.findall(
        r"^\| \[(\d{4})\]\((\1-[\w-]+\.md)\) \| (.*) \|$", (folder / "README.md").read_text(), re.MULTILINE
    )
    titles = {page.name: page.read_text().splitlines()[0] for page in folder.glob("0*.md")}
    assert {name: f"# {number} {title}" for number, name, title in rows} == titles


def test_the_python_page_has_every_parameter_and_output() -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    names = [f.name for kind in (RequestOutput, CompletionOutput) for f in fields(kind)] + list(
        SamplingParams.__struct_fields__
    )
    missing = [name for name in names if not re.search(rf"[`.]{name}\b", page)]
    assert missing == ["request_id", "prompt", "index"]


def options(command: object) -> set[str]:
    """Of a command and those below it."""
    params = getattr(command, "params", ())
    own = {name for param in params for names in ("opts", "secondary_opts") for name in getattr(param, names, ())}
    return own.union(*map(options, getattr(command, "commands", {}).values()))


def test_options_exist() -> None:
    known = options(typer.main.get_command(app)) | OTHERS
    assert "--num-prompts" in known
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md")]:
        unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", page.read_text())) - known
        assert not unknown, page.name
