"""The explorer's page: only this machine reaches it, only its own script is obeyed, it asks for nothing else."""

import asyncio
import json
import re
import shutil
import socket
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from helpers.models import ROOT, random_vectors

import caa_lens as cl

pytest.importorskip("tornado", reason="needs tornado, of the extra explore")
from tornado.httpclient import AsyncHTTPClient
from tornado.httpserver import HTTPServer
from tornado.websocket import websocket_connect

from caa_lens.explorer import Session, page, serve

pytestmark = pytest.mark.one_kind
ASKED = {
    "kind": "write",
    "prompt": "How was your day?",
    "layer": 2,
    "multiplier": 3,
    "max_new_tokens": 20,
    "temperature": 0,
    "lens": True,
}


@pytest.fixture
def session(tiny_chat):
    return Session(tiny_chat, random_vectors(tiny_chat, layers=[1, 2]), controls=0, multipliers=(-3, 4))


def served(session, scene):
    """Runs a scene with the port of a page."""

    async def run():
        listening = page.listen(0)
        server = HTTPServer(page.application(session))
        server.add_socket(listening)
        try:
            return await scene(listening.getsockname()[1])
        finally:
            server.stop()
            await server.close_all_connections()
            await asyncio.sleep(0.2)  # so that clients see it and close, too

    return asyncio.run(run())


async def messages(connection, last="done"):
    found = []
    while not found or found[-1]["kind"] != last:
        said = await asyncio.wait_for(connection.read_message(), 60)
        assert said is not None, "the connection was closed"
        found.append(json.loads(said))
    return found


async def leave(connection):
    connection.close()
    while await asyncio.wait_for(connection.read_message(), 60) is not None:
        pass
    await asyncio.sleep(0.05)


async def status(port, path, **headers):
    """The code that a request with just these headers is answered with."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    line = await asyncio.wait_for(reader.readline(), 60)
    writer.close()
    await writer.wait_closed()
    return int(line.split()[1])


def plain(found, side):
    """The text that a window shows at last, without its marks."""
    import html

    whole = [one["html"] for one in found if one["kind"] == "text" and one["side"] == side][-1]
    return html.unescape(re.sub(r'<span class="cut">.*?</span>|<[^>]*>', "", whole))


def test_the_page_writes_what_generate_writes(session):
    async def scene(port):
        connection = await websocket_connect(f"ws://127.0.0.1:{port}/texts")
        await connection.write_message(json.dumps(ASKED))
        found = await messages(connection)
        await leave(connection)
        return found

    found = served(session, scene)
    options = {"max_new_tokens": 20}
    assert plain(found, "unsteered") == cl.generate(session.model, ASKED["prompt"], **options)
    steered = cl.generate(session.model, ASKED["prompt"], vectors=[(session.vectors[2], 3.0)], **options)
    assert plain(found, "steered") == steered
    assert found[0] == {"kind": "begun", "title": "Steered: layer 2, times +3.0"}
    assert "Layer 2" in [one for one in found if one["kind"] == "lens"][-1]["html"]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({**ASKED, "prompt": ""}, "the prompt is empty"),
        ({**ASKED, "prompt": "a" * 3000}, "has 3000 characters, at most 2000"),
        ({**ASKED, "layer": 0}, "no vector of layer 0"),
        ({**ASKED, "multiplier": -3.5}, "multiplier must be from -3 to 4"),
        ({**ASKED, "max_new_tokens": 10**9}, "max_new_tokens must be at most 200"),
        ({**ASKED, "layer": "2"}, "layer is not a number"),
        ({**ASKED, "multiplier": True}, "multiplier is not a number"),
        ({**ASKED, "lens": 1}, "lens is not a yes or no"),
        ({"kind": "write"}, "prompt is not a text"),
        ("no message", "the page sent something that is no message"),
        ([1], "the page sent something that is no message"),
    ],
)
def test_what_cannot_be_written_is_said_on_the_page(session, message, said):
    async def scene(port):
        connection = await websocket_connect(f"ws://127.0.0.1:{port}/texts")
        await connection.write_message(message if isinstance(message, str) else json.dumps(message))
        found = await messages(connection, last="error")
        await leave(connection)
        return found

    assert said in served(session, scene)[-1]["text"]


def test_a_window_that_is_closed_stops_its_text_and_another_one_may_write(session, monkeypatch):
    stopped, stop = [], session.stop
    monkeypatch.setattr(session, "stop", lambda: stopped.append(session.busy) or stop())

    async def scene(port):
        first = await websocket_connect(f"ws://127.0.0.1:{port}/texts")
        await first.write_message(json.dumps({**ASKED, "max_new_tokens": 200}))
        await messages(first, last="piece")
        second = await websocket_connect(f"ws://127.0.0.1:{port}/texts")
        await second.write_message(json.dumps(ASKED))
        (refused,) = await messages(second, last="error")
        assert not stopped
        await leave(first)
        while session.busy:
            await asyncio.sleep(0.01)
        assert stopped == [True]
        await second.write_message(json.dumps(ASKED))
        found = await messages(second)
        await leave(second)
        return refused, found

    refused, found = served(session, scene)
    assert "Another window's text" in refused["text"]
    assert plain(found, "unsteered") == cl.generate(session.model, ASKED["prompt"], max_new_tokens=20)


def test_nobody_who_calls_it_by_another_name_or_from_another_page_is_answered(session):
    async def scene(port):
        own, other = f"127.0.0.1:{port}", "evil.example"
        found = {}
        for name in (own, f"localhost:{port}", "localhost", other, f"{other}:{port}", ""):
            for path in ("/", "/explorer.js"):
                found[name.replace(str(port), "PORT"), path] = await status(port, path, Host=name)
        upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
        upgrade["Sec-WebSocket-Key"] = "dGhlIHNhbXBsZSBub25jZQ=="
        found["its own page"] = await status(port, "/texts", Host=own, Origin=f"http://{own}", **upgrade)
        found["another page"] = await status(port, "/texts", Host=own, Origin=f"http://{other}", **upgrade)
        found["another port's"] = await status(
            port, "/texts", Host=own, Origin=f"http://127.0.0.1:{port + 1}", **upgrade
        )
        found["by another name"] = await status(port, "/texts", Host=other, Origin=f"http://{other}", **upgrade)
        return found

    found = served(session, scene)
    for path in ("/", "/explorer.js"):
        assert [found[name, path] for name in ("127.0.0.1:PORT", "localhost:PORT", "localhost")] == [200] * 3
        assert {found[name, path] for name in ("evil.example", "evil.example:PORT")} == {403}
        assert found["", path] in (400, 403)
    assert found["its own page"] == 101
    assert [found[name] for name in ("another page", "another port's", "by another name")] == [403] * 3


def test_only_the_pages_and_its_own_files_are_there_and_the_policy_forbids_all_other_places(session):
    async def scene(port):
        client = AsyncHTTPClient()
        codes = {}
        for path in (
            "/",
            "/explorer.css",
            "/explorer.js",
            "/explorer.html",
            "/../page.py",
            "/explorer.py",
            "/static/x",
        ):
            answer = await client.fetch(f"http://127.0.0.1:{port}{path}", raise_error=False)
            codes[path] = answer.code
            if answer.code == 200:
                policy = answer.headers["Content-Security-Policy"]
                assert policy.startswith("default-src 'none'; script-src 'self';")
                assert not re.search(rf"https?:|\*|unsafe-eval|(?<!127.0.0.1):{port}", policy)
                assert "Server" not in answer.headers
        return codes

    codes = served(session, scene)
    assert [path for path, code in codes.items() if code == 200] == ["/", "/explorer.css", "/explorer.js"]


def test_the_page_is_bound_to_the_loopback_address_only(session):
    found = {}

    class Ended(Exception):
        pass

    def started(address):
        assert address.startswith("http://127.0.0.1:")
        for host in ("127.0.0.1", "127.0.0.2"):  # whoever listens on all addresses is met at the second, too
            with socket.socket() as other:
                other.settimeout(5)
                found[host] = other.connect_ex((host, int(address.rsplit(":", 1)[1])))
        raise Ended

    with pytest.raises(Ended):
        serve(session, port=0, started=started)
    assert found["127.0.0.1"] == 0
    assert found["127.0.0.2"] != 0


def test_a_port_that_is_taken_is_said_with_a_way_out(session):
    taken = page.listen(0)
    try:
        with pytest.raises(OSError, match=r"port \d+ cannot be used .*choose another one, 0 for any"):
            serve(session, port=taken.getsockname()[1])
    finally:
        taken.close()
    with pytest.raises(ValueError, match="at most 65535"):
        serve(session, port=70000)


class _Places(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "action", "srcset", "style")]


def test_the_page_names_no_other_place_and_escapes_what_vectors_are_called(tiny_chat):
    vectors = random_vectors(tiny_chat, behavior="<script>alert(1)</script>")
    html = page.page_html(Session(tiny_chat, vectors, controls=0))
    assert "<script>alert" not in html
    parser = _Places()
    parser.feed(html)
    assert sorted(parser.found) == ["data:,", "explorer.css", "explorer.js"]
    templates = ROOT / "caa_lens" / "explorer" / "templates"
    for name in ("explorer.css", "explorer.js"):
        text = (templates / name).read_text(encoding="utf-8")
        assert not re.search(r"https?://|@import|url\(|\bfetch\(|XMLHttpRequest|sendBeacon|eval\(", text)


def test_the_layer_slider_has_the_vectors_layers_only(tiny_chat):
    html = page.page_html(Session(tiny_chat, random_vectors(tiny_chat, layers=[1, 3]), controls=0))
    assert 'data-layers="1,3"' in html
    assert re.search(r'id="layer" type="range" min="0" max="1"', html)
    only = page.page_html(Session(tiny_chat, random_vectors(tiny_chat, layers=[2]), controls=0))
    assert re.search(r'id="layer".* disabled>', only)


def test_the_command_says_what_cannot_be_explored(tiny_chat, tiny_model, monkeypatch, tmp_path):
    from helpers.models import load_in_its_place
    from typer.testing import CliRunner

    from caa_lens.cli import commands

    load_in_its_place(monkeypatch, lambda *given, **options: tiny_chat)
    own = random_vectors(tiny_chat, layers=[1, 2]).save(tmp_path / "own.safetensors")
    other = random_vectors(tiny_model(d_model=16)).save(tmp_path / "other.safetensors")
    for arguments, kind, said in [
        ([str(tmp_path / "nothing.safetensors")], FileNotFoundError, "nothing.safetensors"),
        ([str(other)], ValueError, "extract them from this model"),
        ([str(own), "--layers", "3"], IndexError, "3"),
        ([str(own), "--multipliers=1"], ValueError, "the least and the greatest"),
        ([str(own), "--port", "70000"], ValueError, "at most 65535"),
    ]:
        done = CliRunner().invoke(commands.app, ["explore", *arguments])
        assert isinstance(done.exception, kind), (arguments, done.exception)
        assert said in str(done.exception)


def test_make_explore_says_what_to_do_where_the_demo_has_kept_nothing(tmp_path):
    make = shutil.which("make")
    if make is None:
        pytest.skip("needs make")
    command = [make, "-f", str(ROOT / "Makefile"), "-o", ".venv/.ready", "explore"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no vectors in runs/demo: run make demo first" in done.stderr
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "vectors.safetensors").touch()
    done = subprocess.run([*command, "-n", "ARGS=--port 0"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "caa-lens explore runs/demo/vectors.safetensors --port 0" in done.stdout


@pytest.mark.parametrize(("module", "missing"), [("page", "tornado"), ("page", "jinja2"), ("widgets", "ipywidgets")])
def test_without_the_extra_the_error_names_it(module, missing):
    code = f"import sys; sys.modules[{missing!r}] = None; import caa_lens.explorer.{module}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    said = rf"ImportError: for the explorer.*, the package {missing} is missing: pip install 'caa-lens\[explore\]'"
    assert re.search(said, done.stderr)
