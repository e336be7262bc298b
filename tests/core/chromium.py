"""A headless Chromium that tests drive by its own protocol, over a pipe and without a package.

https://chromedevtools.github.io/devtools-protocol/: messages are JSON, each ended by a zero byte.
"""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path

PROGRAM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)
PATIENCE = 30
"""Seconds to wait for an answer."""


class Chromium:
    """A browser with one page; a context manager. ``requests`` and ``complaints`` fill as it runs.

    Complaints are errors and warnings of the page: exceptions, its console, its security policy.
    """

    def __init__(self, profile: Path) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._profile, self._numbers = profile, itertools.count(1)
        self._read = b""
        self._events: list[str] = []
        self._session = None

    def __enter__(self) -> Chromium:
        theirs_in, self._out = _pipe()
        self._in, theirs_out = _pipe()
        flags = [
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--disable-sync", "--hide-scrollbars", "--force-color-profile=srgb"),
            *("--remote-debugging-pipe", f"--user-data-dir={self._profile}", "about:blank"),
        ]
        log = os.open(self._profile.with_suffix(".log"), os.O_WRONLY | os.O_CREAT, 0o600)
        self._process = os.posix_spawn(
            PROGRAM,
            [PROGRAM, *flags],
            dict(os.environ),
            file_actions=[
                (os.POSIX_SPAWN_DUP2, theirs_in, 3),
                (os.POSIX_SPAWN_DUP2, theirs_out, 4),
                (os.POSIX_SPAWN_DUP2, log, 1),
                (os.POSIX_SPAWN_DUP2, log, 2),
            ],
            setpgroup=0,
        )
        for end in (theirs_in, theirs_out, log):
            os.close(end)
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = session
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.tell(f"{domain}.enable")
        return self

    def __exit__(self, *_) -> None:
        try:
            os.killpg(self._process, signal.SIGKILL)
        finally:
            os.waitpid(self._process, 0)
            os.close(self._in)
            os.close(self._out)

    def tell(self, method: str, **parameters):
        """Send a command, and give what it answers."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        rest = json.dumps(message).encode() + b"\0"
        while rest:
            rest = rest[os.write(self._out, rest) :]
        while (answer := self._next()).get("id") != number:
            self._notice(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def open(self, url: str) -> None:
        """Go to a page, and wait until it is loaded."""
        self._events.clear()
        self.tell("Page.navigate", url=url)
        while "Page.loadEventFired" not in self._events:
            self._notice(self._next())

    def look(self, expression: str):
        """The value of an expression in the page; promises are awaited."""
        found = self.tell(
            "Runtime.evaluate",
            expression=expression,
            returnByValue=True,
            awaitPromise=True,
            userGesture=True,
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until an expression in the page is true."""
        ends = time.monotonic() + PATIENCE
        while not self.look(expression):
            assert time.monotonic() < ends, f"never true: {expression}"
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        """Click on the middle of an element with the mouse; it must not be covered."""
        x, y, hit = self.look(
            f"""(() => {{
              const wanted = document.querySelector({json.dumps(selector)});
              if (!wanted) return [0, 0, "there is no such element"];
              wanted.scrollIntoView({{block: "center", inline: "center"}});
              const box = wanted.getBoundingClientRect();
              const x = box.x + box.width / 2, y = box.y + box.height / 2;
              const top = document.elementFromPoint(x, y);
              const fine = top && (wanted.contains(top) || top.contains(wanted));
              return [x, y, fine ? "" : `covered by ${{top && top.outerHTML.slice(0, 200)}}`];
            }})()"""
        )
        assert not hit, f"{selector}: {hit}"
        for kind in ("mousePressed", "mouseReleased"):
            self.tell("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Press a key: Tab, Enter or Space."""
        code = {"Tab": 9, "Enter": 13, "Space": 32}[key]
        text = {"Enter": "\r", "Space": " "}.get(key, "")
        named = {"key": " " if key == "Space" else key, "windowsVirtualKeyCode": code}
        self.tell("Input.dispatchKeyEvent", type="keyDown", code=key, text=text, **named)
        self.tell("Input.dispatchKeyEvent", type="keyUp", code=key, **named)

    def size(self, width: int, height: int) -> None:
        """Make the window as large, in pixels."""
        self.tell(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def prefer(self, scheme: str) -> None:
        """Let the reader prefer ``light`` or ``dark``."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.tell("Emulation.setEmulatedMedia", features=features)

    def picture(self, path: Path) -> Path:
        """A screenshot of what the window shows, as PNG."""
        shot = self.tell("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def _notice(self, event) -> None:
        method, told = event.get("method", ""), event.get("params", {})
        self._events.append(method)
        if method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(told["exceptionDetails"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(told["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(str(told["args"]))

    def _next(self):
        ends = time.monotonic() + PATIENCE
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._in], [], [], max(ends - time.monotonic(), 0))
            assert ready, f"Chromium said nothing for {PATIENCE} seconds"
            part = os.read(self._in, 1 << 20)
            log = self._profile.with_suffix(".log")
            assert part, f"Chromium ended: {log.read_text(errors='replace')[-2000:]}"
            self._read += part
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)


def _pipe() -> tuple[int, int]:
    """A pipe whose ends are not among those numbers that the browser takes its own by."""
    ends = os.pipe()
    moved = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return moved
