"""What the front end and the engine process say to each other: msgspec messages, MessagePack on the wire."""

from __future__ import annotations

from typing import Any

import msgspec

from thalweg.build.info import EngineInfo
from thalweg.core import Request, RequestUpdate, SchedulerStats


class Start(msgspec.Struct, frozen=True, tag=True):
    """First message to an engine process: EngineConfig.to_dict(), and the seconds a request may wait for its slot."""

    config: dict[str, Any]
    queue_timeout: float | None = None


class Add(msgspec.Struct, frozen=True, tag=True):
    request: Request


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_ids: list[str]


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End the process; requests still running are dropped."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    info: EngineInfo


class Updates(msgspec.Struct, frozen=True, tag=True):
    """`sent_at` is on time.monotonic's clock, which all processes of a machine share."""

    updates: list[RequestUpdate]
    stats: SchedulerStats
    sent_at: float


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A request that the engine did not take in, or did not begin in time. `kind` is the error class's name."""

    request_id: str
    kind: str
    reason: str


class Dead(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot go on, or could not start. `kind` is the error class's name, to raise the same one."""

    kind: str
    reason: str


ToEngine = Start | Add | Abort | Stop
FromEngine = Ready | Updates | Refused | Dead

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
