"""Sessions: sequences of tokens by name, with points to go back to. What is computed of them is kept in the prefix
cache as long as can be, so that continuing from one, however often, costs only what is new."""

from __future__ import annotations

import functools
import itertools
import re
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Concatenate, ParamSpec, TypeVar

from thalweg.errors import ConfigError, InvalidRequest, SessionConflict, SessionNotFound

P = ParamSpec("P")
R = TypeVar("R")

_NAME = re.compile(r"[\w.:/-]{1,128}", re.ASCII)
MAX_FORKS = 256  # of one call


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """`count` sessions, `tokens` of them in all, each for `seconds` after it was last used. Raises ConfigError."""

    count: int = 256
    tokens: int = 16 << 20
    seconds: float = 3600.0

    def __post_init__(self) -> None:
        if not 0 <= self.count <= 100_000:
            raise ConfigError(f"--max-sessions is {self.count}; expected 0 to 100000")
        if not 0 < self.seconds <= 1e9:
            raise ConfigError(f"--session-ttl is {self.seconds:g}; expected seconds above 0")


@dataclass(slots=True)
class Point:
    """A point that a session can go back to, after `tokens` tokens. `cached` of them were not computed again by a
    request from there, when the point was made. `key` is the prefix cache's name for it, which forks share."""

    tokens: int
    key: str
    cached: int = 0
    shares: int = 1


@dataclass(slots=True)
class SavedSession:
    """`owner` and `salt` say who may use it. `version` changes whenever its tokens do. `users` are those that are about
    to extend it."""

    name: str
    owner: bytes
    salt: str
    token_ids: array[int]
    points: list[Point]
    seconds: float
    expires: float
    created: int = field(default_factory=lambda: int(time.time()))
    version: int = 0
    users: int = 0

    @property
    def ids(self) -> list[int]:
        return self.token_ids.tolist()


@dataclass(eq=False, frozen=True, slots=True)
class Extension:
    """Something that is under way and will extend a session by at most so many `tokens`, for which room is held."""

    tokens: int


def longest_answer(max_tokens: int | None, prompt: int, max_model_len: int) -> int:
    """Tokens that a request may generate after a prompt of so many."""
    room = max(0, max_model_len - prompt)
    return room if max_tokens is None else min(max_tokens, room)


def _locked(method: Callable[Concatenate[Sessions, P], R]) -> Callable[Concatenate[Sessions, P], R]:
    @functools.wraps(method)
    def locked(self: Sessions, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.lock:
            return method(self, *args, **kwargs)

    return locked


class Sessions:
    """Names to tokens. Callers compute what is new and tell the prefix cache what to keep; `release` is called with the
    keys of points that nobody has any more. Whoever is not the owner, or has another salt, finds nothing.

    Threads may share it: every method holds `lock`, and so do callers whose work takes several of them, or who read
    more than one field of a session."""

    def __init__(
        self, limits: SessionLimits, release: Callable[[str], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits = limits
        self.most_points: int | None = None  # of all sessions, if snapshots bound them
        self.lock = threading.RLock()
        self._release, self._clock = release, clock
        self._sessions: dict[tuple[bytes, str], SavedSession] = {}
        self._under_way: set[Extension] = set()
        self._keys = itertools.count()
        self._version = itertools.count(1)

    @_locked
    def __len__(self) -> int:
        self.expire()
        return len(self._sessions)

    @_locked
    def all(self, owner: bytes = b"", salt: str = "") -> list[SavedSession]:
        """The owner's sessions of this salt, the oldest first."""
        self.expire()
        return [each for each in self._sessions.values() if each.owner == owner and each.salt == salt]

    @_locked
    def get(self, name: str, owner: bytes = b"", salt: str = "") -> SavedSession:
        """The session, which lives on for its time. Raises SessionNotFound."""
        self.expire()
        found = self._sessions.get((owner, name))
        if found is None or found.salt != salt:
            raise SessionNotFound(f"there is no session {name[:128]!r}; it was not made, has expired, or is another's")
        found.expires = self._clock() + found.seconds
        return found

    @_locked
    def check_new(self, names: Sequence[str], tokens: int, points: int, owner: bytes = b"") -> None:
        """Raises InvalidRequest or SessionConflict if sessions of these names, each of so many tokens, can not be made;
        `points` are new."""
        self.expire()
        for name in names:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise InvalidRequest(f"name is {name!r:.140}; expected 1 to 128 letters, digits or any of . _ : / -")
            if (owner, name) in self._sessions:
                raise SessionConflict(f"name is {name!r}, which is in use; expected a new one, or delete that session")
        if len(set(names)) < len(names):
            raise InvalidRequest("names has one twice; expected each once")
        self._check_room(len(names), len(names) * tokens, points)

    @_locked
    def add(
        self, name: str, token_ids: Sequence[int], owner: bytes = b"", salt: str = "", seconds: float | None = None
    ) -> SavedSession:
        """A session with one point, at its end. Raises as check_new."""
        seconds = self.check_seconds(seconds)
        self.check_new([name], len(token_ids), 1, owner)
        made = SavedSession(
            name, owner, salt, array("I", token_ids), [self._point(len(token_ids))], seconds, self._clock() + seconds
        )
        self._sessions[owner, name] = made
        return made

    @_locked
    def fork(self, source: SavedSession, names: Sequence[str]) -> list[SavedSession]:
        """Sessions that are what `source` is, and share what is kept of it. Raises as check_new."""
        if not 1 <= len(names) <= MAX_FORKS:
            raise InvalidRequest(f"names has {len(names)}; expected 1 to {MAX_FORKS}")
        self.check_new(names, len(source.token_ids), 0, source.owner)
        made = []
        for name in names:
            for point in source.points:
                point.shares += 1
            expires = self._clock() + source.seconds
            fork = SavedSession(
                name, source.owner, source.salt, source.token_ids[:], source.points[:], source.seconds, expires
            )
            self._sessions[source.owner, name] = fork
            made.append(fork)
        return made

    @contextmanager
    def extending(self, session: SavedSession, version: int, tokens: int) -> Iterator[Extension]:
        """While something is under way that will extend the session, by at most so many tokens: it does not expire,
        and there is room for it. Raises as `extend`, so that nothing is begun that could not be saved."""
        extension = Extension(tokens)
        with self.lock:
            self.expire()
            self._check_version(session, version)
            self._check_room(0, tokens, 1)
            self._under_way.add(extension)
            session.users += 1
        try:
            yield extension
        finally:
            with self.lock:
                self._under_way.discard(extension)
                session.users -= 1
                session.expires = self._clock() + session.seconds

    @_locked
    def extend(
        self, session: SavedSession, version: int, token_ids: Sequence[int], extension: Extension | None = None
    ) -> Point:
        """Go on by these tokens, to a new point, with the room of an `extension`. Raises SessionConflict if the session
        is not what it was at `version`, InvalidRequest if there is no room."""
        self._check_version(session, version)
        if extension is not None:
            self._under_way.discard(extension)
        self._check_room(0, len(token_ids), 1)
        session.token_ids.extend(token_ids)
        point = self._point(len(session.token_ids))
        session.points.append(point)
        session.version = next(self._version)
        return point

    @_locked
    def roll_back(self, session: SavedSession, index: int) -> None:
        """Back to point `index` (negative: from the end), which becomes the last. Raises InvalidRequest."""
        count = len(session.points)
        if not -count <= index < count:
            raise InvalidRequest(f"point is {index}; expected {-count} to {count - 1}: the session has {count}")
        keep = index % count + 1
        dropped, session.points = session.points[keep:], session.points[:keep]
        del session.token_ids[session.points[-1].tokens :]
        session.version = next(self._version)
        self._drop(dropped)

    @_locked
    def delete(self, session: SavedSession) -> None:
        """Nothing if it was deleted before, even if another has its name."""
        if self._sessions.get((session.owner, session.name)) is session:
            del self._sessions[session.owner, session.name]
            self._drop(session.points)

    def check_seconds(self, seconds: float | None) -> float:
        """How long a session lives after its last use. Raises InvalidRequest for more than is allowed."""
        most = self.limits.seconds
        if seconds is None:
            return most
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= most:
            raise InvalidRequest(f"ttl is {seconds!r:.40}; expected seconds, above 0 and at most {most:g}")
        return float(seconds)

    @_locked
    def expire(self) -> None:
        """Delete those whose time is over."""
        now = self._clock()
        for session in [each for each in self._sessions.values() if each.expires <= now and not each.users]:
            self.delete(session)

    def _check_version(self, session: SavedSession, version: int) -> None:
        if self._sessions.get((session.owner, session.name)) is not session or session.version != version:
            raise SessionConflict(f"session {session.name!r} has changed since the request began; it was not saved")

    def _check_room(self, sessions: int, tokens: int, points: int) -> None:
        """Raises InvalidRequest, which does not say how much there is: it may be others'."""
        limits = self.limits
        if len(self._sessions) + sessions > limits.count:
            raise InvalidRequest(f"sessions: there is no room; at most {limits.count} are kept (--max-sessions)")
        held = sum(len(each.token_ids) for each in self._sessions.values()) + sum(e.tokens for e in self._under_way)
        if held + tokens > limits.tokens:
            raise InvalidRequest(f"sessions: there is no room; they have at most {limits.tokens} tokens in all")
        most = self.most_points
        if most is not None and points and sum(1 for _ in self._points()) + len(self._under_way) + points > most:
            raise InvalidRequest(
                f"sessions: there is no room; they keep at most {most} points, half of the snapshots of states"
                " (--cpu-cache-memory has more)"
            )

    def _points(self) -> Iterator[str]:
        """The keys of all points, each once."""
        yield from {point.key for each in self._sessions.values() for point in each.points}

    def _point(self, tokens: int) -> Point:
        return Point(tokens, f"session-{next(self._keys)}")

    def _drop(self, points: list[Point]) -> None:
        for point in points:
            point.shares -= 1
            if not point.shares:
                self._release(point.key)
