"""A private folder for sockets between processes."""

from __future__ import annotations

import tempfile

MAX_FOLDER_LENGTH = 80  # a socket's path may have 107 characters in all


def socket_folder() -> tempfile.TemporaryDirectory[str]:
    """A new folder that only this user can enter, with a path short enough for the sockets in it."""
    folder = tempfile.TemporaryDirectory(prefix="thalweg-")
    if len(folder.name) > MAX_FOLDER_LENGTH:  # TMPDIR lies deep
        folder.cleanup()
        folder = tempfile.TemporaryDirectory(prefix="thalweg-", dir="/tmp")
    return folder
