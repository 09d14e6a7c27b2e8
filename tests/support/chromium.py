"""A headless Chromium, driven by its DevTools protocol over two pipes."""

import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PATH = shutil.which("chromium") or shutil.which("chromium-browser")
_TIMEOUT_S = 30
# It reads from descriptor 3 and writes to 4, whichever ours are.
_LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
    "os.execv(sys.argv[3], sys.argv[3:])"
)


class Tab:
    """One page. wrong: what it complained of, and what it threw, so far."""

    def __init__(self, process: subprocess.Popen, into: int, out: int):
        self._process, self._into, self._out = process, into, out
        self._ids, self._rest = itertools.count(1), b""
        self._session: str | None = None
        self.wrong: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def open(self, url: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Begins to load a page, in a window of this size."""
        mobile = width < 600
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """Of some JavaScript; of a promise, what comes of it."""
        told = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def until(self, expression: str) -> None:
        """Waits until some JavaScript is true, looking every 50 ms."""
        deadline = time.monotonic() + _TIMEOUT_S
        # What a page has that has not loaded yet is null, and an error here would never answer.
        tried = f"try {{ done(Boolean({expression})) }} catch {{ done(false) }}"
        look = f"new Promise(done => setTimeout(() => {{ {tried} }}, 50))"
        while not self.value(look):
            assert time.monotonic() < deadline, f"{expression} is not so; {self.wrong}"

    def type(self, selector: str, text: str) -> None:
        """Puts text into a field, in place of what is there."""
        self.value(f"document.querySelector({selector!r}).select()")
        self.call("Input.insertText", text=text)

    def picture(self, path: Path) -> None:
        """Writes the whole page to a PNG file."""
        told = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(b64decode(told["data"]))

    def call(self, method: str, **params: Any) -> Any:
        """See the protocol. Raises AssertionError for what it refuses."""
        id, message = next(self._ids), {"method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._into, json.dumps(message | {"id": id}).encode() + b"\0")
        while (said := self._read()).get("id") != id:
            self._note(said)
        assert "error" not in said, f"{method}: {said['error']}"
        return said["result"]

    def _note(self, said: dict[str, Any]) -> None:
        params = said.get("params", {})
        if said["method"] == "Runtime.exceptionThrown":
            self.wrong.append(params["exceptionDetails"]["exception"]["description"])
        elif said["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.wrong.append(params["entry"]["text"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._out], [], [], _TIMEOUT_S)
            assert ready, "the browser does not answer"
            read = os.read(self._out, 1 << 20)
            assert read, f"the browser has ended: {self._process.poll()}"
            self._rest += read
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def browsing(profile: Path) -> Iterator[Tab]:
    """A browser with one page, which ends with the block. profile: a folder for what it keeps."""
    assert PATH
    (their_in, into), (out, their_out) = os.pipe(), os.pipe()
    # Above 3 and 4, which would be lost to each other.
    theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (their_in, their_out)]
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    flags += ["--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        [sys.executable, "-c", _LAUNCH, *map(str, theirs), PATH, *flags, "about:blank"],
        pass_fds=theirs,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for fd in (their_in, their_out, *theirs):
        os.close(fd)
    try:
        tab = Tab(process, into, out)
        yield tab
        tab._session = None
        tab.call("Browser.close")
        process.wait(_TIMEOUT_S)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(into)
        os.close(out)
