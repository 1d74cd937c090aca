"""What the build backend makes of the repository's address: the links of the project, and README with absolute links.

README links to files beside it, which a package index does not have. The address is `repository` under
`[tool.hatch.metadata.hooks.custom]` in pyproject.toml. With it such links become absolute; while it is empty they
become plain text, and pictures are left out. The site of docs/ treats links that lead out of docs/ alike.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

try:
    from hatchling.metadata.plugin.interface import MetadataHookInterface
except ModuleNotFoundError:  # the site and the tests use the functions below without the build backend
    MetadataHookInterface = object

_LINK = re.compile(r"(?P<picture>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^()\s]+)\)")
_NO_FILE = re.compile(r"[a-z][a-z+.-]*:|#")  # another site, or a heading of the same page


class CustomMetadataHook(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        repository = self.config["repository"]
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(text, repository)}
        metadata["urls"] = urls(repository)


def urls(repository: str) -> dict[str, str]:
    """The links that a package index shows beside the project; none without a repository's address."""
    if not repository:
        return {}
    changelog, issues = f"{repository}/blob/HEAD/CHANGELOG.md", f"{repository}/issues"
    return {"Repository": repository, "Changelog": changelog, "Issues": issues}


def absolute(markdown: str, repository: str, *, folder: str = "", keep: str | None = None) -> str:
    """The text of a page in `folder` of the repository, with links to files that work outside of the repository.

    Links to files in the folder `keep`, to other sites and to headings of the page stay as they are.
    """

    def link(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        path, mark, heading = target.partition("#")
        file = posixpath.normpath(posixpath.join(folder, path))
        if _NO_FILE.match(target) or (keep is not None and file.startswith(f"{keep}/")):
            return match[0]
        if not repository:
            return "" if picture else text
        return f"{picture}[{text}]({repository}/{'raw' if picture else 'blob'}/HEAD/{file}{mark}{heading})"

    return _LINK.sub(link, markdown)
