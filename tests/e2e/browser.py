"""A page in headless Chromium, driven over the DevTools protocol through a pipe: no driver and no package needed."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --hide-scrollbars --window-size=900,700 --remote-debugging-pipe"
)


class Page:
    """One tab. Methods of the protocol by name; scripts see the page's globals. `on` {event: what hears of it}; it may
    `send`, and not `call`."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._rest, self._id = read, write, b"", 0
        self._session: str | None = None
        self.on: dict[str, Callable[[dict[str, Any]], None]] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def send(self, method: str, **params: Any) -> int:
        """Without waiting for the reply; its id."""
        self._id += 1
        message = {"id": self._id, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        return self._id

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = self.send(method, **params)
        while True:
            reply = self._next()
            if (heard := self.on.get(reply.get("method", ""))) is not None:
                heard(reply["params"])
            if reply.get("id") == number:
                assert "error" not in reply, reply
                found: dict[str, Any] = reply["result"]
                return found

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            got = os.read(self._read, 1 << 16)
            assert got, "the browser is gone"
            self._rest += got
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        reply = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def wait(self, condition: str, seconds: float = 30) -> None:
        until = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < until, f"not true after {seconds} s: {condition}"
            time.sleep(0.05)

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """Skips where Chromium is not installed; `folder` holds its profile."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium, which is not installed")
    to_browser, from_browser = os.pipe(), os.pipe()
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_browser[0], from_browser[1])]  # out of the way of 3, 4

    def connect() -> None:
        os.dup2(ends[0], 3)
        os.dup2(ends[1], 4)

    process = subprocess.Popen(
        [program, *FLAGS.split(), f"--user-data-dir={folder}"],
        close_fds=False,  # Python's own are closed anyway, but these two
        preexec_fn=connect,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    for end in ends:
        os.close(end)
    os.close(to_browser[0])
    os.close(from_browser[1])
    try:
        yield Page(from_browser[0], to_browser[1])
    finally:
        process.kill()
        process.wait()
        os.close(to_browser[1])
        os.close(from_browser[0])
