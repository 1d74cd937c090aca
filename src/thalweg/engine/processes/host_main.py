"""A host other than node 0: `thalweg serve --node-rank K`. Runs its ranks, and passes on to them what node 0 says.

That is plans, or, to data-parallel ranks, requests, whose answers it passes back.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from contextlib import ExitStack
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from thalweg import __version__
from thalweg.assembly.source import open_source
from thalweg.config.engine import EngineConfig
from thalweg.config.streams import say
from thalweg.engine.processes import host_link as link
from thalweg.engine.processes.host_engines import HostEngines
from thalweg.engine.processes.ranks import LocalRanks
from thalweg.errors import ConfigError, EngineDeadError
from thalweg.parallel.shards import Shards

_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
LAST_WORDS_SECONDS = 0.1  # for what an engine process said before it ended, which says more than its end
_REFUSALS = 3  # in a row before the key is taken to be wrong, and not node 0 to be starting or ending


class Host:
    """One host's part in an engine; all of it happens in `run`."""

    def __init__(self, config: EngineConfig, key: str, shutdown_timeout_s: float = 30.0) -> None:
        self._config, self._node, self._key = config, config.node_rank, key
        self._patience_s = shutdown_timeout_s + link.LOST_SECONDS  # node 0, told at the same time, needs a moment more
        self._ranks: LocalRanks | HostEngines | None = None
        self._engines: dict[zmq.Socket[bytes], int] = {}  # where data-parallel ranks speak
        self._ended: queue.SimpleQueue[EngineDeadError | None] = queue.SimpleQueue()  # a rank's error; None: a signal
        self._refusals = 0
        self._connected = self._gone = False

    def run(self) -> None:
        """Until node 0 says that all is well and over. After SIGTERM it goes on until then as well, as requests may be
        under way, but no longer than `shutdown_timeout_s` and a moment; at once if it is the second one, or if node 0
        has not answered yet. Raises ConfigError or CheckpointError for a model that is not there or not whole,
        ConfigError if node 0 does not take this host, and EngineDeadError when the engine is lost, here or there."""
        c = self._config
        shards = Shards(0, c.tensor_parallel_size, c.data_ranks_of(c.node_rank)[0], c.data_parallel_size)
        open_source(c).plan(shards)  # before node 0 counts on this host
        with ExitStack() as stack:
            context: zmq.Context[Any] = stack.enter_context(zmq.Context())
            self._words = stack.enter_context(link.connected(context, 0, self._key))
            self._plans = stack.enter_context(link.connected(context, self._node, self._key))
            name = self._plans.getsockopt(zmq.ROUTING_ID)
            assert isinstance(name, bytes)
            self._name = name  # by which node 0 knows this host
            events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | _REFUSED
            self._monitor = self._plans.get_monitor_socket(events)
            stack.callback(self._plans.disable_monitor)
            self._wake, alarm = os.pipe()
            stack.callback(os.close, alarm)
            stack.callback(os.close, self._wake)
            self._alarm, self._poller = alarm, zmq.Poller()
            stack.callback(self._close_ranks)
            self._catch_sigterm(stack)
            link.connect(self._words, c, 0)
            link.connect(self._plans, c, self._node)
            say(f"node {self._node} of {c.nnodes} joins node 0 at {c.master_addr}:{c.master_port}", error=True)
            self._loop()

    def _loop(self) -> None:
        poller = self._poller
        for each in (self._plans, self._monitor, self._wake):
            poller.register(each, zmq.POLLIN)
        started = said = time.monotonic()
        leaves_at = float("inf")
        while True:
            ready = dict(poller.poll(int(1000 * link.ALIVE_SECONDS / 2)))
            if self._plans in ready and self._take(*self._plans.recv_multipart()):
                return
            for socket in self._engines:
                if socket in ready:
                    self._pass_back(socket)
            if self._monitor in ready:
                self._look(recv_monitor_message(self._monitor)["event"])
            if self._gone and not self._plans.poll(0):  # what it said last comes first
                raise EngineDeadError("node 0 is gone; its own lines say why")
            if self._wake in ready:
                os.read(self._wake, 1)
                error = self._ended.get()
                if error is not None:
                    self._pass_last_words()
                    self._words.send(link.encode(link.Lost(self._node, self._name, str(error))))
                    raise error
                is_first = leaves_at == float("inf")
                leaves_at = time.monotonic() + (self._patience_s if is_first and self._ranks is not None else 0)
                if is_first and self._ranks is not None:
                    end = f"or after {self._patience_s:g} s (--shutdown-timeout)"
                    say(f"node {self._node} was told to stop and ends with node 0, {end}", error=True)
            now = time.monotonic()
            if now >= leaves_at:
                if self._ranks is not None:
                    self._words.send(link.encode(link.Lost(self._node, self._name, "its host was told to stop")))
                return
            if self._ranks is None and now - started > link.MEET_SECONDS:
                raise EngineDeadError(f"node 0 has not answered after {link.MEET_SECONDS:g} s (--master-addr)")
            if now - said > link.ALIVE_SECONDS:
                said = now
                if self._ranks is not None:
                    self._words.send(link.encode(link.Alive(self._node, self._name)))

    def _take(self, kind: bytes, body: bytes) -> bool:
        """What node 0 says; whether it says that all is over."""
        if kind == link.WORK and self._ranks is not None:
            self._ranks.send(body)
        elif kind == link.MEET:
            where = link.decode_meet(body).where
            if isinstance(where, str):
                self._ranks = LocalRanks(self._config, where)
            else:
                self._ranks = engines = HostEngines(self._config, where)
                self._engines = {socket: rank for rank, socket in engines.sockets.items()}
                for socket in self._engines:
                    self._poller.register(socket, zmq.POLLIN)
            self._ranks.watch(self._tell)
        elif kind == link.LEAVE:
            if not body:
                return True
            if self._ranks is None:
                raise ConfigError(body.decode())
            raise EngineDeadError(f"node 0 ended the engine: {body.decode()}")
        return False

    def _pass_back(self, socket: zmq.Socket[bytes]) -> None:
        """What a data-parallel rank says."""
        message = link.Said(self._node, self._name, self._engines[socket], socket.recv())
        self._words.send(link.encode(message))

    def _pass_last_words(self) -> None:
        if self._engines:
            time.sleep(LAST_WORDS_SECONDS)
        for socket in self._engines:
            while socket.poll(0):
                self._pass_back(socket)

    def _look(self, event: int) -> None:
        """At what became of the connection."""
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._connected = True  # from now on this host hears what node 0 answers
            self._words.send(link.encode(link.Join(self._node, self._name, __version__, self._config.to_dict())))
        elif event & _REFUSED and not self._connected:
            self._refusals += 1
            if self._refusals >= _REFUSALS:
                where = f"{self._config.master_addr}:{self._config.master_port + self._node}"
                raise ConfigError(f"node 0 at {where} has another THALWEG_CLUSTER_KEY; expected the same on every host")
        elif event == zmq.EVENT_DISCONNECTED and self._connected:
            self._gone = True

    def _tell(self, error: EngineDeadError | None) -> None:
        """From any thread: have the loop look at this."""
        self._ended.put(error)
        os.write(self._alarm, b".")

    def _catch_sigterm(self, stack: ExitStack) -> None:
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGTERM, lambda *_: self._tell(None))
            stack.callback(signal.signal, signal.SIGTERM, before)

    def _close_ranks(self) -> None:
        if self._ranks is not None:
            self._ranks.close()


def serve_ranks(config: EngineConfig, shutdown_timeout_s: float) -> None:
    """As Host.run. Raises ConfigError without a key, too."""
    Host(config, link.cluster_key(), shutdown_timeout_s).run()
