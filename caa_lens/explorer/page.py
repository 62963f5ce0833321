"""The explorer as a page of this machine: `caa-lens explore sentiment.safetensors`.

On Tornado: it needs no other package, serves pages and websockets on the event loop that the texts are written on, and
Jupyter's kernels are built upon it, so that whoever has a notebook has it. Libraries of ready-made elements (NiceGUI,
Gradio, Panel, Voila) bring 10 to 38 packages more, and scripts of their own whose requests would have to be watched;
what is special here, two texts that grow token by token in colours, they leave to be written by hand.

The server listens on the loopback address only. It answers nobody who calls it by another name than that address's, and
websockets only of its own page, so that a page elsewhere in the browser cannot use it. The page's own policy
forbids it to ask anything of any other place.
"""

import asyncio
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from caa_lens.arguments import check_count, describe
from caa_lens.explorer.session import Asked, Coloured, Event, Finished, LensRead, Piece, Session
from caa_lens.explorer.shown import NOT_READ, end_html, legend_html, lens_html, piece_html, text_html, title_of
from caa_lens.explorer.turns import Said, Turns
from caa_lens.extras import needed_for

with needed_for("the explorer's page", extra="explore"):
    from jinja2 import Environment
    from tornado.httpserver import HTTPServer
    from tornado.web import Application, HTTPError, RequestHandler
    from tornado.websocket import WebSocketClosedError, WebSocketHandler

LOOPBACK = "127.0.0.1"
OWN_NAMES = (LOOPBACK, "localhost")
PORT = 8712
LARGEST_MESSAGE = 1 << 20
FIRST_PROMPT = "How was your day?"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src data:; "
    "connect-src 'self' ws://{0}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
WORDS = {str: "text", bool: "yes or no"}
KINDS = {"explorer.css": "text/css", "explorer.js": "text/javascript"}


def serve(session: Session, *, port: int = PORT, started: Callable[[str], None] | None = None) -> None:
    """Serve the page until it is interrupted. Not for notebooks, whose event loop runs already: there, `explore`.

    Args:
        session: what the page shows.
        port: of the loopback address; 0 takes any that is free.
        started: called with the page's address when it can be opened.

    Raises:
        OSError: if the port is taken.
    """
    if not isinstance(session, Session):
        raise TypeError(f"expected a Session, got {describe(session)}: serve(Session(model, vectors))")
    port = check_count("port", port, least=0)
    if port > 65535:
        raise ValueError(f"port must be at most 65535, got {port}")
    asyncio.run(_serve(session, port, started))


async def _serve(session: Session, port: int, started: Callable[[str], None] | None) -> None:
    listening = listen(port)
    server = HTTPServer(application(session), max_body_size=LARGEST_MESSAGE)
    server.add_socket(listening)
    if started is not None:
        started(f"http://{LOOPBACK}:{listening.getsockname()[1]}")
    try:
        await asyncio.Event().wait()
    finally:
        session.stop()
        server.stop()


def listen(port: int) -> socket.socket:
    """A socket of the loopback address. Raises `OSError` if its port cannot be had."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere it would share a port that is in use
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setblocking(False)
        listening.bind((LOOPBACK, port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise OSError(
            f"port {port} cannot be used ({error.strerror}): is an explorer open already? choose another one, 0 for any"
        ) from None
    return listening


def application(session: Session) -> Application:
    """The page, its two files, and the websocket that its texts come through."""
    shared = {"turns": Turns(session)}
    return Application(
        [(r"/", _Page, shared), (r"/(explorer\.(?:css|js))", _File), (r"/texts", _Texts, shared)],
        websocket_max_message_size=LARGEST_MESSAGE,
        log_function=lambda handler: None,
    )


class _Own(RequestHandler):
    """Answers only whoever came by the loopback address's own name, and lets no page ask anything of other places."""

    def prepare(self) -> None:
        if self.request.host_name not in OWN_NAMES:
            raise HTTPError(403, reason="Only by 127.0.0.1 or localhost")

    def set_default_headers(self) -> None:
        self.set_header("Content-Security-Policy", POLICY.format(self.request.host))
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Referrer-Policy", "no-referrer")
        self.set_header("Cache-Control", "no-store")
        self.clear_header("Server")


class _Page(_Own):
    def initialize(self, turns: Turns) -> None:
        self.turns = turns

    def get(self) -> None:
        self.finish(page_html(self.turns.session))


class _File(_Own):
    def get(self, name: str) -> None:
        self.set_header("Content-Type", f"{KINDS[name]}; charset=utf-8")
        self.finish(_template(name))


class _Texts(WebSocketHandler):
    """One window: what it asks for, and what it is told."""

    def initialize(self, turns: Turns) -> None:
        self.turns = turns

    def prepare(self) -> None:
        if self.request.host_name not in OWN_NAMES:
            raise HTTPError(403)

    def on_message(self, message: str | bytes) -> None:
        told = Telling(self._send)
        try:
            asked = _asked(message)
        except (ValueError, TypeError) as error:
            told(Said(kind="error", text=str(error)))
            return
        if asked is None:
            self.turns.stop(self)
        else:
            told.asked = asked
            self.turns.ask(self, asked, told)

    def on_close(self) -> None:
        self.turns.stop(self)

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self.write_message(json.dumps(message))
        except WebSocketClosedError:  # the window is gone, and `on_close` stops its text
            return


@dataclass(slots=True)
class Telling:
    """What a window is told, as messages that its script puts into the page."""

    send: Callable[[dict[str, Any]], None]
    asked: Asked | None = None
    ends: dict[str, str] = field(default_factory=dict)
    reading: bool = False

    def __call__(self, event: Event | Said) -> None:
        match event:
            case Piece(side=side):
                self.send({"kind": "piece", "side": side, "html": piece_html(event)})
            case Finished(side=side):
                self.ends[side] = end_html(event)
                self.send({"kind": "piece", "side": side, "html": self.ends[side]})
            case Coloured(side=side):
                html = text_html(event) + self.ends.get(side, "")
                self.send({"kind": "text", "side": side, "html": html, "legend": legend_html(event)})
            case LensRead(lens=lens):
                self.reading = lens is None
                self.send({"kind": "lens", "html": lens_html(event)})
            case Said(kind="begun"):
                asked = self.asked
                title = "" if asked is None else title_of("steered", asked.layer, asked.multiplier)
                self.send({"kind": "begun", "title": title})
            case Said(kind=kind, text=text):
                if kind == "done" and self.reading:
                    self.send({"kind": "lens", "html": NOT_READ})
                self.send({"kind": kind, "text": text})


def page_html(session: Session) -> str:
    """The page, without any text yet."""
    layers = list(session.layers)
    low, high = session.multipliers
    return Environment(autoescape=True).from_string(_template("explorer.html")).render(
        session=session,
        layers=layers,
        first_layer=layers.index(session.middle_layer),
        number=lambda value: f"{value:+g}".replace("-", "−"),
        low=low,
        high=high,
        first_multiplier=min(max(1.0, low), high),
        first_tokens=min(60, session.max_new_tokens),
        first_prompt=FIRST_PROMPT,
    )  # fmt: skip


def _asked(message: str | bytes) -> Asked | None:
    """What a window's script asks for, or None to stop. Every number is checked by the session, by its own limits."""
    try:
        said = json.loads(message)
        if not isinstance(said, dict):
            raise ValueError
    except ValueError:
        raise ValueError("the page sent something that is no message: reload it") from None
    if said.pop("kind", None) == "stop":
        return None
    number = float | int
    wanted: dict[str, Any] = {"prompt": str, "layer": int, "multiplier": number, "max_new_tokens": int}
    wanted |= {"temperature": number, "lens": bool}
    for name, kind in wanted.items():
        if not isinstance(said.get(name), kind) or isinstance(said[name], bool) != (kind is bool):
            raise ValueError(f"{name.replace('_', ' ')} is not a {WORDS.get(kind, 'number')}: reload the page")
    return Asked(**{name: said[name] for name in wanted})


@cache
def _template(name: str) -> str:
    return (files("caa_lens.explorer") / "templates" / name).read_text(encoding="utf-8")
