"""What `thalweg serve` sets up before it answers."""

from __future__ import annotations

import inspect
import socket

import pytest

from thalweg.cli import main
from thalweg.server.connections import listen
from thalweg.server.run import _is_loopback, serve


def test_connections_send_small_answers_at_once() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()) as client:
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert client.getpeername() == listener.getsockname()


def test_it_listens_on_the_loopback_address_unless_told_otherwise() -> None:
    assert inspect.signature(serve).parameters["host"].default == "127.0.0.1"
    assert _is_loopback("127.0.0.1")
    assert not _is_loopback("0.0.0.0")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--max-queued-requests", "-1"),
        ("--queue-timeout", "0"),
        ("--request-timeout", "nan"),
        ("--shutdown-timeout", "-1"),
        ("--port", "70000"),
    ],
)
def test_limits_out_of_range_name_their_option(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", option, value]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {option} is {value}")
    assert error.count("\n") == 1


def test_experts_are_counted_over_data_parallel_ranks_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--expert-metrics"]) == 2
    assert "--data-parallel-size" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["", " ", "key\n", " key", "ke\ny"])
def test_a_key_that_no_header_can_bring_is_refused(
    key: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["serve", "--api-key", key]) == 2
    assert capsys.readouterr().err.startswith("error: --api-key")
    if key:
        monkeypatch.setenv("THALWEG_API_KEY", key)
        assert main(["serve"]) == 2
        assert "THALWEG_API_KEY" in capsys.readouterr().err
