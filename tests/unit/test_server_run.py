"""What `thalweg serve` sets up before it answers."""

from __future__ import annotations

import socket

from thalweg.server.connections import listen


def test_connections_send_small_answers_at_once() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()) as client:
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert client.getpeername() == listener.getsockname()
