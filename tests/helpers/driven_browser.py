"""A headless chromium, driven as by a person: keys, clicks, sizes, and all that the page said and asked for.

Over chromium's own protocol, on a websocket of the loopback address; it is ended by its process id.
"""

import asyncio
import base64
import itertools
import json
import subprocess
import time
import urllib.request
from pathlib import Path

from helpers.browser import CHROMIUM

KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "Home": 36, "End": 35, "Enter": 13}
QUIET = "background-networking component-update sync default-apps extensions gpu breakpad"


class DrivenBrowser:
    """One page, from `with DrivenBrowser(folder) as page:`.

    Attributes:
        said: what its console and chromium's log held of it, errors and violated policies included.
        requests: every address that it asked for, websockets included.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.said: list[str] = []
        self.requests: list[str] = []
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future] = {}

    def __enter__(self) -> "DrivenBrowser":
        profile = self.folder / "profile"
        self._process = subprocess.Popen(
            [
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--no-first-run",
                *(f"--disable-{what}" for what in QUIET.split()),
                "--remote-debugging-port=0",
                "--remote-debugging-address=127.0.0.1",
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._loop = asyncio.new_event_loop()
        try:
            told = profile / "DevToolsActivePort"
            _until(lambda: told.exists() and told.read_text().count("\n"), 60)
            port = told.read_text().split()[0]
            pages = []

            def found() -> bool:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
                    pages[:] = [one for one in json.load(answer) if one["type"] == "page"]
                return bool(pages)

            _until(found, 30)
            self._loop.run_until_complete(self._connect(pages[0]["webSocketDebuggerUrl"]))
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if hasattr(self, "_reader"):
                self._reader.cancel()
                self._socket.close()
                self._loop.run_until_complete(asyncio.sleep(0.1))
        finally:  # whatever is left of the connection
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._loop.close()

    def call(self, method: str, **given: object) -> dict:
        """A command of the protocol, and its answer."""
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, given), 60))

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.wait_for(f"location.href.startsWith({address!r}) && document.readyState === 'complete'")

    def size(self, width: int, height: int, *, phone: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)

    def dark(self, wanted: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if wanted else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def value(self, script: str) -> object:
        """What a line of script gives in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def text(self, name: str) -> str:
        """The text of an element, by its id."""
        return str(self.value(f"document.getElementById({name!r}).textContent"))

    def wait_for(self, script: str, seconds: float = 120) -> object:
        """Waits until a line of script is true in the page."""
        end = time.monotonic() + seconds
        while not (found := self.value(script)):
            assert time.monotonic() < end, (
                f"not within {seconds} s: {script}\nthe page: {self.value('document.body.innerText')}\n{self.said}"
            )
            self._loop.run_until_complete(asyncio.sleep(0.03))
        return found

    def click(self, name: str) -> None:
        """A click of the mouse on the middle of an element."""
        x, y = self.value(
            f"(() => {{ const e = document.getElementById({name!r}); e.scrollIntoView({{block: 'center'}}); "
            "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, name: str, key: str, times: int = 1) -> None:
        """A key of the keyboard, on an element."""
        self.value(f"document.getElementById({name!r}).focus()")
        for _ in range(times):
            for kind in ("rawKeyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def write(self, name: str, text: str) -> None:
        """Put a text into a field in the place of what is there."""
        self.value(f"(() => {{ const e = document.getElementById({name!r}); e.focus(); e.select(); }})()")
        self.call("Input.insertText", text=text)

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """A PNG of the page."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(answer["data"]))

    async def _connect(self, address: str) -> None:
        from tornado.websocket import websocket_connect

        self._socket = await websocket_connect(address, max_message_size=1 << 28)
        self._reader = self._loop.create_task(self._read())

    async def _read(self) -> None:
        while (message := await self._socket.read_message()) is not None:
            said = json.loads(message)
            if "id" in said:
                self._answers.pop(said["id"]).set_result(said)
            else:
                self._heard(said["method"], said["params"])

    async def _call(self, method: str, given: dict) -> dict:
        number = next(self._ids)
        self._answers[number] = self._loop.create_future()
        await self._socket.write_message(json.dumps({"id": number, "method": method, "params": given}))
        answer = await self._answers[number]
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _heard(self, method: str, params: dict) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Network.webSocketCreated":
            self.requests.append(params["url"])
        elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.said.append(f"{method}: {json.dumps(params)[:500]}")


def _until(found, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if found():
                return
        except OSError:
            pass
        assert time.monotonic() < end, f"chromium did not come within {seconds} s"
        time.sleep(0.05)
