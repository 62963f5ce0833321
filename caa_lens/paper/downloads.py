"""Get one file from the web: whole, with the right checksum, or not at all.

Certificates and proxies are those of Python's own `urllib`: the environment variables `HTTPS_PROXY` and
`SSL_CERT_FILE` are heeded.
"""

import hashlib
import http.client
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from caa_lens.atomic_files import write_atomically

CHUNK = 1 << 16  # bytes read at a time


class DownloadError(ConnectionError):
    """A file that did not arrive whole; the message names its address and what to do."""


def download_file(url: str, path: Path, *, sha256: str | None = None, timeout: float | int = 30.0) -> str:
    """Write what `url` sends to `path`, and return its SHA-256.

    `path` holds what it held before until all of the file is there and checked.

    Args:
        sha256: what the checksum has to be; None where it is not known.
        timeout: seconds that the server may take for each answer, not for the whole file.

    Raises:
        DownloadError: no connection, no such file, silence, a body that breaks off, or another checksum.
    """
    digest = hashlib.sha256()

    def receive(temporary: Path) -> None:
        request = urllib.request.Request(url, headers={"User-Agent": "caa-lens"})
        size = 0
        with urllib.request.urlopen(request, timeout=timeout) as response, temporary.open("wb") as file:
            announced = response.headers.get("Content-Length")
            while chunk := response.read(CHUNK):
                digest.update(chunk)
                size += file.write(chunk)
        # urllib reports a body that is too short only to those who read it in one piece.
        if announced is not None and size != int(announced):
            raise DownloadError(f"{url} broke off after {size} of {announced} bytes: try again")
        if sha256 is not None and digest.hexdigest() != sha256:
            raise DownloadError(
                f"{url} sent a file with sha256 {digest.hexdigest()}, expected {sha256}: it was changed where it is "
                "published, or on its way"
            )

    try:
        write_atomically(path, receive)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
        raise error if isinstance(error, DownloadError) else DownloadError(_told(url, error, timeout)) from None
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _told(url: str, error: Exception, timeout: float | int) -> str:
    """What went wrong, in words."""
    if isinstance(error, urllib.error.HTTPError):
        error.close()  # it holds the connection
        if error.code == 404:
            return f"{url} is not there (404): it was moved or taken down"
        return f"{url}: the server answered {error.code} {error.reason}: try again later"
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    host = urlsplit(url).netloc
    if isinstance(cause, ssl.SSLCertVerificationError):
        return (
            f"{host} has a certificate that cannot be verified ({cause.verify_message}): behind a proxy that signs "
            f"anew, set SSL_CERT_FILE to its certificate; {url} was not fetched"
        )
    if isinstance(cause, TimeoutError):
        return f"{url} was silent for {timeout:g} s: try again"
    if isinstance(error, http.client.IncompleteRead):
        return f"{url} broke off: try again"
    return f"{host} cannot be reached ({cause or type(error).__name__}): connect; {url} was not fetched"
