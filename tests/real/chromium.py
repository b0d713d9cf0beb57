"""Chromium without a window, driven by the Chrome DevTools protocol over its websocket."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Self

from tornado.websocket import WebSocketClientConnection, websocket_connect

from tests.support.wire import within

CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
# A browser is a slow starter on a busy machine.
TIMEOUT = 30.0


class Chromium:
    """A browser with one page.

    ::

        async with Chromium(tmp_path) as page:
            await page.open("http://127.0.0.1:8888/")
            await page.until("document.title === 'done'")
    """

    def __init__(self, directory: Path, *arguments: str) -> None:
        self._directory = directory
        self._arguments = arguments
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        # What the page complained about: uncaught exceptions, errors on its console.
        self.complaints: list[str] = []

    async def __aenter__(self) -> Self:
        assert CHROMIUM is not None
        profile = self._directory / "profile"
        self._log = (self._directory / "chromium.log").open("w+b")
        self._process = subprocess.Popen(
            [
                *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"),
                *(f"--user-data-dir={profile}", "--no-first-run", "--disable-background-networking"),
                *("--disable-dev-shm-usage", "--disable-component-update", "--no-proxy-server"),
                *("--window-size=1280,1600", *self._arguments, "about:blank"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, "HOME": str(self._directory)},
        )
        try:
            port, path = await within(self._address(profile / "DevToolsActivePort"), "chromium's start", TIMEOUT)
            # Bodies of pictures are large.
            self._socket: WebSocketClientConnection = await within(
                websocket_connect(f"ws://127.0.0.1:{port}{path}", max_message_size=64 * 1024 * 1024),
                "the connection to chromium",
                TIMEOUT,
            )
            self._reader = asyncio.ensure_future(self._read())
            self._session: str | None = None
            targets = (await self.call("Target.getTargets"))["targetInfos"]
            page = next(target for target in targets if target["type"] == "page")
            attached = await self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log"):
                await self.call(f"{domain}.enable")
        except BaseException:
            await self._end()
            raise
        return self

    async def _address(self, file: Path) -> tuple[int, str]:
        """Return where it listens; it says so in a file, as the port was its own choice."""
        while True:
            assert self._process.poll() is None, f"chromium ended: {(self._directory / 'chromium.log').read_text()}"
            lines = file.read_text().split("\n") if file.exists() else []
            if len(lines) == 2:
                return int(lines[0]), lines[1]
            await asyncio.sleep(0.02)

    async def __aexit__(self, *_: object) -> None:
        try:
            self._session = None
            await self.call("Browser.close")
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
            self._socket.close()
        finally:
            await self._end()

    async def _end(self) -> None:
        try:
            await asyncio.to_thread(self._process.wait, 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        self._log.close()

    async def _read(self) -> None:
        while (text := await self._socket.read_message()) is not None:
            message = json.loads(text)
            if "id" in message:
                answer = self._answers.pop(message["id"])
                if not answer.done():  # nobody waits any more
                    answer.set_result(message)
            elif message["method"] == "Runtime.exceptionThrown":
                self.complaints.append(message["params"]["exceptionDetails"]["text"])
            elif message["method"] == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                entry = message["params"]["entry"]
                self.complaints.append(f"{entry['text']} {entry.get('url', '')}")

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        await self._socket.write_message(json.dumps(message))
        found = await within(answer, method, TIMEOUT)
        assert "error" not in found, f"{method}: {found['error']}"
        return found["result"]

    # The page

    async def open(self, url: str) -> None:
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete'")

    async def value(self, expression: str) -> Any:
        """Return the value of a JavaScript expression; a promise is awaited."""
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, f"{expression}: {found['exceptionDetails']}"
        return found["result"].get("value")

    async def until(self, expression: str, timeout: float = TIMEOUT) -> Any:
        """Return the value of `expression` once it is true, asking again and again."""
        try:
            async with asyncio.timeout(timeout):
                while not (found := await self.value(expression)):
                    await asyncio.sleep(0.02)
                return found
        except TimeoutError:
            said = await self.value("document.body.innerText")
            raise AssertionError(f"not within {timeout} s: {expression}; the page says {said!r}") from None

    async def text(self, selector: str) -> str:
        return str(await self.value(f"document.querySelector({json.dumps(selector)}).textContent"))

    async def click(self, selector: str) -> None:
        """Press and release the mouse in the middle of an element, as a user would."""
        await self.click_on(f"document.querySelector({json.dumps(selector)})")

    async def click_on(self, expression: str) -> None:
        """Click the element that a JavaScript expression finds, once it is there and nothing covers it."""
        place = f"""(() => {{
            const element = {expression};
            if (!element) return null;
            element.scrollIntoView({{ block: "center", behavior: "instant" }});
            const box = element.getBoundingClientRect();
            const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
            return element.contains(element.getRootNode().elementFromPoint(x, y)) ? [x, y] : null;
        }})()"""
        x, y = await self.until(place)
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def type(self, text: str) -> None:
        """Press a key for each character, where the focus is."""
        for character in text:
            await self._press(key=character, text=character)

    async def press_enter(self, *, shift: bool = False) -> None:
        await self._press(key="Enter", code="Enter", text="\r", windowsVirtualKeyCode=13, modifiers=8 if shift else 0)

    async def _press(self, *, text: str, **key: Any) -> None:
        await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **key)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    async def choose(self, selector: str, value: str) -> None:
        """Choose an option of a select element."""
        await self.value(
            f"""(() => {{
            const element = document.querySelector({json.dumps(selector)});
            element.value = {json.dumps(value)};
            element.dispatchEvent(new Event("change", {{ bubbles: true }}));
        }})()"""
        )

    async def attach(self, selector: str, file: Path) -> None:
        """Choose a file in an ``<input type=file>``."""
        found = await self.call("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")
        await self.call("DOM.setFileInputFiles", files=[str(file)], objectId=found["result"]["objectId"])

    async def screenshot(self, file: Path) -> None:
        """Save a picture of the whole page."""
        found = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(found["data"]))
