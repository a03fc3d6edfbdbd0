"""A headless Chromium, which a pipe controls by its own protocol, without a driver or a further package."""

import base64
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
from typing import Any, Self

import pytest

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(not PROGRAM, reason="looks at pages in Chromium: apt-get install chromium")


class Browser:
    """One page, as a context manager. `events` has exceptions, lines of console and log, and requests of the page."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._number = 0

    def __enter__(self) -> Self:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        pipes = f"exec 3<&{theirs_in} 4>&{theirs_out}; exec "
        flags = f"--headless --no-sandbox --disable-gpu --remote-debugging-pipe --user-data-dir={self._profile.name} about:blank"
        quiet: Any = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(theirs_in, theirs_out))
        self._process = subprocess.Popen(["bash", "-c", f"{pipes}{PROGRAM} {flags}"], **quiet)
        os.close(theirs_in)
        os.close(theirs_out)
        self._read, self._session = os.fdopen(self._in, "rb"), None
        targets = self._call("Target.getTargets")["targetInfos"]
        page = next(t["targetId"] for t in targets if t["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._out)
        self._read.close()
        self._process.kill()
        self._process.wait()
        self._profile.cleanup()

    def open(self, page: pathlib.Path, state: str = "", *, width: int = 1200, dark: bool = False) -> None:
        """Opens a page anew, with `state` after the # of its address."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._call("Page.navigate", url="about:blank")
        self._until("Page.loadEventFired")
        self.events.clear()
        self._call("Page.navigate", url=page.as_uri() + (f"#{state}" if state else ""))
        self._until("Page.loadEventFired")

    def run(self, script: str) -> Any:
        """Returns the value of an expression in the page."""
        result = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def said(self) -> list[str]:
        """Returns exceptions, lines of the console and of the log, and requests for anything but the page itself."""
        self.run("new Promise(done => setTimeout(done, 50))")
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Network.requestWillBeSent")
        found = [event for event in self.events if event["method"] in kinds]
        own = lambda event: (
            event["params"].get("type") == "Document" and event["params"]["request"]["url"].startswith("file:")
        )
        return [json.dumps(event["params"])[:500] for event in found if not own(event)]

    def picture(self, path: pathlib.Path) -> None:
        """Writes a PNG of the whole page."""
        size = self._call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 8000), "scale": 1}
        data = self._call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        path.write_bytes(base64.b64decode(data))

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (reply := self._next()).get("id") != self._number:
            pass
        assert "error" not in reply, reply
        return reply["result"]

    def _until(self, method: str) -> None:
        while not any(event["method"] == method for event in self.events):
            self._next()
        self.events = [event for event in self.events if event["method"] != method]

    def _next(self) -> dict[str, Any]:
        content = bytearray()
        while (byte := self._read.read(1)) != b"\0":
            assert byte, "Chromium has ended."
            content += byte
        message = json.loads(content)
        if "method" in message:
            self.events.append(message)
        return message
