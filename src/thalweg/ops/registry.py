"""Who serves each op. Implementations register with a predicate that says yes (None) or gives a reason; a
layer resolves once, when it is built, and calls the function it got. `explain()` tells the whole story
afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from thalweg.errors import ConfigError


@dataclass(frozen=True, slots=True)
class OpContext:
    """Where and on what an op will run: "cpu", "cuda"; "float32", "bfloat16"; and named dimensions."""

    device: str
    dtype: str
    dims: Mapping[str, int] = field(default_factory=dict)


Refusal = str | None  # None: can serve; otherwise the reason why not


@dataclass(frozen=True, slots=True)
class Implementation:
    op: str
    name: str
    fn: Callable[..., Any]
    supports: Callable[[OpContext], Refusal]
    priority: int  # higher is tried first; the reference has 0 and never refuses
    capturable: bool  # False for what waits for the device, and so cannot be part of a CUDA graph


@dataclass(frozen=True, slots=True)
class Choice:
    """One resolve(): what was asked, who serves, and why each other one does not."""

    op: str
    context: OpContext
    chosen: str
    capturable: bool
    refused: tuple[tuple[str, str], ...]


_implementations: dict[str, list[Implementation]] = {}


def register(
    op: str,
    name: str,
    fn: Callable[..., Any],
    *,
    supports: Callable[[OpContext], Refusal] = lambda _: None,
    priority: int = 0,
    capturable: bool = True,
) -> None:
    """Add an implementation of `op`. Called at import time by the op's package.

    An op of decode rows whose implementation reads values back from the device says capturable=False.
    """
    found = _implementations.setdefault(op, [])
    if any(i.name == name for i in found):
        raise ConfigError(f"op {op!r} already has an implementation named {name!r}")
    found.append(Implementation(op, name, fn, supports, priority, capturable))
    found.sort(key=lambda i: -i.priority)


def implementations(op: str) -> list[Implementation]:
    """Every implementation of `op`, best first. Raises ConfigError for an unknown op."""
    if op not in _implementations:
        raise ConfigError(f"unknown op {op!r}; known: {', '.join(sorted(_implementations))}")
    return list(_implementations[op])


class Resolver:
    """Resolves ops for one model and remembers the choices.

    `prefer` (the engine option op_preference) maps an op, or "*" for all others, to the name of the
    implementation that must serve it. Raises ConfigError when it names what does not exist.
    """

    def __init__(self, prefer: Mapping[str, str] | None = None) -> None:
        self._prefer = dict(prefer or {})
        for op, name in self._prefer.items():
            ops = sorted(_implementations) if op == "*" else [op]
            names = sorted({i.name for o in ops for i in implementations(o)})
            if name not in names:
                expected = f"expected {' or '.join(names)}"
                raise ConfigError(f"--op (op_preference) has {name!r} for op {op!r}; {expected}")
        self._choices: dict[tuple[str, str, str, tuple[tuple[str, int], ...]], Choice] = {}

    def resolve(self, op: str, context: OpContext) -> Callable[..., Any]:
        """The function that serves `op` in `context`.

        Raises ConfigError when nobody can, or when the preferred implementation cannot.
        """
        wanted = self._prefer.get(op, self._prefer.get("*"))
        refused: list[tuple[str, str]] = []
        for candidate in implementations(op):
            if wanted is not None and candidate.name != wanted:
                refused.append((candidate.name, f"{wanted!r} was asked for"))
                continue
            reason = candidate.supports(context)
            if reason is not None:
                refused.append((candidate.name, reason))
                continue
            lower = [
                (i.name, f"{candidate.name!r} comes first")
                for i in implementations(op)
                if i.name not in {candidate.name, *(n for n, _ in refused)}
            ]
            key = (op, context.device, context.dtype, tuple(sorted(context.dims.items())))
            self._choices[key] = Choice(op, context, candidate.name, candidate.capturable, (*refused, *lower))
            return candidate.fn
        detail = "; ".join(f"{n}: {r}" for n, r in refused)
        where = f"{context.device}, {context.dtype}, {dict(context.dims)}"
        raise ConfigError(f"op {op!r} has no implementation for {where} ({detail}); change --op (op_preference)")

    def explain(self) -> list[Choice]:
        """Every choice made so far, in the order first asked."""
        return list(self._choices.values())

    def unused_preferences(self) -> list[str]:
        """Ops with a preference of their own that nobody resolved: the model does not use them."""
        return [op for op in self._prefer if op != "*" and not any(c.op == op for c in self._choices.values())]
