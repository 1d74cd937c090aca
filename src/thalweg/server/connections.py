"""The socket that the server listens on, and when a connection counts as given up."""

from __future__ import annotations

import contextlib
import socket

from thalweg.errors import ConfigError

STALLED_SECONDS = 60
MAX_FILES = 65_536
_BACKLOG = 2048


def listen(host: str, port: int, stalled_seconds: int = STALLED_SECONDS) -> socket.socket:
    """A listening socket, taken before the model is loaded; connections inherit its options. Raises ConfigError.

    A client that reads nothing, or answers no probe, for `stalled_seconds` is gone: the system closes its connection,
    which ends its requests. (Linux only; elsewhere such a client is held until it goes by itself.)
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"--host {host} --port {port} cannot be used: {reason}") from None
    # Without it a small answer waits for the last one's acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    probe = max(1, stalled_seconds // 4)
    for name, value in (
        ("TCP_KEEPIDLE", probe),
        ("TCP_KEEPINTVL", probe),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 1000 * stalled_seconds),
    ):
        if (option := getattr(socket, name, None)) is not None:
            listener.setsockopt(socket.IPPROTO_TCP, option, value)
    return listener


def raise_file_limit() -> None:
    """Let the process have as many connections as the system allows, up to MAX_FILES; the usual limit is 1024."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(MAX_FILES, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
