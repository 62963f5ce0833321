"""A judge's replies on disk: one JSON line each, appended as they come.

A reply counts once its whole line is written and synced. What a killed run was writing is a last line without an end;
it is recognised and dropped when the file is read again. Only one run at a time may write to a file.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

_BEGINNING = b'{"key": "'


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a judge said to one request.

    Attributes:
        key: hash of everything that was sent.
        attempt: which request for this key it answers, from 1.
        raw: the judge's words.
        finish_reason: why it stopped; "length" means in the middle of them.
    """

    key: str
    attempt: int
    raw: str
    finish_reason: str


class ReplyFile:
    """The replies in a file, and those to come.

    Attributes:
        last: the last reply of each key.

    Raises:
        ValueError: if the file holds anything but replies; it is left as it was.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.last: dict[str, Reply] = {}
        data = self.path.read_bytes() if self.path.exists() else b""
        *lines, torn = data.split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                reply = Reply(**{name: row[name] for name in Reply.__dataclass_fields__})
            except (ValueError, TypeError, KeyError):
                raise self._foreign(number) from None
            self.last[reply.key] = reply
        if torn:
            if torn[: len(_BEGINNING)] != _BEGINNING[: len(torn)]:
                raise self._foreign(len(lines) + 1)
            os.truncate(self.path, len(data) - len(torn))

    def add(self, reply: Reply, about: Mapping[str, str]) -> None:
        """Append a reply, and what it is about for those who read the file, and wait until it is on the disk."""
        line = json.dumps({**asdict(reply), **about}, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.last[reply.key] = reply

    def _foreign(self, line: int) -> ValueError:
        return ValueError(
            f"line {line} of {self.path} is not a judge's reply: choose a path that does not exist yet, "
            "or one that judge_texts has written"
        )
