"""What the front end and the engine process say to each other: msgspec messages, MessagePack on the wire."""

from __future__ import annotations

from typing import Any

import msgspec

from thalweg.assembly.info import EngineInfo
from thalweg.core import Request, RequestUpdate, SchedulerStats
from thalweg.recorder.orders import Order


class Start(msgspec.Struct, frozen=True, tag=True):
    """First message to an engine process: EngineConfig.to_dict(), the seconds a request may wait for its slot, and
    whether its debug log is wanted on standard error. `data_meeting` is where data-parallel ranks of several hosts meet
    (see join_data_ranks), and `listener` the file descriptor of that place, which the process of rank 0 is given."""

    config: dict[str, Any]
    queue_timeout: float | None = None
    debug: bool = False
    data_rank: int = 0
    data_meeting: str = ""
    listener: int | None = None


class Add(msgspec.Struct, frozen=True, tag=True):
    """Requests, and the number of the wake-up that comes with them, if there are several data-parallel ranks."""

    requests: list[Request]
    wake: int = 0


class Wake(msgspec.Struct, frozen=True, tag=True):
    """Another data-parallel rank gets a request; `number` counts these and those of Add, one after another."""

    number: int


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_ids: list[str]


class Keep(msgspec.Struct, frozen=True, tag=True):
    """See EngineCore.keep; answered by Kept."""

    id: int
    name: str
    salt: str
    token_ids: list[int]


class Release(msgspec.Struct, frozen=True, tag=True):
    """See EngineCore.release."""

    name: str


class CountExperts(msgspec.Struct, frozen=True, tag=True):
    """How many tokens did each expert get; of a data-parallel rank only. Answered by ExpertsCounted."""

    id: int


class Give(msgspec.Struct, frozen=True, tag=True):
    """An order to the engine's ranks, with the number of the wake-up that comes with it if there are several
    data-parallel ranks, which then obey it together. Answered by Obeyed."""

    id: int
    order: Order
    wake: int


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


class Kept(msgspec.Struct, frozen=True, tag=True):
    """The answer to Keep `id`."""

    id: int
    tokens: int


class ExpertsCounted(msgspec.Struct, frozen=True, tag=True):
    """The answer to CountExperts `id`: tokens by layer and expert, since the first time that this was asked."""

    id: int
    tokens: dict[int, list[int]]


class Obeyed(msgspec.Struct, frozen=True, tag=True):
    """The answer to Give `id`: the outcome on the engine's rank 0. `kind` is the error class's name, if it failed."""

    id: int
    outcome: Any = None
    kind: str | None = None
    reason: str = ""


ToEngine = Start | Add | Wake | Abort | Keep | Release | CountExperts | Give | Stop
FromEngine = Ready | Updates | Refused | Kept | ExpertsCounted | Obeyed | Dead

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
