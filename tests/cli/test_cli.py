"""The command line: help with examples, the same numbers as the library, errors in one line."""

import os

import pandas as pd
import pytest
from helpers.models import load_in_its_place
from typer.testing import CliRunner

import caa_lens
from caa_lens.cli import commands as cli
from caa_lens.contrast.sets import ContrastSet
from caa_lens.steering.generation import generate
from caa_lens.vectors.extraction import extract
from caa_lens.vectors.interchange import write_vectors
from caa_lens.vectors.steering_vectors import SteeringVectors

pytestmark = pytest.mark.one_kind

runner = CliRunner()
COMMANDS = [
    ["demo"],
    ["extract"],
    ["sweep"],
    ["transfer"],
    ["lens"],
    ["explore"],
    ["similarity"],
    ["generate"],
    ["vectors", "show"],
    ["compare"],
    ["reliability"],
    ["calibrate"],
    ["side-effects"],
]
COMPARE = ["compare", "sentiment", "--more", "Be cheerful.", "--less", "Be gloomy."]


@pytest.fixture
def small_model(tiny_chat, monkeypatch):
    load_in_its_place(monkeypatch, lambda *args, **kwargs: tiny_chat)
    return tiny_chat


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example(command):
    result = runner.invoke(cli.app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Example: caa-lens" in " ".join(result.output.split())


@pytest.fixture
def few(tmp_path):
    """A file of 24 pairs."""
    file = tmp_path / "few.jsonl"
    ContrastSet.load("sentiment").sample(24, seed=0).save(file)
    return str(file)


@pytest.mark.both_versions
def test_extract_then_show_sweep_lens_and_generate(small_model, tmp_path, few):
    file = tmp_path / "v.safetensors"
    done = runner.invoke(cli.app, ["extract", few, str(file)])
    assert done.exit_code == 0, done.output
    vectors = SteeringVectors.load(file)
    expected = extract(small_model, ContrastSet.load(few), progress=False)
    assert vectors.directions.equal(expected.directions)

    shown = runner.invoke(cli.app, ["vectors", "show", str(file)]).output
    assert "tiny-random-llama" in shown
    assert "0-based blocks" in shown

    table = tmp_path / "s.parquet"
    done = runner.invoke(cli.app, ["sweep", few, str(file), "--out", str(table), "--layers", "1,3-4", "--test", "5"])
    assert done.exit_code == 0, done.output
    assert sorted(set(pd.read_parquet(table)["layer"])) == [1, 3, 4]
    assert "log-probability margin" in table.with_suffix(".html").read_text(encoding="utf-8")

    table = tmp_path / "t.parquet"
    words = ["transfer", few, str(file), "--out", str(table), "--layers", "1,3", "--test", "5", "--size", "0.1"]
    done = runner.invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    assert "change of log-probability margin (nats per token) against the unsteered model" in done.output
    frame = pd.read_parquet(table)
    assert sorted(set(zip(frame["source"], frame["target"], strict=True))) == [(1, 1), (1, 3), (3, 1), (3, 3)]
    assert frame["norm"].round(4).groupby(frame["target"]).nunique().tolist() == [1, 1]
    assert "change of" in table.with_suffix(".html").read_text(encoding="utf-8")

    assert "promoted" in runner.invoke(cli.app, ["lens", str(file), "--layers", "4"]).output
    causal = ["lens", str(file), "--layers", "4", "--reading", "causal", "--prompts", "sentiment"]
    assert "verdict" in runner.invoke(cli.app, causal).output
    effect = ["lens", str(file), "--layers", "2", "--reading", "effect", "--controls", "0", "--multiplier", "0.5"]
    assert "linearity" in runner.invoke(cli.app, effect).output
    words = ["lens", str(file), "--layers", "4", "--reading", "causal", "--words", "good, bad"]
    assert "control_low" in runner.invoke(cli.app, words).output

    words = ["generate", "How was your day?", "--vectors", str(file), "--layer", "3", "--multiplier=-2"]
    done = runner.invoke(cli.app, [*words, "--max-new-tokens", "6"])
    text = generate(small_model, "How was your day?", vectors=[(vectors[3], -2.0)], max_new_tokens=6)
    assert done.output.rstrip("\n") == text.rstrip("\n")


def test_a_sweep_in_which_nothing_moves_is_written_all_the_same(small_model, tmp_path, few):
    file, table = tmp_path / "v.safetensors", tmp_path / "s.parquet"
    runner.invoke(cli.app, ["extract", few, str(file), "--test", "8", "--layers", "1,3"])
    vectors = SteeringVectors.load(file)
    (0 * vectors).save(file)
    done = runner.invoke(cli.app, ["sweep", few, str(file), "--out", str(table), "--test", "8"])
    assert done.exit_code == 0, done.output
    assert "no best layer: " in done.output
    assert table.exists()


def test_the_questions_of_trust_are_answered_as_by_the_library(small_model, tmp_path, few):
    file, pairs = tmp_path / "v.safetensors", ContrastSet.load(few)
    train, held_out = pairs.split(test=12, seed=0)
    runner.invoke(cli.app, ["extract", few, str(file), "--test", "12", "--layers", "1,3"])
    vectors = SteeringVectors.load(file)

    table = tmp_path / "r.parquet"
    words = ["reliability", few, "--out", str(table), "--test", "12", "--layers", "1,3"]
    done = runner.invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    activations = caa_lens.engine.pair_activations(small_model, train, layers=[1, 3], progress=False)
    expected = caa_lens.reliability(activations, progress=False)
    pd.testing.assert_frame_equal(caa_lens.measures.Reliability.load(table).frame, expected.frame)
    assert expected.frame["because"].iloc[0] in done.output
    assert "split-half" in table.with_suffix(".html").read_text(encoding="utf-8")

    table = tmp_path / "c.parquet"
    words = ["calibrate", few, str(file), "--out", str(table), "--test", "12", "--budget", "0.2"]
    done = runner.invoke(cli.app, [*words, "--multipliers=-1,1"])
    assert done.exit_code == 0, done.output
    expected = caa_lens.calibrate(small_model, vectors, held_out, 0.2, multipliers=[-1, 1], progress=False)
    found = caa_lens.measures.Calibration.load(table)
    pd.testing.assert_frame_equal(found.frame, expected.frame)
    assert found.text in done.output

    table = tmp_path / "s.parquet"
    words = ["side-effects", str(file), "--layer", "3", "--multiplier=-2", "--n-random", "1", "--out", str(table)]
    done = runner.invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    found = caa_lens.measures.SideEffects.load(table)
    assert (found.multiplier, found.n_random, found.settings["layer"]) == (-2.0, 1, "3")
    assert repr(found) in done.output


@pytest.mark.filterwarnings("ignore::caa_lens.engine.shared_prefix.SharedPrefixWarning")
def test_compare_writes_the_librarys_comparison_and_a_page_that_tells_it(small_model, tmp_path):
    table, data = tmp_path / "c.parquet", tmp_path / "few.jsonl"
    ContrastSet.load("sentiment").sample(14, seed=0).save(data)
    words = ["compare", str(data), *COMPARE[2:], "--methods", "CAA; instruction", "--layers", "1,3"]
    words += ["--test", "4", "--choose", "4"]
    words += ["--n-tokens", "2", "--steered-text", "none", "--budgets", "0.01,0.1", "--out", str(table)]
    done = runner.invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    found = caa_lens.methods.Comparison.load(table)
    train, test = ContrastSet.load(data).split(test=4, seed=0)
    again = caa_lens.compare(
        small_model,
        train,
        test,
        ["CAA", "instruction"],
        words=("Be cheerful.", "Be gloomy."),
        layers=[1, 3],
        validation=4,
        budgets=[0.01, 0.1],
        n_tokens=2,
        steered_text="none",
        progress=False,
    )
    pd.testing.assert_frame_equal(found.frame, again.frame)
    assert found.choices == again.choices
    assert repr(found) in done.output
    assert found.table()["KL 0.1"].iloc[0] in done.output
    page = table.with_suffix(".html").read_text(encoding="utf-8")
    for text in ("Methods compared: few", "on 24 neutral prompts", "instruction", "Be cheerful. / Be gloomy."):
        assert text in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["extract", "sentimant", "x.safetensors"], "sentiment"),
        (["extract", "sentiment", "x.pt"], "vectors are saved as .safetensors"),
        (["vectors", "show", "nowhere.safetensors"], "nothing at nowhere.safetensors: expected a file or folder"),
        (["lens", "v.safetensors", "--layers", "a-b"], "not understood"),
        (["lens", "v.safetensors", "--prompts", "sentiment"], "add --reading causal"),
        (["sweep", "sentiment", "v.safetensors", "--multipliers=a,1"], "expected numbers, e.g. -1,0,1"),
        (["sweep", "sentiment", "v.safetensors", "--out", "x.csv"], "written as .parquet, got 'x.csv'"),
        (["generate", "Hi", "--layer", "3"], "nothing to steer with"),
        (["generate", "Hi", "--multiplier=2"], "nothing to steer with"),
        (["extract", "sentiment", "x.safetensors", "--layers", "a-b"], "not understood"),
        (["generate", "Hi", "--model", "no/such/folder"], "error:"),
        (["extract", "sentiment", "x.safetensors", "--backend", "x"], "got backend='x', expected 'hooked', 'bridge'"),
        (["lens", "v.safetensors", "--backend", "x"], "got backend='x', expected 'hooked', 'bridge'"),
        (["reliability", "sentiment", "--test", "115", "--model", "no/such"], "error:"),
        (["calibrate", "sentiment", "v.safetensors", "--out", "x.csv"], "written as .parquet, got 'x.csv'"),
        (["side-effects", "v.safetensors", "--layer", "9"], "layer 9"),
        ([*COMPARE, "--out", "x.csv"], "written as .parquet, got 'x.csv'"),
        ([*COMPARE, "--test", "120"], "--test 120: 'sentiment' has 120 pairs, expected 1 to 119"),
        ([*COMPARE, "--budgets=a"], "expected numbers, e.g. -1,0,1"),
        ([*COMPARE, "--backend", "x"], "got backend='x', expected 'hooked', 'bridge'"),
        (["demo", "--out", "run", "--backend", "x"], "got backend='x', expected 'hooked', 'bridge'"),
    ],
)
def test_mistakes_end_in_one_line_and_write_nothing(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["caa-lens", *words])
    if "v.safetensors" in words:
        vectors = SteeringVectors.from_vectors([_some_vector()])
        vectors.save(tmp_path / "v.safetensors")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error
    assert sorted(tmp_path.iterdir()) == before


def _some_vector(**about):
    import torch

    from caa_lens.vectors.steering_vectors import SteeringVector

    return SteeringVector.from_direction(torch.ones(32), layer=1, **about)


def test_files_of_other_tools_are_read_wherever_vectors_are(tmp_path):
    file = write_vectors(SteeringVectors.from_vectors([_some_vector()]), tmp_path / "v.gguf")
    shown = runner.invoke(cli.app, ["vectors", "show", str(file)])
    assert shown.exit_code == 0, shown.output
    assert "1: 5.66" in shown.output  # the norm of 32 ones at layer 1


@pytest.mark.parametrize(("held_out", "scored"), [(4, 4), (4, 8), (4, 0), (0, 0), (0, 3), (8, 4)])
def test_pairs_that_the_vectors_were_extracted_from_are_told_of(small_model, tmp_path, few, held_out, scored):
    file = tmp_path / "v.safetensors"
    runner.invoke(cli.app, ["extract", few, str(file), "--test", str(held_out), "--layers", "1"])
    pairs = ContrastSet.load(few)
    train = pairs.split(test=held_out, seed=0)[0] if held_out else pairs
    test = pairs.split(test=scored, seed=0)[1] if scored else pairs
    expected = len(set(train) & set(test))
    words = ["sweep", few, str(file), "--out", str(tmp_path / "s.parquet"), "--test", str(scored)]
    said = runner.invoke(cli.app, words).stderr
    note = f"note: {expected} of the {len(test)} pairs scored are among those that the vectors were extracted from"
    assert (note in said) == bool(expected)
    assert ("note:" in said) == bool(expected)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_file_that_cannot_be_written_is_told_of_before_any_work(tmp_path):
    tmp_path.chmod(0o500)
    done = runner.invoke(cli.app, ["extract", "sentiment", str(tmp_path / "new" / "v.safetensors")])
    assert isinstance(done.exception, PermissionError)
    assert "there is no permission to write in" in str(done.exception)


def test_a_file_in_the_place_of_a_folder_is_told_of_before_any_work(tmp_path):
    (tmp_path / "taken").write_text("")
    done = runner.invoke(cli.app, ["extract", "sentiment", str(tmp_path / "taken" / "v.safetensors")])
    assert isinstance(done.exception, NotADirectoryError)
    assert str(done.exception).endswith(f"cannot be written: {tmp_path / 'taken'} is a file")


def test_vectors_of_another_model_are_told_of(small_model, tmp_path):
    file = tmp_path / "v.safetensors"
    SteeringVectors.from_vectors([_some_vector(model="another")]).save(file)
    words = ["generate", "Hi", "--vectors", str(file), "--layer", "1", "--max-new-tokens", "2"]
    assert "note: the vectors are of another, the model is tiny-random-llama" in runner.invoke(cli.app, words).stderr


def test_the_version_is_that_of_the_package():
    assert runner.invoke(cli.app, ["--version"]).output.strip() == f"caa_lens {caa_lens.__version__}"


def test_layer_lists_are_read_as_written():
    assert cli.parse_layers("3, 9,14-16") == (3, 9, 14, 15, 16)
    with pytest.raises(ValueError, match=r"expected e\.g\. 3,9,14-20"):
        cli.parse_layers("-1")
    with pytest.raises(ValueError, match=r"layers '5-3' are not understood"):
        cli.parse_layers("5-3")
