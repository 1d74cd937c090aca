"""Node 0's side of an engine over several hosts: they join, get every plan, and are missed when they are gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import msgspec
import zmq

from thalweg import __version__
from thalweg.config.engine import EngineConfig
from thalweg.config.streams import say
from thalweg.engine.processes import host_link as link
from thalweg.engine.processes.messages import Start
from thalweg.errors import ConfigError, EngineDeadError

OnDeath = Callable[[EngineDeadError], object]
OnSaid = Callable[[int, bytes], object]


class OtherHosts:
    """Nodes 1 to nnodes - 1, each of which runs ranks of its own (`host_main`): those of this engine, or data-parallel
    ones, each an engine process, if `start` says how these start.

    From a listening thread come `on_death(error)`, when one says that it cannot go on, or nothing for LOST_SECONDS, or
    has not come after MEET_SECONDS, and `on_said(rank, message)`, what a data-parallel rank says. Raises ConfigError if
    this host cannot listen, or is not node 0.
    """

    def __init__(self, config: EngineConfig, key: str, start: Start | None = None) -> None:
        if config.node_rank:
            raise ConfigError(f"--node-rank is {config.node_rank}; only `thalweg serve` joins another host's engine")
        self._config, self._start = config, start
        self._context = zmq.Context()
        self._closing = False
        self._lock = threading.Lock()  # over the sockets of plans, which two threads write to
        self._plans: dict[int, zmq.Socket[bytes]] = {}
        self._joined: dict[int, bytes] = {}  # the name of its socket
        try:
            self.listener = link.free_port(config)
            self._words = link.listening(self._context, config, 0, key)
            for node in range(1, config.nnodes):
                self._plans[node] = link.listening(self._context, config, node, key)
        except BaseException:
            self._context.destroy(0)
            raise
        self.meeting = link.url(self.listener)
        self._heard: dict[int, float] = {}  # of those that have joined
        self._thread = threading.Thread(target=self._listen, name="thalweg-hosts", daemon=True)

    def watch(self, on_death: OnDeath, on_said: OnSaid | None = None) -> None:
        self._on_death, self._on_said = on_death, on_said
        missing, place = ", ".join(map(str, self._plans)), f"{self._config.master_addr}:{self._config.master_port}"
        address = self.listener.getsockname()[0]
        if address != self._config.master_addr:
            place += f" ({address})"  # a name may be another address on this host than on others
        say(f"node 0 waits at {place} for node {missing}", error=True)
        self._thread.start()

    def send(self, body: bytes) -> None:
        """A plan or an order, to all. A host that is gone is reported by the thread that listens."""
        self._tell(link.WORK, body)

    def send_to(self, node: int, message: link.ToEngine) -> None:
        """To one data-parallel rank."""
        self._tell(link.WORK, link.encode(message), node)

    def end(self, reason: str) -> None:
        """Have the other hosts end their ranks; `reason` is empty if nothing failed."""
        self._tell(link.LEAVE, reason.encode())

    def close(self, reason: str) -> None:
        """The same, and hear no more of them."""
        self._closing = True
        self.end(reason)
        if self._thread.is_alive():
            self._thread.join()
        self._words.close()
        for socket in self._plans.values():
            socket.close()
        self._context.term()  # waits for what is under way, as long as LINGER allows
        self.listener.close()

    def _tell(self, kind: bytes, body: bytes, only: int | None = None) -> None:
        with self._lock:
            for node, socket in self._joined.items():
                if only in (None, node):
                    self._send(node, socket, kind, body)

    def _answer(self, message: link.Join, kind: bytes, body: bytes) -> bool:
        """To one that has just spoken, whose connection for plans may be a moment behind. Whether it is there."""
        deadline = time.monotonic() + link.LOST_SECONDS
        while time.monotonic() < deadline:
            with self._lock:
                if self._send(message.node, message.socket, kind, body):
                    return True
            time.sleep(0.01)
        return False

    def _send(self, node: int, socket: bytes, kind: bytes, body: bytes) -> bool:
        """Whether it is on its way: False if nobody of that name is there."""
        try:
            self._plans[node].send_multipart([socket, kind, body], zmq.NOBLOCK)
        except zmq.ZMQError as e:
            if e.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        return True

    def _listen(self) -> None:
        started = time.monotonic()
        while not self._closing:
            # All that has come is read before anybody is missed: this process may have been held up itself.
            waiting = int(1000 * link.ALIVE_SECONDS / 4)
            while not self._closing and self._words.poll(waiting):
                self._hear(self._words.recv())
                waiting = 0
            now = time.monotonic()
            for node in self._plans:
                heard = self._heard.get(node)
                if heard is None and now - started > link.MEET_SECONDS:
                    self._lose(f"node {node} has not come after {link.MEET_SECONDS:g} s (--node-rank {node})")
                elif heard is not None and now - heard > link.LOST_SECONDS:
                    self._lose(f"node {node} has said nothing for {link.LOST_SECONDS:g} s; its host or process is gone")

    def _hear(self, said: bytes) -> None:
        try:
            message = link.decode(said)
        except msgspec.DecodeError as e:  # of another version, whose key is the same
            self._lose(f"a host says what node 0 does not understand ({e}); expected Thalweg {__version__} on it")
        else:
            self._take(message)

    def _take(self, message: link.Join | link.Alive | link.Said | link.Lost) -> None:
        node = message.node
        if node not in self._plans:
            return  # of more hosts than this engine has
        if isinstance(message, link.Join):
            self._meet(message)
        if self._joined.get(node) != message.socket:
            return  # of a host that was refused, or of an engine that was here before, whose hosts have yet to end
        if isinstance(message, link.Lost):
            self._lose(f"node {node}: {message.reason}")
        elif isinstance(message, link.Said) and self._on_said is not None:
            self._on_said(message.rank, message.message)
        self._heard[node] = time.monotonic()

    def _meet(self, message: link.Join) -> None:
        """Take a host in, unless it does not fit. One too many is sent away, and the others go on."""
        node = message.node
        if node in self._joined:
            refusal = f"another host is node {node} already; expected each --node-rank on one host alone"
            self._answer(message, link.LEAVE, refusal.encode())
            say(f"a second host with --node-rank {node} asked to join and was refused", error=True)
            return
        reason = self._refusal(message)
        if reason is not None:
            self._answer(message, link.LEAVE, reason.encode())
            self._lose(reason)
            return
        where = self.meeting
        how = where if self._start is None else msgspec.structs.replace(self._start, data_meeting=where)
        if not self._answer(message, link.MEET, link.encode(link.Meet(how))):
            self._lose(f"node {node} asked to join and was gone; its own lines say why")
            return
        with self._lock:
            self._joined[node] = message.socket

    def _refusal(self, message: link.Join) -> str | None:
        if message.version != __version__:
            return f"node {message.node} runs Thalweg {message.version} and node 0 {__version__}; expected the same"
        return link.difference(message.node, message.config, self._config.to_dict())

    def _lose(self, reason: str) -> None:
        if not self._closing:
            self._on_death(EngineDeadError(reason))
