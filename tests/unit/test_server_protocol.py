"""What the parser of requests refuses, whatever the pieces are in which it comes."""

from __future__ import annotations

import h11
import pytest

from thalweg.server.protocol import StrictConnection
from thalweg.server.settings import MAX_HEADER_BYTES

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"


def read(data: bytes, step: int) -> StrictConnection:
    """A connection that was given `data` in pieces of `step` bytes, up to what it refused."""
    connection = StrictConnection()
    for i in range(0, len(data), step):
        connection.receive_data(data[i : i + step])
        try:
            while connection.next_event() not in (h11.NEED_DATA, h11.PAUSED):
                pass
        except h11.RemoteProtocolError:
            break
    return connection


def head_of(size: int, line_end: bytes = b"\r\n") -> bytes:
    begin, end = b"GET /health HTTP/1.1" + line_end + b"Host: x" + line_end + b"X: ", line_end * 2
    return begin + b"a" * (size - len(begin) - len(end)) + end


@pytest.mark.parametrize("step", [1 << 20, 65_536, 1000])
@pytest.mark.parametrize("line_end", [b"\r\n", b"\n"])
def test_a_head_may_have_the_limit_and_not_a_byte_more(step: int, line_end: bytes) -> None:
    passed = read(head_of(MAX_HEADER_BYTES, line_end), step)
    assert passed.refusal is None
    assert passed.their_state is h11.DONE
    refused = read(head_of(MAX_HEADER_BYTES + 1, line_end), step).refusal
    assert refused is not None
    assert refused.status == 431
    endless = read(b"GET /" + b"a" * 3 * MAX_HEADER_BYTES, step).refusal
    assert endless is not None
    assert endless.status == 431


def test_a_body_behind_a_head_of_the_limit_does_not_count() -> None:
    head = head_of(MAX_HEADER_BYTES - 25).replace(b"GET", b"POST")[:-2] + b"Content-Length: 100000\r\n\r\n"
    assert len(head) == MAX_HEADER_BYTES
    for step in (1 << 20, 999):
        connection = read(head + b"x" * 100_000, step)
        assert connection.refusal is None
        assert connection.their_state is h11.DONE


BAD_LENGTHS = [
    b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"transfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n",
    b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n",
    b"Content-Length: 3\r\ncontent-length: 3\r\n\r\n",
    b"Content-Length: 3, 3\r\n\r\n",
    b"Content-Length: 3, 4\r\n\r\n",
    b"Content-Length: +3\r\n\r\n",
    b"Content-Length: -3\r\n\r\n",
    b"Content-Length: 0x3\r\n\r\n",
    b"Content-Length : 3\r\n\r\n",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"Transfer-Encoding: gzip, chunked\r\n\r\n",
    b"Transfer-Encoding: xchunked\r\n\r\n",
]


@pytest.mark.parametrize("rest", BAD_LENGTHS)
@pytest.mark.parametrize("step", [1 << 20, 7])
def test_a_body_whose_length_is_in_doubt_is_refused(rest: bytes, step: int) -> None:
    connection = read(HEAD + rest + b"3\r\nabc\r\n0\r\n\r\n", step)
    assert connection.refusal is not None
    assert connection.refusal.status == 400


def test_http_1_0_has_no_chunks() -> None:
    head = HEAD.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n"
    assert read(head + b"0\r\n\r\n", 1 << 20).refusal is not None


@pytest.mark.parametrize(
    "chunks",
    [
        b"3\r\nabcXX0\r\n\r\n",  # its end is no CRLF
        b"3\r\nabcd\r\n0\r\n\r\n",
        b"zz\r\n",
        b"-3\r\nabc\r\n0\r\n\r\n",
        b"0x3\r\nabc\r\n0\r\n\r\n",
        b"f" * 21 + b"\r\nabc\r\n0\r\n\r\n",
        b"3 3\r\nabc\r\n0\r\n\r\n",
    ],
)
@pytest.mark.parametrize("step", [1 << 20, 1])
def test_malformed_chunks_are_refused(chunks: bytes, step: int) -> None:
    connection = read(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks, step)
    assert connection.refusal is not None
    assert connection.refusal.status == 400


@pytest.mark.parametrize("step", [1 << 20, 1])
def test_good_bodies_pass(step: int) -> None:
    for rest in (
        b"Content-Length: 3\r\n\r\nabc",
        b"X-Content-Length: 9\r\nContent-Length: 3\r\n\r\nabc",
        b"X: 1\r\n Content-Length: 9\r\nContent-Length: 3\r\n\r\nabc",  # a folded line is part of the one before
        b"Transfer-Encoding: Chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nTrailer: z\r\n\r\n",
    ):
        connection = read(HEAD + rest, step)
        assert connection.refusal is None, rest
        assert connection.their_state is h11.DONE
