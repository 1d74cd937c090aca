"""Token ids of a prompt, as they come from users."""

from __future__ import annotations

from typing import Any

import pytest

from thalweg.errors import InvalidRequest
from thalweg.text.prompts import check_token_ids


@pytest.mark.parametrize("ids", [[], [0], [99, 0], [5] * 40_000])
def test_a_list_of_ids_of_the_vocabulary_is_taken_as_it_is(ids: list[int]) -> None:
    assert check_token_ids(ids, 100) is ids


@pytest.mark.parametrize("bad", [-1, 100, 2**32, 2**64, -(2**70), True, 1.0, "1", None])
@pytest.mark.parametrize("at", [0, 33_000])
def test_the_first_bad_id_is_named_wherever_it_is(bad: Any, at: int) -> None:
    ids = [7] * 33_001
    ids[at] = bad
    with pytest.raises(InvalidRequest, match=f"prompt token {at} is "):
        check_token_ids(ids, 100)
