"""What mkdocs.yml leaves to code: links that lead out of docs/, and sections that list all pages of a folder."""

from __future__ import annotations

import posixpath
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"Experiments": "experiments", "Decisions": "adr"}
sys.path.insert(0, str(ROOT))

from hatch_build import absolute  # noqa: E402

_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REPOSITORY: str = _PROJECT["tool"]["hatch"]["metadata"]["hooks"]["custom"]["repository"]


def on_config(config: Any) -> Any:
    config.repo_url = REPOSITORY or None
    for section in config.nav:
        for name in FOLDERS.keys() & section.keys():
            pages = (page.name for page in (ROOT / "docs" / FOLDERS[name]).glob("*.md"))
            section[name] = [f"{FOLDERS[name]}/{page}" for page in sorted(pages, key=lambda p: (p != "README.md", p))]
    return config


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")
    return absolute(markdown, REPOSITORY, folder=folder, keep="docs")


_LOADS = re.compile(r"<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>|@import[^;]*//[^;]*;")


def on_post_build(config: Any) -> None:
    """Fails if a page loads something from elsewhere: the site has to work without the network."""
    for page in Path(config.site_dir).rglob("*.html"):
        for found in _LOADS.findall(page.read_text(encoding="utf-8")):
            raise SystemExit(f"error: {page} loads {found}; expected only files of the site")
