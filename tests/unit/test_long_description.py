"""README as a package index shows it: links lead to the repository's host, or are text while it has no address."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hatch_build import absolute, urls

ROOT = Path(__file__).resolve().parents[2]
HOST = "https://example.org/owner/thalweg"
RELATIVE = re.compile(r"\]\((?![a-z]+:|#)")


@pytest.mark.parametrize("repository", ["", HOST])
def test_readme_keeps_no_link_that_works_only_beside_its_files(repository: str) -> None:
    text = (ROOT / "README.md").read_text()
    assert RELATIVE.search(text)  # else this tests nothing
    assert not RELATIVE.search(absolute(text, repository))


@pytest.mark.parametrize(
    ("text", "without", "with_address"),
    [
        ("[API](docs/api.md)", "API", f"[API]({HOST}/blob/HEAD/docs/api.md)"),
        ("[a](docs/api.md#tools)", "a", f"[a]({HOST}/blob/HEAD/docs/api.md#tools)"),
        ("![page](docs/a.png) b", " b", f"![page]({HOST}/raw/HEAD/docs/a.png) b"),
        ("[deploy](../deploy)", "deploy", f"[deploy]({HOST}/blob/HEAD/deploy)"),
        ("[x](https://a.org) [y](#z)", "[x](https://a.org) [y](#z)", "[x](https://a.org) [y](#z)"),
    ],
)
def test_links(text: str, without: str, with_address: str) -> None:
    folder = "docs" if "../" in text else ""
    assert absolute(text, "", folder=folder) == without
    assert absolute(text, HOST, folder=folder) == with_address


def test_pages_of_the_site_keep_links_to_each_other() -> None:
    text = "[a](../api.md#x) [b](../../deploy)"
    assert absolute(text, "", folder="docs/adr", keep="docs") == "[a](../api.md#x) b"


def test_an_index_shows_links_of_the_project_once_it_has_an_address() -> None:
    assert urls("") == {}
    assert urls(HOST)["Issues"] == f"{HOST}/issues"
