"""What every command says of itself."""

import pytest
import typer
from typer.testing import CliRunner

from caa_lens.cli.commands import app


def every_command(group, path=()):
    yield path
    for name, command in getattr(group, "commands", {}).items():
        yield from every_command(command, (*path, name))


@pytest.mark.parametrize("path", list(every_command(typer.main.get_command(app))), ids=" ".join)
def test_flags_show_no_type_for_they_take_no_value(path):
    shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "160"}).output
    assert "--help" in shown
    assert "<bool>" not in shown
    assert "BOOLEAN" not in shown
