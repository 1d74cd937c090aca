"""Prints the lowest version of everything that pyproject.toml allows, `name==version` lines, for `make test-lowest`.

Of the dev extra it leaves out what is pinned to one version: linters, which `make lint` runs in an environment of their
own choice of versions.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^\]]*\])?\s*(?P<bounds>[^;]*)")
_LOWEST = re.compile(r">=\s*([0-9][0-9A-Za-z.]*)")


def lowest(requirement: str) -> tuple[str, str]:
    """("name", "1.2") of "name>=1.2,<2". Raises ValueError for a requirement without a lower bound: nobody could say
    that it works."""
    match = _REQUIREMENT.match(requirement)
    bound = _LOWEST.search(match["bounds"]) if match else None
    if match is None or bound is None:
        raise ValueError(f"{requirement!r} has no lower bound; expected name>=VERSION")
    return match["name"], bound[1]


def requirements(pyproject: Path = PYPROJECT) -> Iterator[str]:
    """What the package and its tests require."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    yield from project["dependencies"]
    extras = [r for extra in project["optional-dependencies"].values() for r in extra]
    yield from (r for r in extras if "==" not in r and not r.startswith(f"{project['name']}["))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--leave-out", nargs="*", default=[], metavar="NAME", help="packages that are there already")
    left_out = parser.parse_args().leave_out
    for name, version in map(lowest, requirements()):
        if name not in left_out:
            print(f"{name}=={version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
