"""A file arrives whole and checked, or not at all, and the message says why."""

import hashlib
import shutil
import socket
import ssl
import subprocess
import threading

import pytest
from helpers.published import serving

from caa_lens.paper.downloads import DownloadError, download_file, file_sha256

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
    assert download_file(url, target, sha256=DIGEST) == DIGEST == file_sha256(target)
    assert target.read_bytes() == BODY
    assert [path.name for path in target.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize(
    ("fault", "sha256", "message"),
    [
        (404, None, r"file\.json is not there \(404\)"),
        (503, None, r"answered 503 .*try again later"),
        (403, None, r"answered 403"),
        ("truncate", None, r"broke off after 128000 of 256000 bytes: try again"),
        ("hang", None, r"was silent for 0\.2 s"),
        (None, "0" * 64, rf"sha256 {DIGEST}, expected {'0' * 64}"),
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
        download_file(url, target, sha256=sha256, timeout=0.2)
    assert url in str(raised.value)
    assert target.read_text() == "before"
    assert list(target.parent.iterdir()) == [target]


def test_a_chunked_body_that_breaks_off_is_refused(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\nhalf")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(DownloadError, match="broke off: try again"):
            download_file(f"http://127.0.0.1:{server.getsockname()[1]}/x", tmp_path / "x", timeout=2)
        thread.join()
    assert list(tmp_path.iterdir()) == []


def test_without_a_server_or_a_name_it_cannot_be_reached(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(DownloadError, match=rf"127\.0\.0\.1:{port} cannot be reached .*: connect"):
        download_file(f"http://127.0.0.1:{port}/x", tmp_path / "x", timeout=2)


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
        with pytest.raises(DownloadError, match=rf"127\.0\.0\.1:{port} has a certificate .* set SSL_CERT_FILE"):
            download_file(f"https://127.0.0.1:{port}/x", tmp_path / "x", timeout=5)
        thread.join()
    assert not (tmp_path / "x").exists()


def test_a_full_disk_is_not_called_a_broken_connection(site, tmp_path, monkeypatch):
    url, _ = site

    def full(path, write):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("caa_lens.paper.downloads.write_atomically", full)
    with pytest.raises(OSError, match="No space") as raised:
        download_file(url, tmp_path / "x")
    assert not isinstance(raised.value, DownloadError)
