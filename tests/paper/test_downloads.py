"""A file arrives whole and checked, or not at all, and the message says why."""

import hashlib
import shutil
import socket
import ssl
import stat
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers.published import serving

from caa_lens.paper.fetch import DownloadError, download

BODY = bytes(range(256)) * 1000  # several chunks
DIGEST = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def site(tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "file.json").write_bytes(BODY)
    faults = {}
    with serving(folder, faults) as (address, _):
        yield f"{address}/file.json", faults


def test_what_arrives_is_what_was_sent_and_its_checksum_is_returned(site, tmp_path):
    url, _ = site
    target = tmp_path / "new" / "folder" / "file.json"
    assert download(url, target, sha256=DIGEST)
    assert target.read_bytes() == BODY
    assert [path.name for path in target.parent.iterdir()] == ["file.json"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o644  # a cache may be shared


@pytest.mark.parametrize(("sha256", "fetched"), [(None, False), (DIGEST, False), (hashlib.sha256().hexdigest(), True)])
def test_a_file_that_is_there_is_fetched_only_if_it_is_another_one(site, tmp_path, sha256, fetched):
    _, faults = site
    faults["file.json"] = 503
    target = tmp_path / "file.json"
    target.write_bytes(BODY)
    if not fetched:
        assert not download(site[0], target, sha256=sha256)
        return
    with pytest.raises(
        DownloadError, match=rf"answered 503.*\n.*file\.json is there, but has sha256 {DIGEST}, expected"
    ):
        download(site[0], target, sha256=sha256)


def test_a_file_that_broke_off_is_fetched_again_from_its_beginning(tmp_path):
    ranges = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            ranges.append(self.headers["Range"])
            self.send_response(200)
            self.send_header("Content-Length", str(len(BODY)))
            self.end_headers()
            self.wfile.write(BODY[:1000] if len(ranges) == 1 else BODY)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/x"
        with pytest.raises(DownloadError, match="broke off"):
            download(url, tmp_path / "x", sha256=DIGEST)
        assert list(tmp_path.iterdir()) == []
        assert download(url, tmp_path / "x", sha256=DIGEST)
        server.shutdown()
        thread.join()
    assert ranges == [None, None]
    assert (tmp_path / "x").read_bytes() == BODY


@pytest.mark.parametrize(
    ("fault", "sha256", "message"),
    [
        (404, DIGEST, r"file\.json is not there \(404\)"),
        (503, DIGEST, r"answered 503 .*try again later"),
        (403, DIGEST, r"answered 403"),
        ("truncate", DIGEST, r"broke off: try again"),
        ("hang", DIGEST, r"was silent for 0\.2 s"),
        (None, "0" * 64, rf"another file than expected.*expected {'0' * 64} but got {DIGEST}"),
    ],
)
def test_a_fault_is_named_and_leaves_what_was_there(site, tmp_path, fault, sha256, message):
    url, faults = site
    target = tmp_path / "out" / "file.json"
    target.parent.mkdir()
    target.write_text("before")
    if fault is not None:
        faults["file.json"] = fault
    with pytest.raises(DownloadError, match=message) as raised:
        download(url, target, sha256=sha256, timeout=0.2)
    assert url in str(raised.value)
    assert target.read_text() == "before"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        (b"Transfer-Encoding: chunked", "broke off: try again"),
        (b"Content-Length: 16", r"was silent for 0\.5 s: try again"),
    ],
)
def test_a_body_that_breaks_off_or_stops_in_the_middle_is_refused(tmp_path, headers, message):
    refused = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n\r\n10\r\nhalf")
                if headers.startswith(b"Content"):
                    refused.wait(10)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(DownloadError, match=message):
            download(f"http://127.0.0.1:{server.getsockname()[1]}/x", tmp_path / "x", timeout=0.5)
        refused.set()
        thread.join()
    assert list(tmp_path.iterdir()) == []


def test_without_a_server_or_a_name_it_cannot_be_reached(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(DownloadError, match=rf"127\.0\.0\.1:{port} cannot be reached .*: connect"):
        download(f"http://127.0.0.1:{port}/x", tmp_path / "x", timeout=2)


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path, monkeypatch):
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    subprocess.run([*make, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            with connection, pytest.raises(ssl.SSLError):
                context.wrap_socket(connection, server_side=True)

        thread = threading.Thread(target=answer)
        thread.start()
        port = server.getsockname()[1]
        with pytest.raises(DownloadError, match=rf"127\.0\.0\.1:{port} has a certificate .* set REQUESTS_CA_BUNDLE"):
            download(f"https://127.0.0.1:{port}/x", tmp_path / "x", timeout=5)
        thread.join()
    assert not (tmp_path / "x").exists()


def test_a_full_disk_is_not_called_a_broken_connection(site, tmp_path, monkeypatch):
    url, _ = site

    def full(downloader, url, output_file, pooch):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pooch.HTTPDownloader.__call__", full)
    with pytest.raises(OSError, match="No space") as raised:
        download(url, tmp_path / "x")
    assert not isinstance(raised.value, DownloadError)
