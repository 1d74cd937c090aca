"""A rank other than 0: `python -m thalweg.engine.processes.rank_main ADDRESS`, started by OtherRanks."""

from __future__ import annotations

import os
import sys

import msgspec
import zmq

from thalweg.config.engine import EngineConfig
from thalweg.core import StepPlan
from thalweg.engine.processes.ipc import end_with_parent
from thalweg.engine.processes.ranks import RankStart
from thalweg.errors import ThalwegError


def main(address: str) -> int:
    end_with_parent(address)
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
    socket.bind(address)
    start = msgspec.msgpack.decode(socket.recv(), type=RankStart)
    from thalweg.build.rank import build_rank

    runner, _ = build_rank(EngineConfig(**start.config), start.tp_rank, start.rendezvous_file)
    decode = msgspec.msgpack.Decoder(StepPlan).decode
    while True:
        runner.launch(decode(socket.recv()))  # only rank 0's tokens count, so nobody waits for these


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except ThalwegError as e:
        print(f"thalweg rank: {e}", file=sys.stderr, flush=True)
        os._exit(2)
