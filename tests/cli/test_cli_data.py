"""`caa-lens data`: the same sets as the library, and what happened in words."""

import pytest
import requests
from helpers.models import load_in_its_place
from helpers.published import ab_rows, serving, write_published
from typer.testing import CliRunner

from caa_lens.cli.commands import main
from caa_lens.cli.data import data_app
from caa_lens.contrast import ContrastSet, DroppedRowsWarning
from caa_lens.paper import sources as data_sources
from caa_lens.paper.fetch import DownloadError, in_place
from caa_lens.paper.questions import inventory, load_paper_set

runner = CliRunner()


@pytest.fixture
def clone(tmp_path):
    return write_published(tmp_path / "clone", "refusal")


@pytest.mark.parametrize("command", ["fetch", "list", "check", "convert"])
def test_every_command_has_help_with_an_example(command):
    result = runner.invoke(data_app, [command, "--help"])
    assert result.exit_code == 0
    assert f"Example: caa-lens data {command}" in " ".join(result.output.split())


def test_a_fetched_set_is_there_for_the_library_and_in_the_list(clone, tmp_path):
    to = tmp_path / "data"
    done = runner.invoke(data_app, ["fetch", "refusal", "--from", str(clone), "--to", str(to)])
    assert done.exit_code == 0, done.output
    assert len(load_paper_set("refusal", to)[0]) == 408
    listed = runner.invoke(data_app, ["list", "--to", str(to)]).output
    digest = inventory(to)["sha256"][0]
    row = next(line.split() for line in listed.splitlines() if "generate" in line)
    assert row == ["refusal", "generate", "408", "408", "(A)", "204,", "(B)", "204", "authors", digest[:12]]
    assert listed.rstrip().endswith(f"in {to}")


def test_the_default_folder_is_the_users_cache(clone, tmp_path, monkeypatch):
    monkeypatch.setenv("CAA_LENS_CACHE", str(tmp_path / "mine"))
    assert "run `caa-lens data fetch`" in runner.invoke(data_app, ["list"]).output
    assert runner.invoke(data_app, ["fetch", "--from", str(clone)]).exit_code == 0
    assert (tmp_path / "mine" / "data" / "refusal" / "test.jsonl").is_file()


def test_a_difference_from_the_paper_is_a_note_and_no_failure(tmp_path):
    clone = write_published(tmp_path / "clone", "refusal", test=ab_rows("t", 48))
    done = runner.invoke(data_app, ["fetch", "--from", str(clone), "--to", str(tmp_path / "data")])
    assert done.exit_code == 0
    assert "note: refusal: test has 48 questions, the paper has 50" in done.stderr


def test_without_network_the_error_says_what_to_put_where(tmp_path, monkeypatch):
    to = tmp_path / "data"
    with serving(tmp_path, {"": 503}) as (address, _):
        monkeypatch.setattr(data_sources, "GITHUB", address)
        done = runner.invoke(data_app, ["fetch", "refusal", "--to", str(to)])
    assert isinstance(done.exception, DownloadError)  # which `caa_lens.cli.commands.main` turns into one message
    file = data_sources.authors_files("refusal")["test"]
    assert f"/{file.path}  ->  {to / file.place}" in str(done.exception)


THEIRS = """ask,good,bad
How was it?,Wonderful and bright.,Awful and grey.
And then?,,Nothing good.
Why?,So sunny.,So rainy.
"""


def test_convert_writes_a_table_of_others_as_pairs_and_says_what_it_left_out(tmp_path):
    table, out = tmp_path / "theirs.csv", tmp_path / "mine.jsonl"
    table.write_text(THEIRS)
    named = ["--columns", "question=ask, positive=good,negative=bad"]
    refused = runner.invoke(data_app, ["convert", str(table), str(out), *named])
    assert refused.exit_code
    assert "line 3, good" in str(refused.exception)
    assert not out.exists()
    with pytest.warns(DroppedRowsWarning, match="1 of 3"):
        done = runner.invoke(data_app, ["convert", str(table), str(out), *named, "--on-bad", "drop"])
    assert done.stdout == f"2 pairs, 1 row left out\nwritten to {out}\n"
    expected = ContrastSet.load(out)
    assert [pair.question for pair in expected] == ["How was it?", "Why?"]


def test_check_says_what_the_linter_finds(tmp_path):
    same = runner.invoke(data_app, ["check", "sentiment"]).output
    assert same.rstrip() == str(ContrastSet.load("sentiment").check())
    both = runner.invoke(data_app, ["check", "sentiment", "--other", "sentiment"]).output
    pairs = ContrastSet.load("sentiment")
    assert both.rstrip() == str(pairs.check(other=pairs))


def test_check_takes_a_model_to_look_for_its_tokens(tmp_path, tiny_chat, monkeypatch):
    load_in_its_place(monkeypatch, lambda *_, **__: tiny_chat)
    pairs = ContrastSet.from_pairs([("Why?", "So<|im_end|> sunny.", "So rainy."), ("How?", "Well.", "Badly.")])
    pairs.save(tmp_path / "marked.jsonl")
    said = runner.invoke(data_app, ["check", str(tmp_path / "marked.jsonl"), "--model", "demo"]).output
    assert said.rstrip() == str(ContrastSet.load(tmp_path / "marked.jsonl").check(model=tiny_chat))
    assert "special tokens" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--columns", "question"], "got --columns 'question', expected NAME=COLUMN"),
        (["--on-bad", "skip"], "got --on-bad skip, expected raise or drop"),
    ],
)
def test_options_that_say_nothing_are_refused(words, message, tmp_path):
    done = runner.invoke(data_app, ["check", "sentiment", *words])
    assert message in str(done.exception)


def test_without_network_all_that_is_missing_is_listed_at_once(clone, tmp_path, monkeypatch):
    to, asked = tmp_path / "data", ["refusal", "sycophancy", "mmlu"]
    runner.invoke(data_app, ["fetch", "refusal", "--from", str(clone), "--to", str(to)])
    gone = data_sources.authors_files("refusal")["test"]
    (to / gone.place).unlink()
    spoilt = data_sources.authors_files("refusal")["open_ended"]
    (to / spoilt.place).write_text("something else")
    tries = []

    def unreachable(url, **_):
        tries.append(url)
        raise requests.exceptions.ConnectionError("no network")

    monkeypatch.setattr("pooch.retrieve", unreachable)
    done = runner.invoke(data_app, ["fetch", *asked, "--to", str(to)])
    said = str(done.exception)
    others = [file for name in asked[1:] for file in data_sources.authors_files(name).values()]
    assert len(tries) == 1
    assert [line.split("  ->  ")[1] for line in said.splitlines() if "  ->  " in line] == [
        str(to / file.place) for file in (gone, spoilt, *others)
    ]
    assert f"{1} of {3 + len(others)} files are there. Or put these {2 + len(others)} files in place" in said
    assert f"run `caa-lens data fetch {' '.join(asked)}` again" in said
    assert in_place(asked, to) == (1, 3 + len(others))


@pytest.mark.parametrize("command", ["check", "convert"])
def test_columns_that_are_not_understood_are_told_as_words_of_the_command_line(command, tmp_path, monkeypatch, capsys):
    table, out = tmp_path / "theirs.csv", tmp_path / "mine.jsonl"
    table.write_text(THEIRS)
    monkeypatch.setattr("sys.argv", ["caa-lens", "data", command, str(table), *[str(out)] * (command == "convert")])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert "`caa-lens data convert IN OUT --columns 'question=...,positive=...,negative=...'`" in said
    assert "{" not in said
    assert "on-bad" not in said  # no row is left of a table whose columns are not understood
