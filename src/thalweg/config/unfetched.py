"""Files of a model folder that were never fetched: what stands in their place, and what to do about it."""

from __future__ import annotations

HEAD_BYTES = 256  # how much of a file why_unfetched() looks at

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_WEB_PAGES = (b"<!doctype html", b"<html", b"<?xml")


def why_unfetched(head: bytes) -> str | None:
    """What a file that begins with `head` (b"": an empty one) is in place of its content, and how to get that; None for
    anything else."""
    if not head:
        return "is empty: its download broke off; fetch it again"
    if head.startswith(_LFS_POINTER):
        return "is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder, or download the file"
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:20].lower().startswith(_WEB_PAGES):
        return "is a web page, not the file itself: its download failed; fetch it again (a token may be needed)"
    return None
