"""References that lead back to where they stand: llguidance takes them alone, without other keywords beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from thalweg.server.json_schema.document import kinds

if TYPE_CHECKING:
    from thalweg.server.json_schema.walk import Path, Walk


class Cycles:
    """Definitions are named as in the schema that is made; `within` is the one that is being walked, None the root."""

    def __init__(self) -> None:
        self.within: str | None = None
        self._leads_to: dict[str, set[str]] = {}
        self._beside: list[tuple[str, str, Path, dict[str, Any], Path]] = []

    def note(self, made: dict[str, Any], target: str, target_path: Path, path: Path) -> None:
        """`made`, walked from `path`, has a reference to the definition `target`, which stands at `target_path`."""
        if self.within is not None:  # nothing leads back to the root, whose definition is another schema
            self._leads_to.setdefault(self.within, set()).add(target)
            if len(made) > 1:
                self._beside.append((self.within, target, target_path, made, path))

    def part(self, walk: Walk) -> None:
        """Leave such references alone, if what stands beside them adds nothing; else it is not kept."""
        for within, target, target_path, made, path in self._beside:
            if within not in self._reached(target):
                continue
            rest = made.keys() - {"$ref"}
            if rest != {"type"} or not kinds(walk.document.at(target_path)) <= kinds(made):
                reason = "leads back to where it stands; expected no keyword beside it but annotations and its type"
                walk.not_kept((*path, "$ref"), reason)
            for keyword in rest:
                del made[keyword]

    def _reached(self, start: str) -> set[str]:
        seen, pending = {start}, [start]
        while pending:
            new = self._leads_to.get(pending.pop(), set()) - seen
            seen |= new
            pending += new
        return seen
