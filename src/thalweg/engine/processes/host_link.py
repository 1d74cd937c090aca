"""What hosts of one engine say to each other: msgspec messages over ZeroMQ on TCP, encrypted with a key that all have.

Node 0 listens at --master-port, where the other hosts speak, and at the ports after it, one for each of them, from
which it gets plans. CurveZMQ lets nobody in who does not know the listener's public key; here that is no public
matter, since all keys are made of THALWEG_CLUSTER_KEY.
"""

from __future__ import annotations

import hashlib
import secrets
import socket as sockets
from functools import cache
from typing import Any

import msgspec
import zmq
from zmq.utils import z85

from thalweg.config import env
from thalweg.config.engine import EngineConfig
from thalweg.engine.processes.messages import Start
from thalweg.errors import ConfigError

ALIVE_SECONDS = 1.0  # between two signs of life
LOST_SECONDS = 5.0  # without a sign of life after which a host is taken to be gone
MEET_SECONDS = 600.0  # that hosts wait for each other
MIN_KEY = 16  # characters
# First frame to a host. The second is a plan or order, or ToEngine; Meet; a reason, empty if nothing failed.
WORK, MEET, LEAVE = b"W", b"M", b"L"


class Meet(msgspec.Struct, frozen=True):
    """Where ranks meet (see join_mesh), or how to start the host's data-parallel ranks, but for what is its own."""

    where: str | Start


class ToEngine(msgspec.Struct, frozen=True, array_like=True):
    """A message to the engine process of a data-parallel rank, as its socket takes it."""

    rank: int
    message: bytes


class Join(msgspec.Struct, frozen=True, tag=True):
    """A host is there: EngineConfig.to_dict() of what it was started with, and the name of its socket for plans."""

    node: int
    socket: bytes
    version: str
    config: dict[str, Any]


class Alive(msgspec.Struct, frozen=True, tag=True):
    """A host, by the name that it joined with, goes on."""

    node: int
    socket: bytes


class Said(msgspec.Struct, frozen=True, tag=True):
    """What the engine process of a data-parallel rank of the same host said, as it came from its socket."""

    node: int
    socket: bytes
    rank: int
    message: bytes


class Lost(msgspec.Struct, frozen=True, tag=True):
    """The same host cannot go on."""

    node: int
    socket: bytes
    reason: str


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Join | Alive | Said | Lost).decode
decode_meet = msgspec.msgpack.Decoder(Meet).decode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode

# What may differ between hosts: where things are, and who it is.
OWN_OPTIONS = frozenset(
    {"model", "revision", "tokenizer", "generation_config", "config_file", "device", "master_addr", "master_port",
     "node_rank"}
)  # fmt: skip


def difference(node: int, there: dict[str, Any], here: dict[str, Any]) -> str | None:
    """The first option in which a host differs from node 0, in a sentence; None if they agree."""
    for name, value in here.items():
        if name not in OWN_OPTIONS and there.get(name) != value:
            option = "--" + name.replace("_", "-")
            return f"{option} is {there.get(name)!r} on node {node} and {value!r} on node 0; expected the same"
    return None


def cluster_key() -> str:
    """THALWEG_CLUSTER_KEY. Raises ConfigError if there is none, or one that can be guessed."""
    key = env.read("THALWEG_CLUSTER_KEY")
    if key is None or len(key) < MIN_KEY:
        what = "is not set" if key is None else f"has {len(key)} characters"
        raise ConfigError(
            f"several hosts need THALWEG_CLUSTER_KEY, which {what}; expected the same {MIN_KEY} or more random"
            " characters on every host, such as `openssl rand -hex 32` prints"
        )
    return key


def listening(context: zmq.Context[Any], config: EngineConfig, node: int, key: str) -> zmq.Socket[bytes]:
    """Node 0's socket for a node, which sends to the socket that a message names first and to no other; for node 0, the
    one where all others speak. Raises ConfigError."""
    socket, port = _socket(context, zmq.ROUTER if node else zmq.PULL), config.master_port + node
    if node:
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # to whom it is not connected it does not pretend to send
    _, socket.curve_secretkey = _keys(key, "node 0")
    socket.curve_server = True
    try:
        socket.bind(f"tcp://{_bracketed(resolved(config))}:{port}")
    except zmq.ZMQError as e:
        socket.close()
        last = config.master_port + config.nnodes - 1
        raise ConfigError(
            f"node 0 cannot listen at port {port} of --master-addr {config.master_addr} ({e.strerror}); expected an"
            f" address of this host, and ports {config.master_port} (--master-port) to {last} free"
        ) from None
    return socket


def connected(context: zmq.Context[Any], node: int, key: str) -> zmq.Socket[bytes]:
    """Another host's socket, of a name of its own, to what `listening` gave node 0. What is sent before node 0 is there
    waits."""
    socket = _socket(context, zmq.DEALER if node else zmq.PUSH)
    socket.routing_id = b"host" + secrets.token_bytes(16)
    socket.curve_serverkey, _ = _keys(key, "node 0")
    socket.curve_publickey, socket.curve_secretkey = _keys(key, "another node")
    return socket


def connect(socket: zmq.Socket[bytes], config: EngineConfig, node: int) -> None:
    socket.connect(f"tcp://{_bracketed(resolved(config))}:{config.master_port + node}")


def resolved(config: EngineConfig) -> str:
    """--master-addr as numbers. Raises ConfigError."""
    try:
        found = sockets.getaddrinfo(config.master_addr, None, type=sockets.SOCK_STREAM)
    except OSError as e:
        reason = f"which has no address: {e.strerror}"
        raise ConfigError(f"--master-addr is {config.master_addr!r}, {reason}; expected node 0's") from None
    return str(found[0][4][0])


def free_port(config: EngineConfig) -> sockets.socket:
    """A socket that listens at a free port of node 0, which this host is. Raises ConfigError."""
    address = resolved(config)
    listener = sockets.socket(sockets.AF_INET6 if ":" in address else sockets.AF_INET)
    try:
        listener.bind((address, 0))
        listener.listen(1024)
    except OSError as e:
        listener.close()
        reason = f"where this host cannot listen: {e.strerror}"
        raise ConfigError(f"--master-addr is {config.master_addr!r}, {reason}; expected node 0's address") from None
    return listener


def url(listener: sockets.socket) -> str:
    address, port, *_ = listener.getsockname()
    return f"tcp://{_bracketed(address)}:{port}"


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _socket(context: zmq.Context[Any], kind: int) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = context.socket(kind)
    options = {
        zmq.LINGER: 2000, zmq.SNDHWM: 0, zmq.RCVHWM: 0, zmq.IPV6: 1,
        zmq.HEARTBEAT_IVL: int(1000 * ALIVE_SECONDS),  # which tells the other end of a host that is gone without a word
        zmq.HEARTBEAT_TIMEOUT: int(1000 * LOST_SECONDS), zmq.HEARTBEAT_TTL: int(1000 * LOST_SECONDS),
    }  # fmt: skip
    for option, value in options.items():
        socket.setsockopt(option, value)
    return socket


@cache
def _keys(key: str, role: str) -> tuple[bytes, bytes]:
    """A pair for CurveZMQ, public and secret, that follows from the key; slow to try for all keys that are likely."""
    secret = z85.encode(hashlib.scrypt(key.encode(), salt=f"thalweg {role}".encode(), n=2**14, r=8, p=1, dklen=32))
    return zmq.curve_public(secret), secret
