"""The registry of sessions: names, points, limits, owners."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack

import pytest

from thalweg.engine.sessions import SavedSession, SessionLimits, Sessions, longest_answer
from thalweg.errors import ConfigError, InvalidRequest, SessionConflict, SessionNotFound


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def registry(**limits: float) -> tuple[Sessions, list[str], Clock]:
    released: list[str] = []
    clock = Clock()
    return Sessions(SessionLimits(**limits), released.append, clock), released, clock  # type: ignore[arg-type]


def test_a_session_goes_on_forks_and_rolls_back() -> None:
    sessions, released, _ = registry()
    root = sessions.add("root", [1, 2, 3])
    left, right = sessions.fork(root, ["left", "right"])
    sessions.extend(left, left.version, [4, 5])
    sessions.extend(left, left.version, [6])
    assert (left.ids, right.ids, root.ids) == ([1, 2, 3, 4, 5, 6], [1, 2, 3], [1, 2, 3])
    assert [point.tokens for point in left.points] == [3, 5, 6]
    gone = left.points[2].key
    sessions.roll_back(left, 1)
    assert (left.ids, released) == ([1, 2, 3, 4, 5], [gone])
    sessions.roll_back(left, -2)
    assert left.ids == [1, 2, 3]
    assert [each.name for each in sessions.all()] == ["root", "left", "right"]


def test_points_that_forks_share_are_released_with_the_last() -> None:
    sessions, released, _ = registry()
    root = sessions.add("root", [1, 2, 3])
    (fork,) = sessions.fork(root, ["fork"])
    sessions.delete(root)
    assert released == []
    assert fork.ids == [1, 2, 3]
    sessions.delete(fork)
    assert released == [fork.points[0].key]
    with pytest.raises(SessionNotFound):
        sessions.get("fork")


def test_others_find_nothing() -> None:
    sessions, _, _ = registry()
    sessions.add("mine", [1], owner=b"me", salt="s")
    sessions.add("mine", [2], owner=b"you", salt="s")
    assert sessions.get("mine", b"me", "s").ids == [1]
    for owner, salt in ((b"me", ""), (b"", "s"), (b"other", "s")):
        with pytest.raises(SessionNotFound, match="there is no session 'mine'"):
            sessions.get("mine", owner, salt)
        assert sessions.all(owner, salt) == []


def test_sessions_expire_after_their_last_use() -> None:
    sessions, released, clock = registry(seconds=10.0)
    sessions.add("long", [1])
    sessions.add("short", [1], seconds=2.0)
    clock.now = 1.5
    sessions.get("short")
    clock.now = 3.0
    assert len(sessions) == 2
    clock.now = 3.6
    assert [each.name for each in sessions.all()] == ["long"]
    clock.now = 10.1
    assert len(sessions) == 0
    assert len(released) == 2


def test_limits() -> None:
    sessions, _, _ = registry(count=2, tokens=10)
    first = sessions.add("a", [0] * 4)
    with pytest.raises(InvalidRequest, match="no room; they have at most 10 tokens in all"):
        sessions.add("b", [0] * 7)
    sessions.add("b", [0] * 4)
    with pytest.raises(InvalidRequest, match="no room; at most 2 are kept"):
        sessions.add("c", [0])
    with pytest.raises(InvalidRequest, match="at most 10 tokens"):
        sessions.extend(first, first.version, [0] * 3)
    sessions.most_points = 2
    with pytest.raises(InvalidRequest, match="no room; they keep at most 2 points"):
        sessions.extend(first, first.version, [0])
    with pytest.raises(InvalidRequest, match="ttl is 3601; expected seconds, above 0 and at most 3600"):
        sessions.check_seconds(3601)
    for wrong in ({"count": -1}, {"seconds": 0.0}):
        with pytest.raises(ConfigError):
            SessionLimits(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "a b", "ü", "x" * 129, "a\n"])
def test_names(name: str) -> None:
    sessions, _, _ = registry()
    with pytest.raises(InvalidRequest, match="name is"):
        sessions.add(name, [1])
    root = sessions.add("root", [1])
    for names in ([name], ["x", "x"], [], ["x"] * 257):
        with pytest.raises(InvalidRequest):
            sessions.fork(root, names)
    with pytest.raises(SessionConflict, match="in use"):
        sessions.add("root", [1])
    assert len(sessions) == 1


def test_a_session_that_changed_meanwhile_is_not_saved() -> None:
    sessions, _, _ = registry()
    one = sessions.add("one", [1, 2])
    version = one.version
    sessions.extend(one, version, [3])
    with pytest.raises(SessionConflict, match="has changed"):
        sessions.extend(one, version, [4])
    sessions.delete(one)
    again = sessions.add("one", [1])
    with pytest.raises(SessionConflict):
        sessions.extend(one, one.version, [4])
    assert again.ids == [1]


@pytest.mark.parametrize("point", [2, -3])
def test_points_that_are_not_there(point: int) -> None:
    sessions, _, _ = registry()
    one = sessions.add("one", [1, 2])
    sessions.extend(one, one.version, [3])
    with pytest.raises(InvalidRequest, match=f"point is {point}; expected -2 to 1"):
        sessions.roll_back(one, point)


def test_what_is_under_way_has_room_and_a_session_that_does_not_expire() -> None:
    sessions, _, clock = registry(tokens=10, seconds=5.0)
    sessions.most_points = 4
    one, two = sessions.add("one", [1, 2]), sessions.add("two", [1, 2])
    with sessions.extending(one, one.version, 4) as extension:
        with pytest.raises(InvalidRequest, match="no room"), sessions.extending(two, two.version, 3):
            pytest.fail("it was begun")
        with sessions.extending(two, two.version, 2), pytest.raises(InvalidRequest, match="no room"):
            sessions.extend(two, two.version, [0])  # by something else: what is left is held
        with pytest.raises(InvalidRequest, match="no room"):
            sessions.add("three", [0] * 3)
        clock.now = 7.0
        sessions.expire()
        assert [each.name for each in sessions.all()] == ["one"]
        sessions.extend(one, one.version, [0] * 4, extension)
    assert one.ids == [1, 2, 0, 0, 0, 0]
    clock.now = 11.9
    assert len(sessions) == 1
    clock.now = 12.0
    assert len(sessions) == 0


def test_nothing_is_begun_for_a_session_that_has_changed() -> None:
    sessions, _, _ = registry()
    one = sessions.add("one", [1, 2])
    before = one.version
    sessions.extend(one, before, [3])
    with pytest.raises(SessionConflict), sessions.extending(one, before, 1):
        pytest.fail("it was begun")
    with pytest.raises(KeyError), sessions.extending(one, one.version, 1 << 20):
        raise KeyError
    assert not sessions._under_way


@pytest.mark.parametrize(("max_tokens", "prompt", "expected"), [(5, 10, 5), (None, 10, 90), (50, 70, 30), (1, 101, 0)])
def test_the_longest_answer_is_bounded_by_the_context(max_tokens: int | None, prompt: int, expected: int) -> None:
    assert longest_answer(max_tokens, prompt, 100) == expected


def test_who_deleted_a_session_does_not_delete_the_next_of_its_name() -> None:
    sessions, released, _ = registry()
    before = sessions.add("one", [1])
    sessions.delete(before)
    after = sessions.add("one", [2])
    sessions.delete(before)
    assert sessions.get("one") is after
    assert released == [before.points[0].key]


def test_what_one_thread_has_checked_no_other_changes_before_it_is_done() -> None:
    others: list[Future[SavedSession]] = []
    once = iter([True])

    def clock() -> float:
        """`add` asks for the time after its checks, before the session is there."""
        if checked and next(once, False):
            others.append(threads.submit(sessions.add, "one", [1]))
            wait(others, timeout=0.2)
        return 0.0

    checked: list[None] = []
    sessions = Sessions(SessionLimits(), lambda key: None, clock)
    check_room = sessions._check_room
    sessions._check_room = lambda *args: checked.append(check_room(*args))  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as threads:
        mine = sessions.add("one", [1])
    assert isinstance(others[0].exception(), SessionConflict)
    assert sessions.get("one") is mine


def test_threads_begin_what_extends_sessions_while_others_look_for_room() -> None:
    sessions, _, _ = registry()
    one = sessions.add("one", [0])
    start = threading.Barrier(4, timeout=10)

    def use(_: int) -> None:
        start.wait()
        with ExitStack() as held:
            for _ in range(500):
                held.enter_context(sessions.extending(one, one.version, 5))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(use, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert one.users == 0
    assert not sessions._under_way
