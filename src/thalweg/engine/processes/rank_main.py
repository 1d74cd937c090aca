"""A rank other than 0: `python -m thalweg.engine.processes.rank_main ADDRESS`, started by LocalRanks."""

from __future__ import annotations

import os
import sys
import time

import msgspec
import zmq

from thalweg.config.engine import EngineConfig
from thalweg.core import StepPlan
from thalweg.engine.processes.ipc import end_with_parent
from thalweg.engine.processes.ranks import RankStart
from thalweg.errors import RankLostError, ThalwegError
from thalweg.recorder.orders import Order
from thalweg.runner.executor import WATCHER_SECONDS
from thalweg.runner.lock_step import Agreed


def main(address: str) -> int:
    end_with_parent(address)
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
    socket.bind(address)
    start = msgspec.msgpack.decode(socket.recv(), type=RankStart)
    from thalweg.assembly.rank import build_rank
    from thalweg.recorder.window import RecordedRunner

    where = start.data_rank, start.data_meeting
    config = EngineConfig(**start.config)
    built, _ = build_rank(config, start.tp_rank, start.meeting, None, *where)
    rank = start.data_rank * config.tensor_parallel_size + start.tp_rank
    runner = RecordedRunner(built, rank, tells_full=False)
    decode = msgspec.msgpack.Decoder(StepPlan | Order | Agreed).decode
    while True:
        message = decode(socket.recv())
        if isinstance(message, StepPlan):
            runner.launch(message)  # only rank 0's tokens count, so nobody waits for these
            continue
        if isinstance(message, Agreed):
            runner.agree(message)
            continue
        try:
            runner.obey(message)
        except Exception as e:  # noqa: BLE001 -- rank 0 misses this rank's file, and says so; steps go on
            print(f"thalweg rank {start.tp_rank}: {type(message).__name__} failed: {e}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except Exception as e:  # noqa: BLE001 -- whatever it was, this rank ends
        if isinstance(e, RankLostError):
            time.sleep(WATCHER_SECONDS)  # whoever watches the lost one has this one leave, and says why
        if isinstance(e, ThalwegError):
            print(f"thalweg rank: {e}", file=sys.stderr)
        else:
            sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(2)  # a group that Python lets go at its end waits for the other ranks
