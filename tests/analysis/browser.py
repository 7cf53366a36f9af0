"""A headless Chromium, spoken to over a pipe: what it shows of a page, and what it complains about."""

import base64
import fcntl
import io
import json
import os
import select
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_COMPLAINTS = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
_TIMEOUT_SECONDS = 60

_LOOK = """(() => {
  const at = box => ({x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height});
  const plots = [...document.querySelectorAll('figure svg')].map(svg => ({
    ...at(svg.getBoundingClientRect()),
    longestPath: Math.max(0, ...[...svg.querySelectorAll('g[clip-path] path, path[clip-path]')].map(
      path => path.getTotalLength())),
    lowestText: Math.min(...[...svg.querySelectorAll('text')].map(text => text.getBoundingClientRect().height)),
  }));
  return {viewport: innerWidth, page: document.documentElement.scrollWidth, plots,
          text: document.body.innerText};
})()"""


@dataclass(frozen=True)
class View:
    """A page as shown: `pixels` are RGB from 0 to 1, `complaints` what the console holds, `requests` what it asked for.
    `look` is what `_LOOK` returns."""

    look: dict[str, Any]
    pixels: np.ndarray
    complaints: list[str]
    requests: list[str]

    def pixels_of(self, plot: dict[str, float]) -> np.ndarray:
        top, left = int(plot["y"]), int(plot["x"])
        return self.pixels[top : top + int(plot["height"]), left : left + int(plot["width"])]


def find_chromium() -> str:
    """Returns its path; without one the test is skipped, and in CI it fails."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        missing = "no Chromium to open a page with: apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return found


class Browser:
    """A context manager; the profile goes into `folder`."""

    def __init__(self, folder: Path):
        self._next_id = 0
        self._events: list[dict[str, Any]] = []
        self._unread = b""
        commands_in, self._commands = os.pipe()
        self._answers, answers_out = os.pipe()
        # Chromium reads descriptor 3 and writes 4: out of their way with ours, for the shell to put them there.
        ours = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10) for descriptor in (commands_in, answers_out)]
        os.close(commands_in)
        os.close(answers_out)
        options = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={folder}", "--hide-scrollbars"]
        options += ["--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking"]
        if os.geteuid() == 0:
            options.append("--no-sandbox")  # which refuses to run as root
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{ours[0]} 4>&{ours[1]}', "bash", find_chromium(), *options],
            pass_fds=ours,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for descriptor in ours:
            os.close(descriptor)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=_TIMEOUT_SECONDS)
        os.close(self._commands)
        os.close(self._answers)

    def show(self, page: Path, *, width: int, dark: bool) -> View:
        """Returns the page in a window of its own, as a phone shows it where the width is that of one."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._events.clear()
        for domain in ("Log", "Runtime", "Page", "Network"):
            self._call(f"{domain}.enable", session)
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", session, **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", session, features=[scheme])
        self._call("Page.navigate", session, url=page.absolute().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._read())
        look = self._call("Runtime.evaluate", session, expression=_LOOK, returnByValue=True)["result"]["value"]
        shot = self._call("Page.captureScreenshot", session, captureBeyondViewport=True)["data"]
        pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(shot)), format="png")[..., :3]
        complaints = [json.dumps(event["params"]) for event in self._events if event["method"] in _COMPLAINTS]
        sent = [event for event in self._events if event["method"] == "Network.requestWillBeSent"]
        self._call("Target.closeTarget", targetId=target)
        return View(look, pixels, complaints, [event["params"]["request"]["url"] for event in sent])

    def _call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._next_id += 1
        message = {"id": self._next_id, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._next_id:
                assert "error" not in answer, answer
                return answer["result"]
            self._events.append(answer)

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "Chromium does not answer"
            piece = os.read(self._answers, 1 << 20)
            assert piece, "Chromium ended"
            self._unread += piece
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)
