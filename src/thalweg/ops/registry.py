"""Who serves each op: typed keys, implementations with the token ranges that they serve, and the resolver.

An implementation registers with a predicate that says yes (None) or gives a reason, and with the range of tokens that
it serves. A layer resolves an op once, when it is built, and calls what it got: the best implementation for each number
of tokens. Nothing chooses behind that table, so `explain()` says what really runs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Generic, Literal, TypeVar, cast

from thalweg.errors import ConfigError

D = TypeVar("D")  # dims of an op
F = TypeVar("F")  # its Protocol

Rows = Literal["all", "decodes", "prefills"]
Refusal = str | None  # None: can serve; otherwise the reason why not


@dataclass(frozen=True, slots=True)
class Op(Generic[D, F]):
    """The key of an op: its name in --op, `inspect` and `bench`, and the dataclass of its dimensions.

    F is the Protocol of the functions that serve it: mypy holds implementations and callers to it.
    """

    name: str
    dims: type[D]
    rows: Rows = "all"  # whose tokens it serves


@dataclass(frozen=True, slots=True)
class Where:
    """Where an op will run: device "cpu" or "cuda", dtype "float32" or "bfloat16"."""

    device: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """A range of tokens, the rows of an op's first argument. last=None is no end. A range with 1 has 0 too."""

    first: int = 1
    last: int | None = None

    def __str__(self) -> str:
        if self.last is None:
            return "any" if self.first == 1 else f"{self.first}-"
        return f"{self.first}-{self.last}" if self.last > self.first else f"{self.first}"

    def __contains__(self, tokens: int) -> bool:
        return self.first <= max(1, tokens) and (self.last is None or tokens <= self.last)


ANY = Tokens()


@dataclass(frozen=True, slots=True)
class Implementation:
    op: Op[Any, Any]
    name: str
    build: Callable[[Where, Any], Any]
    supports: Callable[[Where, Any], Refusal]
    tokens: Callable[[Any], Tokens]
    priority: int  # higher is tried first; the reference has 0 and serves everywhere, so below 0 only --op chooses
    capturable: bool  # whether it can be part of a CUDA graph
    recordable: bool  # whether it calls nothing but C++ on a CPU
    rounding: float  # that it does by its own choice, as ||error|| / ||result||, beside the dtype's


@dataclass(frozen=True, slots=True)
class Span:
    """One line of a table: who serves these tokens."""

    tokens: Tokens
    name: str
    capturable: bool
    recordable: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """One resolve(): what was asked, who serves how many tokens, and why each other one serves none."""

    op: str
    rows: Rows
    where: Where
    dims: Any
    table: tuple[Span, ...]  # in ascending order, without gaps
    refused: tuple[tuple[str, str], ...]

    def why_not_captured(self, rows: Rows, most: int) -> str | None:
        """Why steps of such rows, up to `most` of them, cannot run as CUDA graphs; None if nothing here is against."""
        if self.rows in ("all", rows):
            for span in self.table:
                if span.tokens.first <= most and not span.capturable:
                    return f"op {self.op} is served by {span.name!r}, which cannot be captured"
        return None

    def why_not_recorded(self, most: int) -> str | None:
        """Why steps of up to `most` decode rows on a CPU cannot be recorded; None if nothing here is against."""
        if self.rows in ("all", "decodes"):
            for span in self.table:
                if span.tokens.first <= most and not span.recordable:
                    return f"op {self.op} is served by {span.name!r}, which runs in torch"
        return None


_implementations: dict[str, list[Implementation]] = {}
Watch = Callable[[str, Callable[..., Any]], Callable[..., Any]]
_watch: Watch | None = None


def register(
    op: Op[D, F],
    name: str,
    build: Callable[[Where, D], F],
    *,
    supports: Callable[[Where, D], Refusal] = lambda _where, _dims: None,
    tokens: Tokens | Callable[[D], Tokens] = ANY,
    priority: int = 0,
    capturable: bool | None = None,
    recordable: bool | None = None,
    rounding: float = 0.0,
) -> None:
    """Add an implementation of `op`. The op's package calls this when it is imported.

    build: gives the function once the implementation is chosen, so it may import what not every machine has.
    supports: None if it can serve there, else the reason why it cannot.
    tokens: the range of rows of the first argument that it serves, or a function of the dims that gives one.
    priority: the highest serves; the reference has 0. A negative one serves only if --op asks for it.
    capturable: whether CUDA graphs can contain it. False for one that reads values back from the device. An op of
        prefills alone needs True, which promises that it takes `PerStep` offsets, starts and boundaries and makes
        nothing of them but tables (`ops/host_tables.py`).
    recordable: whether steps on a CPU can be recorded with it (`ops/toolchain/cpu_recording.py`), which holds for calls
        of C++ and for views; all but references do no more unless this says otherwise.
    rounding: how far off results are at most because it quantizes activations, as ||error|| / ||result||.
    """
    if capturable is None:
        capturable = op.rows != "prefills"
    if recordable is None:
        recordable = name != "reference"
    found = _implementations.setdefault(op.name, [])
    if any(i.name == name for i in found):
        raise ConfigError(f"op {op.name!r} already has an implementation named {name!r}")
    span = tokens if callable(tokens) else lambda _: tokens
    found.append(Implementation(op, name, build, supports, span, priority, capturable, recordable, rounding))
    found.sort(key=lambda i: -i.priority)


def ops() -> list[str]:
    """The names of all ops."""
    return sorted(_implementations)


def implementations(op: str) -> list[Implementation]:
    """Every implementation of the op of that name, best first. Raises ConfigError for an unknown op."""
    if op not in _implementations:
        raise ConfigError(f"unknown op {op!r}; known: {', '.join(ops())}")
    return list(_implementations[op])


def dims_of(dims: Any) -> dict[str, bool | int | str | tuple[int, ...]]:
    """The dimensions of an op by name, those of an op within it among them."""
    found: dict[str, bool | int | str | tuple[int, ...]] = {}
    for field in fields(dims):
        value = getattr(dims, field.name)
        found |= dims_of(value) if is_dataclass(value) else {field.name: value}
    return found


class Resolver:
    """Resolves ops for one model and remembers the choices.

    `prefer` (the engine option op_preference) maps an op, or "*" for all others, to the name of the implementation that
    must serve it as far as its token range goes. Raises ConfigError when it names what does not exist. Without
    quantize_activations, implementations that round activations to 8 bits serve nothing.
    """

    def __init__(self, prefer: Mapping[str, str] | None = None, *, quantize_activations: bool = True) -> None:
        self._rounds = quantize_activations
        self._prefer = dict(prefer or {})
        for op, name in self._prefer.items():
            names = sorted({i.name for o in (ops() if op == "*" else [op]) for i in implementations(o)})
            if name not in names:
                expected = f"expected {' or '.join(names)}"
                raise ConfigError(f"--op (op_preference) has {name!r} for op {op!r}; {expected}")
        self._choices: dict[tuple[str, Where, Any], Choice] = {}

    def resolve(self, op: Op[D, F], where: Where, dims: D) -> F:
        """The function that serves `op` there: that of one implementation if it serves any number of tokens, else one
        that picks by the number of rows of its first argument.

        Raises ConfigError if no implementation can serve, or if the preferred one cannot.
        """
        if type(dims) is not op.dims:
            raise TypeError(f"op {op.name!r} takes {op.dims.__name__}, not {type(dims).__name__}")
        wanted = self._prefer.get(op.name, self._prefer.get("*"))
        able: list[Implementation] = []
        refused: dict[str, str] = {}
        for i in implementations(op.name):
            reason = i.supports(where, dims)
            if reason is None and i.rounding and not self._rounds:
                reason = "rounds activations, and --no-quantize-activations is set"
            if reason is None and i.priority < 0 and i.name != wanted:
                reason = "serves only if --op asks for it"
            if reason is None:
                able.append(i)
            else:
                refused[i.name] = reason
        if wanted is not None:
            able.sort(key=lambda i: i.name != wanted)
        table = _table([(i, i.tokens(dims)) for i in able])
        if not table or (wanted is not None and able[0].name != wanted):
            by = f"cannot be served by {wanted!r}" if wanted is not None else "has no implementation"
            detail = "; ".join(f"{n}: {r}" for n, r in refused.items() if wanted in (None, n)) or "there is none"
            raise ConfigError(
                f"op {op.name!r} {by} for {where.device}, {where.dtype}, {dims_of(dims)} ({detail});"
                " change --op (op_preference)"
            )
        serving = {i.name for _, i in table}
        for i in able:
            if i.name not in serving:
                refused[i.name] = _outdone(i.tokens(dims), table, wanted)
        spans = tuple(Span(tokens, i.name, i.capturable, i.recordable) for tokens, i in table)
        in_order = tuple((i.name, refused[i.name]) for i in implementations(op.name) if i.name in refused)
        self._choices[(op.name, where, dims)] = Choice(op.name, op.rows, where, dims, spans, in_order)
        functions = {i.name: _watched(i, dims, i.build(where, dims)) for _, i in table}
        return cast(F, _by_tokens([(tokens, functions[i.name]) for tokens, i in table]))

    def prefers(self, op: str) -> bool:
        """Whether an implementation of the op of that name was asked for."""
        return op in self._prefer or "*" in self._prefer

    def explain(self) -> list[Choice]:
        """Every choice made so far, in the order first asked."""
        return list(self._choices.values())

    def unused_preferences(self) -> list[str]:
        """Ops with a preference of their own that nobody resolved: the model does not use them."""
        return [op for op in self._prefer if op != "*" and not any(c.op == op for c in self._choices.values())]


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Inside, whatever is resolved in this process is what `watch` makes of it: of "op [implementation] dims" and the
    function. For recording calls; nothing stands between an op and its callers otherwise."""
    global _watch
    _watch = watch
    try:
        yield
    finally:
        _watch = None


def _watched(i: Implementation, dims: Any, function: Any) -> Any:
    if _watch is None:
        return function
    sizes = " ".join(f"{name}={value}" for name, value in dims_of(dims).items())
    return _watch(f"{i.op.name} [{i.name}] {sizes}", function)


def _table(able: list[tuple[Implementation, Tokens]]) -> list[tuple[Tokens, Implementation]]:
    """For every number of tokens the first that serves it; empty if some number is served by none."""
    starts = sorted({1, *(t.first for _, t in able), *(t.last + 1 for _, t in able if t.last is not None)})
    table: list[tuple[Tokens, Implementation]] = []
    for first, after in zip(starts, [*starts[1:], None], strict=True):
        best = next((i for i, tokens in able if first in tokens), None)
        if best is None:
            return []
        if table and table[-1][1] is best:
            first = table.pop()[0].first
        table.append((Tokens(first, None if after is None else after - 1), best))
    return table


def _outdone(tokens: Tokens, table: Iterable[tuple[Tokens, Implementation]], wanted: str | None) -> str:
    """Why an implementation that can serve these tokens serves none of them."""
    ahead = [i.name for span, i in table if span.first in tokens or tokens.first in span]
    if ahead == [wanted]:
        return f"{wanted!r} was asked for"
    names = ", ".join(repr(name) for name in dict.fromkeys(ahead))
    return f"{names} {'come' if len(set(ahead)) > 1 else 'comes'} first"


def _by_tokens(table: list[tuple[Tokens, Callable[..., Any]]]) -> Callable[..., Any]:
    functions = [function for _, function in table]
    if len(functions) == 1:
        return functions[0]
    lasts = [tokens.last for tokens, _ in table[:-1]]

    def serve(first: Any, /, *args: Any, **options: Any) -> Any:
        return functions[bisect_left(lasts, first.shape[0])](first, *args, **options)

    return serve
