"""Pages of this machine as pictures, by a headless Chromium that is spoken to through a pipe; no more packages."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
)
SECONDS = 60
SHORTEST, TALLEST = 100, 16_000
"""Pixels of a picture: Chromium draws no taller ones."""


def program() -> str | None:
    """Return the path of Chromium, if it is there."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Chromium:
    """One browser with one page. A context manager."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._owned = ExitStack()
        self._number = 0
        self._heard = bytearray()
        self._session: str | None = None

    def __enter__(self) -> Self:
        profile = self._owned.enter_context(tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True))
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # It reads descriptor 3 and writes descriptor 4; a shell puts the two there.
        command = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, self._path, *QUIET, "--remote-debugging-pipe", f"--user-data-dir={profile}"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._out = self._owned.enter_context(os.fdopen(ours_out, "wb", buffering=0))
        self._in = self._owned.enter_context(os.fdopen(ours_in, "rb", buffering=0))
        self._owned.callback(self._stop)
        page = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self._ask("Page.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._owned.close()

    def _stop(self) -> None:
        self._process.terminate()
        self._process.wait(SECONDS)

    def shoot(self, page: Path, picture: Path, width: int, *, dark: bool = False, media: str = "screen") -> None:
        """The whole page as a PNG."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self._size(width, SHORTEST)
        self._open(page)
        whole = int(self._ask("Page.getLayoutMetrics")["cssContentSize"]["height"])
        self._size(width, min(max(SHORTEST, whole), TALLEST))
        shot = self._ask("Page.captureScreenshot", format="png")
        _write(picture, shot["data"])

    def print_page(self, page: Path, paper: Path) -> None:
        """The page as it is printed, as PDF."""
        self._ask("Emulation.setEmulatedMedia", media="", features=[])
        self._open(page)
        _write(paper, self._ask("Page.printToPDF", preferCSSPageSize=True, printBackground=False)["data"])

    def _size(self, width: int, height: int) -> None:
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def _open(self, page: Path) -> None:
        self._ask("Page.navigate", url=page.absolute().as_uri())
        self._hear(lambda said: said.get("method") == "Page.loadEventFired")

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        answer = self._hear(lambda said: said.get("id") == number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _hear(self, fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The next message that fits; what comes before it is of no use here."""
        while True:
            while b"\0" not in self._heard:
                more = self._in.read(1 << 16)
                if not more:
                    raise RuntimeError(f"{self._path} ended")
                self._heard += more
            message, _, rest = self._heard.partition(b"\0")
            self._heard = bytearray(rest)
            found: dict[str, Any] = json.loads(message)
            if fits(found):
                return found


def _write(path: Path, data: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(base64.b64decode(data))
