"""A command that is stopped ends in one line: what is kept, and the command that goes on.

Ctrl-C gives the exit code 130 and SIGTERM 143, as shells expect. Files are written beside their place and renamed, and
what was not yet renamed is taken away, so that nothing half-written is left.
"""

import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from caa_lens.cli.options import FlagsWithoutType

BY_HAND, FROM_OUTSIDE = 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM: stopped as by Ctrl-C, with another exit code."""


class _Command:
    """What the command that runs has said of itself."""

    kept: Callable[[], str] | None = None
    outputs: ClassVar[dict[Path, int | None]] = {}  # when each file to be written was last written before


def stop_on_terminate() -> None:
    """Let SIGTERM stop this program in order, unless something else was made of it."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)


def keeps(told: Callable[[], str]) -> None:
    """Say what the command keeps if it is stopped; `told` is asked then, and gives nothing where nothing is kept."""
    _Command.kept = told


def will_write(path: Path) -> None:
    """Remember a file that the command writes, so that it can say whether it has."""
    _Command.outputs[path] = _written(path)


def stopped_told(command: str) -> str:
    """The one line."""
    kept = _Command.kept() if _Command.kept is not None else ""
    if kept:
        return f"stopped: {kept}; the same command goes on: {command}"
    written = [str(path) for path, before in _Command.outputs.items() if _written(path) != before]
    if written:
        were = "was" if len(written) == 1 else "were"
        return f"stopped: {', '.join(written)} {were} written, nothing after; again from the beginning: {command}"
    return f"stopped: nothing is kept; again from the beginning: {command}"


def end_stopped(stop: KeyboardInterrupt) -> NoReturn:
    """Say the line on standard error, and exit."""
    for each in (signal.SIGINT, signal.SIGTERM):  # whoever is impatient now would only get a traceback
        signal.signal(each, signal.SIG_IGN)
    typer.echo(stopped_told(command_given()), err=True)
    sys.exit(FROM_OUTSIDE if isinstance(stop, Terminated) else BY_HAND)


def command_given() -> str:
    """The command as it was typed, near enough to be given again."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        package = "caa_lens" if program.parent.name == "caa_lens" else program.parent.name
        return shlex.join(["python", "-m", package, *sys.argv[1:]])
    return shlex.join([program.name, *sys.argv[1:]])


def _invoked(invoke: Callable[[Any], Any], context: Any) -> Any:
    _Command.kept, _Command.outputs = None, {}
    try:
        return invoke(context)
    except KeyboardInterrupt as stop:
        end_stopped(stop)


class StoppableGroup(FlagsWithoutType, TyperGroup):
    """Commands each of which ends so."""

    def invoke(self, ctx: Any) -> Any:
        return _invoked(super().invoke, ctx)


class StoppableCommand(FlagsWithoutType, TyperCommand):
    """One command that ends so."""

    def invoke(self, ctx: Any) -> Any:
        return _invoked(super().invoke, ctx)


def _terminate(*_: object) -> NoReturn:
    raise Terminated


def _written(path: Path) -> int | None:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None
