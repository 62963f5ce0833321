"""The code and commands of docs/vectors.md run as pasted."""

import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

from caa_lens.cli import commands as cli

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "vectors.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_pages_code_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    exec(compile(code, "vectors.md", "exec"), {})
    promised = re.search(r"# (\(v\[13\].*to=8\.37)\.\.\.\)", code)
    assert promised is not None
    assert capsys.readouterr().out.startswith(promised[1])

    (commands,) = blocks("bash")
    for line in commands.splitlines():
        program, *words = shlex.split(line)
        assert program == "caa-lens"
        done = CliRunner().invoke(cli.app, words)
        assert done.exit_code == 0, (line, done.output)
    assert {"c.safetensors", "c.gguf"} <= {path.name for path in tmp_path.iterdir()}


def test_the_page_names_every_metadata_key():
    from caa_lens.vectors.storage import FORMAT_VERSION, KEYS

    for key in KEYS[str(FORMAT_VERSION)]:
        assert f"`{key}`" in PAGE, key
