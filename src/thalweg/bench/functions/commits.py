"""The same workload with two commits of a repository in turn."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from thalweg.bench.functions.record import Version, record
from thalweg.errors import ConfigError


def record_commits(
    repository: Path, base: str, head: str, model: str | None, quick: bool, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """What each commit costs: `base`'s figures, then `head`'s. Both run this version's workload, so an older commit
    needs none of its own. Raises ConfigError for what is not a commit, or has no src/thalweg, or does not run."""
    with ExitStack() as stack:
        return record([stack.enter_context(_checked_out(repository, c)) for c in (base, head)], model, quick, tell)


@contextmanager
def _checked_out(repository: Path, commit: str) -> Iterator[Version]:
    """A commit in a folder of its own that is gone afterwards; the work tree stays as it is."""
    short = _git(repository, "rev-parse", "--short", "--verify", "--end-of-options", f"{commit}^{{commit}}")
    with tempfile.TemporaryDirectory(prefix="thalweg-") as folder:
        tree = Path(folder, "tree")
        _git(repository, "worktree", "add", "--detach", "--quiet", str(tree), short)
        try:
            if not (tree / "src" / "thalweg" / "__init__.py").is_file():
                raise ConfigError(f"commit {short} has no src/thalweg; expected a commit of this repository")
            yield Version(tree / "src", short)
        finally:
            _git(repository, "worktree", "remove", "--force", str(tree))


def _git(repository: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(repository), *words], capture_output=True, text=True, check=False)
    except OSError as e:
        raise ConfigError(f"git cannot be run: {e.strerror}") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError(f"git {words[0]} {words[-1]} failed: {reason}")
    return done.stdout.strip()
