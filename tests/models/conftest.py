"""Ranks of models are forked: tests/dist has them as a user starts them."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

from tests.forked import ForkedRank
from thalweg.engine.processes import ranks


@pytest.fixture(autouse=True)
def forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = SimpleNamespace(Popen=ForkedRank, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(ranks, "subprocess", stand_in)
