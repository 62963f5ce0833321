"""The files of a run's folder, and what each was made from.

`made_from.json` says it: the model's contents, the pairs, the vectors, the settings and versions. A file is used again
when it is there, is the one that was written, and was made from just what it would be made from now.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from caa_lens.atomic_files import write_atomically
from caa_lens.models.loading.fingerprint import file_digest
from caa_lens.results import Result

SETTINGS, MADE_FROM = "config.json", "made_from.json"
R = TypeVar("R", bound=Result)


def refuse_other_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raises `ValueError` for a folder that holds a run with other settings."""
    path = folder / SETTINGS
    if not path.exists():
        return
    try:
        present = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        present = {}
    # A setting that an older run did not have yet is None.
    if changed := sorted(key for key in {*present, *settings} if present.get(key) != settings.get(key)):
        raise ValueError(
            f"{folder} holds a run with other settings ({', '.join(changed)}): choose another folder with --out, "
            "or delete it"
        )


def finished(folder: Path) -> list[str]:
    """The steps of a run that are finished and kept, by the names of their files without endings."""
    try:
        said = json.loads((folder / MADE_FROM).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [Path(name).stem for name in said if (folder / name).exists()] if isinstance(said, dict) else []


def kept_told(folder: Path) -> str:
    """These in words; "" if there are none."""
    there = finished(folder)
    return f"{folder} keeps {', '.join(there)}" if there else ""


@dataclass(frozen=True, slots=True)
class KeptFiles:
    """The files of a run's folder, and what each was made from."""

    folder: Path
    console: Console
    always: dict[str, Any]
    """What everything is made from."""

    def path(self, name: str) -> Path:
        return self.folder / name

    def digest(self, *names: str) -> str:
        return " ".join(file_digest(self.path(name)) for name in names)

    def reuse(self, name: str, made_from: dict[str, Any], *beside: str) -> bool:
        """Whether a file, and those that belong to it, are what was written here, and were made from just this."""
        if not all(self.path(each).exists() for each in (name, *beside)):
            return False
        there, now = self._said().get(name, {}), self._plain(made_from) | {"sha256": self.digest(name, *beside)}
        if there == now:
            self.console.print(f"reusing {self.path(name)}")
            return True
        changed = ", ".join(sorted(key for key in {*there, *now} if there.get(key) != now.get(key)))
        why = f"it was made from other things than now ({changed})" if there else "nothing says what it was made from"
        self.console.print(f"making {self.path(name)} anew, as {why}")
        return False

    def result(self, kind: type[R], stem: str, made_from: dict[str, Any], make: Callable[[], R]) -> R:
        """A saved result of a kind, read if it can be reused, else made and saved."""
        names = [stem + ending for ending in kind.endings()]
        if self.reuse(names[0], made_from, *names[1:]):
            return kind.load(self.path(names[0]))
        found = make()
        self.path(names[0]).unlink(missing_ok=True)  # this folder's own, whatever it was
        found.save(self.path(names[0]))
        self.record(names[0], made_from, *names[1:])
        return found

    def json(self, name: str, made_from: dict[str, Any], make: Callable[[], Any]) -> Any:
        """The same of a JSON file."""
        if not self.reuse(name, made_from):
            text = json.dumps(make(), indent=2, ensure_ascii=False)
            write_atomically(self.path(name), lambda file: file.write_text(text, encoding="utf-8"))
            self.record(name, made_from)
        return json.loads(self.path(name).read_text(encoding="utf-8"))

    def record(self, name: str, made_from: dict[str, Any], *beside: str) -> None:
        said = self._said() | {name: self._plain(made_from) | {"sha256": self.digest(name, *beside)}}
        text = json.dumps(said, indent=2, ensure_ascii=False)
        write_atomically(self.path(MADE_FROM), lambda file: file.write_text(text, encoding="utf-8"))

    def _plain(self, made_from: dict[str, Any]) -> dict[str, Any]:
        return json.loads(json.dumps(self.always | made_from))

    def _said(self) -> dict[str, Any]:
        try:
            said = json.loads(self.path(MADE_FROM).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return said if isinstance(said, dict) else {}
