"""How much memory this process has allocated."""

from __future__ import annotations

import ctypes

_MALLINFO = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _MallInfo(ctypes.Structure):
    """`struct mallinfo2` of <malloc.h>."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in _MALLINFO)


def allocated() -> int:
    """Bytes that this process has allocated and not freed; 0 where the C library does not tell (glibc does).

    Not its resident memory, which grows as a CPU's cache is used for the first time.
    """
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return 0
    ask.restype = _MallInfo
    info = ask()
    return int(info.uordblks + info.hblkhd)
