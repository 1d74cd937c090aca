"""Counts the calls of one package's functions and of its ops: processor time, or memory, by phase and thread.

The interpreter tells of calls: sys.monitoring from Python 3.12 on, which is switched off for functions outside the
package, sys.setprofile before. Functions of other packages, comprehensions and lambdas count for whoever calls them.
"""

from __future__ import annotations

import sys
import threading
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Literal

Kind = Literal["time", "memory"]


@dataclass(slots=True)
class Figures:
    """Of one function or op in one phase. Times are nanoseconds of processor time on the calling thread, the hooks' own
    microsecond or so among them; bytes are Python's own allocations (tracemalloc), without the storage of tensors.

    total_ns is with what was called (recursion counted once), self_ns without other functions of the package.
    kept_bytes is what was allocated and not freed, less that of functions called; peak_bytes is the most that was there
    above what a call began with, while no other function of the package ran.
    """

    calls: int = 0
    total_ns: int = 0
    self_ns: int = 0
    kept_bytes: int = 0
    peak_bytes: int = 0


class _Open:
    """A call under way."""

    __slots__ = ("before", "inner", "kept", "key", "peak", "token")

    def __init__(self, token: object, key: str, before: int) -> None:
        self.token, self.key, self.before = token, key, before
        self.inner = self.kept = 0
        self.peak = before


class Hooks:
    """Counts between `install` and `remove` while `phase` is not None."""

    def __init__(self, root: Path, kind: Kind, leave_out: Path | None = None) -> None:
        """`root`: the package's folder; `leave_out`: one in it that is not counted."""
        self.phase: str | None = None
        self.functions: dict[str, defaultdict[str, Figures]] = defaultdict(lambda: defaultdict(Figures))
        self.ops: dict[str, defaultdict[str, Figures]] = defaultdict(lambda: defaultdict(Figures))
        self._root, self._leave_out = f"{root}/", f"{leave_out or '-'}/"
        self._memory = kind == "memory"
        self._known: dict[int, tuple[CodeType, str | None]] = {}  # the code is kept, so that its id stays its own
        self._local = threading.local()

    def key(self, code: CodeType) -> str | None:
        """ "thalweg.ops.registry:Resolver.resolve"; None for what is not counted."""
        found = self._known.get(id(code))
        if found is None:
            found = self._known[id(code)] = code, self._key(code)
        return found[1]

    def _key(self, code: CodeType) -> str | None:
        file, name = code.co_filename, code.co_qualname
        if not file.startswith(self._root) or file.startswith(self._leave_out):
            return None
        if name.rpartition(".")[2].startswith("<") and name != "<module>":
            return None
        return f"{module_name(self._root, file)}:{name}"

    def op(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with its calls counted as those of an op."""

        def counted(*args: Any, **options: Any) -> Any:
            self._enter("ops", counted, name)
            try:
                return function(*args, **options)
            finally:
                self._leave("ops", counted, self.ops)

        return counted

    def _enter(self, kind: str, token: object, key: str) -> None:
        stack: list[_Open] = self._local.__dict__.setdefault(kind, [])
        if not self._memory:
            stack.append(_Open(token, key, time.thread_time_ns()))
            return
        now, peak = tracemalloc.get_traced_memory()
        self._spread(peak)
        tracemalloc.reset_peak()
        stack.append(_Open(token, key, now))

    def _leave(self, kind: str, token: object, into: dict[str, defaultdict[str, Figures]], again: bool = False) -> None:
        """End a call; `again`: it will go on, as a coroutine does after it has waited."""
        stack: list[_Open] = self._local.__dict__.get(kind, [])
        if not any(o.token is token for o in reversed(stack)):
            return  # it began before the hooks did
        while (ended := stack.pop()).token is not token:
            pass
        phase, outer = self.phase, stack[-1] if stack else None
        figures = None if phase is None else into[phase][ended.key]
        if not self._memory:
            took = time.thread_time_ns() - ended.before
            if figures is not None:
                figures.calls += not again
                figures.self_ns += took - ended.inner
                if not any(o.key == ended.key for o in stack):
                    figures.total_ns += took
            if outer is not None:
                outer.inner += took
            return
        now, peak = tracemalloc.get_traced_memory()
        self._spread(peak)
        ended.peak = max(ended.peak, peak)
        tracemalloc.reset_peak()
        kept = now - ended.before
        if figures is not None:
            figures.calls += not again
            figures.kept_bytes += kept - ended.kept
            figures.peak_bytes = max(figures.peak_bytes, ended.peak - ended.before)
        if outer is not None:
            outer.kept += kept

    def _spread(self, peak: int) -> None:
        """What was reached since the last look is the peak of the calls that ran: the latest to begin."""
        for kind in ("functions", "ops"):
            if stack := self._local.__dict__.get(kind):
                stack[-1].peak = max(stack[-1].peak, peak)

    def install(self) -> None:
        """On this thread and those to come; with sys.monitoring on all."""
        if self._memory:
            tracemalloc.start()
        if sys.version_info >= (3, 12):
            _monitor(self)
        else:
            threading.setprofile(self._profile)
            sys.setprofile(self._profile)

    def remove(self) -> None:
        if sys.version_info >= (3, 12):
            sys.monitoring.set_events(sys.monitoring.PROFILER_ID, 0)
            sys.monitoring.free_tool_id(sys.monitoring.PROFILER_ID)
        else:
            sys.setprofile(None)
            threading.setprofile(None)
        if self._memory:
            tracemalloc.stop()

    @contextmanager
    def counting(self, phase: str) -> Iterator[None]:
        self.phase = phase
        try:
            yield
        finally:
            self.phase = None

    def _profile(self, frame: FrameType, event: str, arg: object) -> None:
        if event == "call":
            if (key := self.key(frame.f_code)) is not None:
                self._enter("functions", frame.f_code, key)
        elif event == "return" and self.key(frame.f_code) is not None:
            self._leave("functions", frame.f_code, self.functions, _is_waiting(frame))


def _is_waiting(frame: FrameType) -> bool:
    """Whether a frame that sys.setprofile says returns is a generator's or coroutine's that yields."""
    import opcode

    if not frame.f_code.co_flags & 0x2A0 or frame.f_lasti < 0:  # CO_GENERATOR, CO_COROUTINE, CO_ASYNC_GENERATOR
        return False
    return opcode.opname[frame.f_code.co_code[frame.f_lasti]] in ("YIELD_VALUE", "RETURN_GENERATOR", "SEND")


def _monitor(hooks: Hooks) -> None:
    m = sys.monitoring  # type: ignore[attr-defined]
    tool, events = m.PROFILER_ID, m.events

    def begin(code: CodeType, offset: int, *_: object) -> object:
        if (key := hooks.key(code)) is None:
            return m.DISABLE
        hooks._enter("functions", code, key)
        return None

    def end(code: CodeType, offset: int, *_: object) -> object:
        if hooks.key(code) is None:
            return m.DISABLE
        hooks._leave("functions", code, hooks.functions)
        return None

    def wait(code: CodeType, offset: int, *_: object) -> object:
        if hooks.key(code) is None:
            return m.DISABLE
        hooks._leave("functions", code, hooks.functions, again=True)
        return None

    def thrown(code: CodeType, *_: object) -> None:  # these two cannot be switched off for one function
        if (key := hooks.key(code)) is not None:
            hooks._enter("functions", code, key)

    def unwound(code: CodeType, *_: object) -> None:
        if hooks.key(code) is not None:
            hooks._leave("functions", code, hooks.functions)

    m.use_tool_id(tool, "thalweg")
    for event, callback in (
        (events.PY_START, begin),
        (events.PY_RESUME, begin),
        (events.PY_RETURN, end),
        (events.PY_YIELD, wait),
        (events.PY_THROW, thrown),
        (events.PY_UNWIND, unwound),
    ):
        m.register_callback(tool, event, callback)
    m.set_events(
        tool,
        events.PY_START | events.PY_RESUME | events.PY_RETURN | events.PY_YIELD | events.PY_THROW | events.PY_UNWIND,
    )


def module_name(root: str, file: str) -> str:
    """ "thalweg.ops.registry" of a file in the package whose folder is `root`, with a slash at its end."""
    parts = [root.rstrip("/").rpartition("/")[2], *file.removeprefix(root).removesuffix(".py").split("/")]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
