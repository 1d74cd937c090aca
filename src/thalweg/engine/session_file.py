"""A session as a file."""

from __future__ import annotations

from pathlib import Path

import msgspec

from thalweg.errors import InvalidRequest

FILE_FORMAT = 1


class SessionFile(msgspec.Struct, frozen=True):
    """A session as it is written down, in JSON. `identity`: of the model and all else that its computing depends on."""

    format: int
    identity: str
    salt: str
    points: list[int]
    token_ids: list[int]


def read_session_file(path: Path, identity: str, vocab_size: int) -> SessionFile:
    """Raises InvalidRequest, one line, if it cannot be read, is damaged, or is of another model or version."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=SessionFile)
    except (OSError, msgspec.DecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise InvalidRequest(f"session file {path} cannot be read: {reason}") from None
    if found.format != FILE_FORMAT or found.identity != identity:
        raise InvalidRequest(f"session file {path} is of another model, version, dtype or layout of the cache")
    ends, ids = found.points, found.token_ids
    if not ends or ends != sorted(ends) or ends[0] < 1 or ends[-1] != len(ids) or not _are_ids(ids, vocab_size):
        raise InvalidRequest(f"session file {path} contradicts itself")
    return found


def _are_ids(ids: list[int], vocab_size: int) -> bool:
    return min(ids) >= 0 and max(ids) < vocab_size
