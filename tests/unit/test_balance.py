"""Requests go to the data-parallel rank with the least to do, and what ranks say is added up."""

from __future__ import annotations

from thalweg.core import Request, SamplingParams, SchedulerStats
from thalweg.engine.processes.balance import CHUNK, EXPECTED, Balance, together


def request(name: str, prompt: int | list[int] = 10, max_tokens: int | None = 10, salt: str = "") -> Request:
    ids = [1] * prompt if isinstance(prompt, int) else prompt
    return Request(id=name, prompt_token_ids=ids, params=SamplingParams(max_tokens=max_tokens, cache_salt=salt))


def test_the_fewest_tokens_in_flight_win_and_equals_take_turns() -> None:
    balance = Balance(3)
    assert [balance.add(request(str(i))) for i in range(4)] == [0, 1, 2, 0]
    assert balance.add(request("long", prompt=200)) == 1
    assert [balance.add(request(f"after {i}")) for i in range(3)] == [2, 0, 2]
    assert balance.tokens == [60, 230, 60]
    balance.came("long", 4)
    balance.end("long")
    assert balance.tokens == [60, 20, 60]
    assert balance.requests == [3, 1, 3]
    assert balance.add(request("now")) == 1


def test_tokens_that_came_are_no_longer_in_flight() -> None:
    balance = Balance(2)
    balance.add(request("a", prompt=5, max_tokens=20))
    balance.came("a", 7)
    assert balance.tokens == [18, 0]
    balance.came("a", 100)  # more than was asked for never counts
    assert balance.tokens == [0, 0]
    assert balance.requests == [1, 0]
    balance.end("a")
    balance.end("a")
    balance.came("a", 1)
    assert (balance.tokens, balance.requests) == ([0, 0], [0, 0])
    assert balance.rank_of("a") == 0
    balance.forget("a")
    assert balance.rank_of("a") is None


def test_no_answer_is_expected_to_be_as_long_as_it_may_be() -> None:
    balance = Balance(2)
    balance.add(request("a", prompt=20, max_tokens=None))
    balance.add(request("b", prompt=20, max_tokens=100_000))
    assert balance.tokens == [20 + EXPECTED, 20 + EXPECTED]
    balance.end("b")
    # One without a limit does not keep all others off its rank.
    ranks = [balance.add(request(f"c {i}", prompt=100, max_tokens=100)) for i in range(12)]
    assert 0 in ranks
    balance.came("a", EXPECTED + 5)  # it goes on
    assert balance.requests[0] == 1 + ranks.count(0)


def test_a_prompt_goes_where_its_beginning_was_unless_that_rank_has_much_more_to_do() -> None:
    balance = Balance(2)
    system, other = list(range(4 * CHUNK)), list(range(7, 4 * CHUNK))

    def served(name: str, ids: list[int], salt: str = "") -> int:
        rank = balance.add(request(name, ids, salt=salt))
        balance.forget(name)
        return rank

    assert served("a", [*system, 1]) == 0
    assert served("b", other) == 1
    assert [served(f"more {i}", [*system, i]) for i in range(3)] == [0, 0, 0]
    assert served("other", [*other, 3]) == 1
    # The rest of the chunk differs, and so does the salt.
    assert served("near", system[: CHUNK - 1]) == 0
    assert served("salted", [*system, 1], salt="x") == 1
    balance.add(request("busy", [*system, 9], max_tokens=3 * CHUNK))
    assert balance.tokens[0] > 0
    assert served("elsewhere", [*system, 2]) == 1


def test_what_ranks_say_is_added_up() -> None:
    a = SchedulerStats(1, 2, 3, 4, 5, 6, 7, 8, 9, prefix_misses={"new": 2}, host_copies={})
    b = SchedulerStats(10, 0, 0, 4, 0, 6, 0, 0, 1, prefix_misses={"new": 1, "salt": 5})
    both = together([a, b])
    assert (both.num_running, both.blocks_total, both.generation_tokens) == (11, 8, 10)
    assert both.prefix_misses == {"new": 3, "salt": 5}
    assert together([a]) == a
