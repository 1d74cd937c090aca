"""That the interpreting process tells and ends: kernels' own tests lean on it."""

from __future__ import annotations

import time

import pytest

from tests.ops import interpreted
from tests.ops.interpreted import run_interpreted


def fails() -> None:
    raise AssertionError("on purpose")


def hangs() -> None:
    time.sleep(1000)


def test_a_check_that_fails_is_told() -> None:
    with pytest.raises(AssertionError, match="on purpose"):
        run_interpreted(fails)


@pytest.mark.timeout(60)
def test_a_check_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreted, "SECONDS", 1)
    with pytest.raises(TimeoutError):
        run_interpreted(hangs)
