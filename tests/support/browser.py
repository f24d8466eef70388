"""`Browser`: a headless Chromium that opens a page, runs JavaScript in it and takes pictures of it.

It is driven by the DevTools protocol over two pipes, JSON messages that end with a zero byte, so
nothing has to be installed beside Chromium itself.
"""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["CHROMIUM", "Browser", "eventually"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")

# All text of a page, through the shadow roots of web components.
_TEXT = """
(() => {
  const parts = [];
  const walk = (node) => {
    if (node.nodeType === Node.TEXT_NODE) { parts.push(node.textContent); return; }
    if (["STYLE", "SCRIPT", "TEMPLATE"].includes(node.nodeName)) return;
    if (node.shadowRoot) walk(node.shadowRoot);
    node.childNodes.forEach(walk);
  };
  walk(document.body);
  return parts.map((part) => part.trim()).filter(Boolean).join("\\n");
})()
"""


def eventually(look: Callable[[], Any], *, seconds: float = 240.0, pause: float = 0.25) -> Any:
    """Return the first true result of ``look``, or its last one when the time is over."""
    until = time.monotonic() + seconds
    while not (found := look()) and time.monotonic() < until:
        time.sleep(pause)
    return found


class Browser:
    """One page of a headless Chromium; a context manager.

    Args:
        profile: Directory of its own for the browser's files.
        size: Width and height of the page in pixels.
    """

    def __init__(self, profile: Path, *, size: tuple[int, int] = (1280, 900)) -> None:
        assert CHROMIUM is not None
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        flags = (
            "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
            "--disable-extensions --disable-background-networking --hide-scrollbars"
        )

        def pipes() -> None:  # Chromium reads messages from 3 and writes them to 4
            high = os.dup(from_browser), os.dup(to_browser)
            os.dup2(high[1], 3)
            os.dup2(high[0], 4)

        self._process = subprocess.Popen(
            [CHROMIUM, *flags.split(), f"--user-data-dir={profile}", "--remote-debugging-pipe",
             f"--window-size={size[0]},{size[1]}", "about:blank"],
            preexec_fn=pipes,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._pending, self._count = b"", 0
        targets = self._ask("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        attached = self._ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session: str | None = attached["sessionId"]

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        os.close(self._write)
        os.close(self._read)

    def open(self, url: str) -> None:
        """Go to a page, also from another part of itself; returns before it is complete."""
        self._ask("Page.navigate", url="about:blank")
        self._ask("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        answer = self._ask("Runtime.evaluate", expression=script, returnByValue=True)
        return answer["result"].get("value")

    def text(self) -> str:
        """Return the text of the page, one piece a line, with that of web components."""
        return str(self.run(_TEXT) or "")

    def picture(self, path: Path) -> None:
        """Write what the page shows as a PNG file."""
        path.write_bytes(base64.b64decode(self._ask("Page.captureScreenshot")["data"]))

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if session := getattr(self, "_session", None):
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._pending:
            data = os.read(self._read, 1 << 20)
            assert data, "Chromium has ended"
            self._pending += data
        message, self._pending = self._pending.split(b"\0", 1)
        answer: dict[str, Any] = json.loads(message)
        return answer
