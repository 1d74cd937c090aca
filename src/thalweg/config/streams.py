"""Standard streams that are closed, full, or left by their reader (`>&-`, `> /dev/full`, `| head -1`)."""

from __future__ import annotations

import contextlib
import errno
import os
import sys

_CANNOT_BE_WRITTEN = {errno.EBADF, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EPIPE}


def hold_closed_streams() -> None:
    """Open what the caller closed, so that no file or socket takes its number and is written to by mistake. Standard
    input is then empty, what goes to standard error is lost, and writing to standard output fails as it should."""
    for name, flags in (("stdin", os.O_RDONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, flags)  # the lowest free number, which is the stream's own
            os.set_inheritable(number, number <= 2)
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w"))


def why_unwritable(error: OSError) -> str | None:
    """Why what the user asked for cannot be written; None for an error of another kind."""
    if error.filename is not None or error.errno not in _CANNOT_BE_WRITTEN:
        return None
    return "standard output is closed" if error.errno == errno.EBADF else os.strerror(error.errno)


def forgo_stdout() -> None:
    """From now on standard output goes nowhere, what is still buffered included, which would fail again at exit."""
    with contextlib.suppress(OSError, ValueError):  # no file below it: nothing fails at exit either
        number, null = sys.stdout.fileno(), os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)


def say(*lines: str, error: bool = False) -> None:
    """Print for whoever is there to read: a server runs on if nobody is."""
    try:
        print(*lines, sep="\n  ", file=sys.stderr if error else sys.stdout, flush=True)
    except OSError:
        if not error:
            forgo_stdout()
