"""Who holds a run folder: one process at a time, on file systems that do not honour file locks, too.

`held.json` in the folder names the process that writes there, and is renewed every few seconds. It is made with
O_EXCL, which network file systems do honour. A process that finds it there

- is refused as long as the holder lives. On one machine that is seen from the process itself;
- takes the folder over if the holder is gone. A holder on another machine cannot be seen: the file is watched, and one
  that is not renewed for `LEASE` seconds, by the watcher's own clock, was left by a process that is gone.

A holder whose folder was taken over all the same (its machine slept, say) notices at its next write, and stops.
"""

import contextlib
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from caa_lens.atomic_files import write_atomically

NAME = "held.json"
BEAT = 5.0  # seconds between two renewals
LEASE = 60.0  # seconds without one, after which a holder on another machine counts as gone


class HeldError(ValueError):
    """Another process writes into the folder."""


def machine() -> str:
    """This machine, as far as process ids go: a container has process ids of its own."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):  # Linux
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


class Holder:
    """Use as a context manager: inside, this process holds the folder.

    Raises:
        HeldError: another process holds it.
    """

    def __init__(self, folder: Path, *, say: Callable[[str], None] = lambda text: None) -> None:
        """`say` is told when a while has to be waited."""
        self.file = folder / NAME
        self._say = say
        self._end = threading.Event()
        self._about: dict[str, Any] = {
            "machine": machine(),
            "host": platform.node(),
            "process": os.getpid(),
            "began": psutil.Process().create_time(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "token": secrets.token_hex(8),
            "beat": 0,
        }

    def __enter__(self) -> "Holder":
        self.file.parent.mkdir(parents=True, exist_ok=True)
        while not self._made():
            self._clear()
        self._thread = threading.Thread(target=self._renew, name="holds the run folder", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        if self._is_mine():
            self.file.unlink(missing_ok=True)

    def check(self) -> None:
        """Raises `HeldError` if another process has taken the folder over."""
        if not self._is_mine():
            raise HeldError(
                f"{self.file.parent} is held by another process by now: {_described(_read(self.file))}. This one had "
                "not been heard of; what it had finished is kept"
            )

    def _made(self) -> bool:
        try:
            handle = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "wb") as file:
            file.write(json.dumps(self._about).encode())
        return True

    def _clear(self) -> None:
        """Take away what a holder that is gone has left."""
        found = _read(self.file)
        if found is None:
            return
        if self._lives(found):
            raise HeldError(
                f"{self.file.parent} is held by another run, which alone writes there: {_described(found)}. Wait until "
                f"it has ended, or end it. If there is no such run, delete {self.file}"
            )
        aside = self.file.with_name(f".{NAME}.{secrets.token_hex(4)}")
        with contextlib.suppress(FileNotFoundError):
            self.file.rename(aside)  # of several processes here one only succeeds
            if _read(aside) != found:  # and it was not what we had looked at
                aside.rename(self.file)
                return
            aside.unlink()

    def _lives(self, found: bytes) -> bool:
        try:
            about = json.loads(found)
        except ValueError:
            about = {}  # not written to its end: by a process that is at it, or was killed just then
        if about.get("machine") == self._about["machine"]:
            try:
                return bool(psutil.Process(about["process"]).create_time() == about["began"])
            except psutil.NoSuchProcess:
                return False
        self._say(f"{self.file} was left by {_described(found)}: watching for {LEASE:.0f} s whether that still lives")
        until = time.monotonic() + LEASE
        while time.monotonic() < until:
            time.sleep(min(1.0, LEASE / 10))
            if _read(self.file) != found:
                return _read(self.file) is not None
        return False

    def _renew(self) -> None:
        while not self._end.wait(BEAT):
            if not self._is_mine():
                return
            self._about["beat"] += 1
            with contextlib.suppress(OSError):  # a full disk is told where results are written
                write_atomically(self.file, lambda file: file.write_text(json.dumps(self._about)))

    def _is_mine(self) -> bool:
        return self._about["token"].encode() in (_read(self.file) or b"")


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None


def _described(found: bytes | None) -> str:
    try:
        about = json.loads(found or b"")
        return f"process {about['process']} on {about['host']}, since {about['since']}"
    except (ValueError, KeyError):
        return "a process that has not said its name"
