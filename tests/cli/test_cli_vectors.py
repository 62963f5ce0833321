"""`caa-lens vectors`: what a file holds, how two differ, combining and converting; mistakes write nothing."""

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from caa_lens.cli import commands as cli
from caa_lens.provenance import Provenance
from caa_lens.vectors.interchange import write_vectors
from caa_lens.vectors.steering_vectors import SteeringVectors

runner = CliRunner()


def saved(path, seed=0, *, layers=(3, 7, 20), d_model=8, **provenance):
    directions = torch.randn(len(layers), d_model, generator=torch.Generator().manual_seed(seed))
    about = {"model": "m", "behavior": path.stem, "expression": path.stem, "n_pairs": 12, **provenance}
    SteeringVectors(directions=directions, layers=layers, provenance=Provenance(**about)).save(path)
    return SteeringVectors.load(path)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two sets in the working directory: a.safetensors and b.safetensors."""
    monkeypatch.chdir(tmp_path)
    return saved(tmp_path / "a.safetensors"), saved(tmp_path / "b.safetensors", seed=1)


def output(*words):
    done = runner.invoke(cli.app, ["vectors", *words])
    assert done.exit_code == 0, done.output
    return done.output


def error(*words, monkeypatch, capsys):
    """What the installed command says, on one screen and without a traceback."""
    monkeypatch.setattr("sys.argv", ["caa-lens", "vectors", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("command", ["show", "diff", "combine", "convert"])
def test_every_command_has_help_with_an_example(command):
    assert f"Example: caa-lens vectors {command}" in " ".join(output(command, "--help").split())


# ---- show -------------------------------------------------------------------------------------------------------


def test_show_says_what_a_file_holds(files):
    a, _ = files
    shown = output("show", "a.safetensors")
    for fact in ("model  m", "layers  3, 7, 20 (0-based blocks, at hook_resid_post)", "d_model  8", "pairs  12"):
        assert fact in shown
    assert "".join(f"{f'{layer}: {a[layer].norm:.3g}':<11}" for layer in (3, 7, 20)).rstrip() in shown


def test_codes_that_a_terminal_would_obey_are_shown_and_not_sent(tmp_path):
    evil = tmp_path / "evil.safetensors"
    saved(evil, behavior="\x1b[2Jgone\r", details={"a\x07": "größe\x9b"})
    shown = output("show", str(evil))
    assert r"\x1b[2Jgone\r" in shown
    assert r"größe\x9b" in shown
    assert all(character.isprintable() or character == "\n" for character in shown)


# ---- diff -------------------------------------------------------------------------------------------------------


def test_diff_shows_cosines_norms_and_the_metadata_that_differ(files):
    a, b = files
    lines = output("diff", "a.safetensors", "b.safetensors").splitlines()
    table = {int(line.split()[0]): line.split()[1:] for line in lines if line.split()[0].isdecimal()}
    assert sorted(table) == [3, 7, 20]
    for layer, (cosine, norm_a, norm_b, ratio) in table.items():
        assert float(cosine) == pytest.approx(a[layer].cosine(b[layer]), abs=1e-4)
        assert float(norm_a) == pytest.approx(a[layer].norm, rel=1e-3)
        assert float(norm_b) == pytest.approx(b[layer].norm, rel=1e-3)
        assert float(ratio) == pytest.approx(b[layer].norm / a[layer].norm, rel=1e-3)
    about = "\n".join(lines)
    assert "behavior  A: a\n                  B: b" in about
    assert "model" not in about  # the same in both


def test_diff_of_a_file_with_itself_says_so(files):
    assert output("diff", "a.safetensors", "a.safetensors") == "the vectors are identical\n"


def test_diff_compares_the_layers_that_both_have(files, tmp_path):
    saved(tmp_path / "c.safetensors", layers=(7, 9), model="other")
    shown = output("diff", "a.safetensors", "c.safetensors")
    assert "model  A: m\n                  B: other" in shown
    assert [line.split()[0] for line in shown.splitlines()[-2:]] == ["layer", "7"]
    saved(tmp_path / "d.safetensors", layers=(8, 9))
    assert "no width and layer in common" in output("diff", "a.safetensors", "d.safetensors")
    saved(tmp_path / "e.safetensors", d_model=9)
    assert "no width and layer in common" in output("diff", "a.safetensors", "e.safetensors")


def test_a_zero_vector_has_no_cosine(files, tmp_path):
    zero = SteeringVectors(directions=torch.zeros(1, 8), layers=(7,), provenance=Provenance(model="m"))
    zero.save(tmp_path / "zero.safetensors")
    assert output("diff", "a.safetensors", "zero.safetensors").splitlines()[-1].split()[1] == "-"


# ---- combine ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("0.5*A - B", lambda a, b: 0.5 * a - b),
        ("-A", lambda a, b: -a),
        ("-0.5*(A + B) / 2", lambda a, b: -0.5 * (a + b) / 2),
        ("A.without(B).normalized(to=A.norms)", lambda a, b: a.without(b).normalized(to=a.norms)),
    ],
)
def test_combine_computes_layer_by_layer_and_records_the_expression(files, expression, expected):
    a, b = files
    said = output("combine", expression, "A=a.safetensors", "B=b.safetensors", "--out", "c.safetensors")
    combined, wanted = SteeringVectors.load("c.safetensors"), expected(a, b)
    torch.testing.assert_close(combined.directions, wanted.directions)
    assert combined.provenance.expression == wanted.provenance.expression
    assert combined.provenance.details["combined"] == f"{expression} with A=a.safetensors, B=b.safetensors"
    assert wanted.provenance.expression in said


def test_combine_may_keep_a_single_layer(files):
    a, b = files
    output("combine", "A[7].at_layer(20) + B[20]", "A=a.safetensors", "B=b.safetensors", "--out", "c.safetensors")
    combined = SteeringVectors.load("c.safetensors")
    assert combined.layers == (20,)
    assert torch.equal(combined[20].direction, a[7].direction + b[20].direction)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["A - X", "A=a.safetensors"], "unknown name 'X': known are A\n  A - X\n      ^\n"),
        (["A - F", "A=a.safetensors", "F=f.safetensors"], "of different models, m and n"),
        (["A", "A=p.safetensors"], "hook_point is 'hook_resid_pre', expected 'hook_resid_post'"),
        (["A - S", "A=a.safetensors", "S=s.safetensors"], "cannot combine vectors of layers 3, 7, 20 and layers 3, 7"),
        (["A", "a.safetensors"], "got 'a.safetensors', expected NAME=FILE"),
        (["A", "A=a.safetensors", "A=b.safetensors"], "a different name each"),
        (["A", "A=a.safetensors", "--uot"], "got '--uot', expected NAME=FILE"),
        (["A", "2=a.safetensors"], "expected NAME=FILE"),
        (["A", "A=nowhere.safetensors"], "nothing at nowhere.safetensors"),
        (["2 * 3", "A=a.safetensors"], "this is a number, expected vectors"),
    ],
)
def test_a_combination_that_cannot_be_made_writes_nothing(files, tmp_path, monkeypatch, capsys, words, message):
    saved(tmp_path / "f.safetensors", model="n")
    saved(tmp_path / "s.safetensors", layers=(3, 7))
    with monkeypatch.context() as another_library:
        another_library.setattr("caa_lens.vectors.storage.HOOK_POINT", "hook_resid_pre")
        files[0].save(tmp_path / "p.safetensors")
    before = sorted(tmp_path.iterdir())
    assert message in error("combine", *words, "--out", "c.safetensors", monkeypatch=monkeypatch, capsys=capsys)
    assert sorted(tmp_path.iterdir()) == before


# ---- convert ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["c.gguf", "c.json", "folder", "c.safetensors"])
def test_converting_there_and_back_keeps_the_vectors(files, out):
    a, _ = files
    assert f"written to {out}" in output("convert", "a.safetensors", out)
    output("convert", out, "back.safetensors")
    back = SteeringVectors.load("back.safetensors")
    assert back.layers == a.layers
    assert torch.equal(back.directions, a.directions)


def test_a_format_may_be_named_and_an_unknown_one_is_refused(files, tmp_path, monkeypatch, capsys):
    output("convert", "a.safetensors", "control.bin", "--to", "gguf")
    assert (tmp_path / "control.bin").read_bytes().startswith(b"GGUF")
    before = sorted(tmp_path.iterdir())
    for words, message in [
        (["a.safetensors", "c.bin"], "cannot be guessed"),
        (["a.safetensors", "c.bin", "--to", "pickle"], "unknown format 'pickle'"),
        (["nowhere.gguf", "c.safetensors"], "nothing at nowhere.gguf"),
    ]:
        assert message in error("convert", *words, monkeypatch=monkeypatch, capsys=capsys)
    assert sorted(tmp_path.iterdir()) == before


def test_rows_of_a_bare_tensor_become_the_layers_that_are_named_in_their_order(files, monkeypatch, capsys):
    a, _ = files
    torch.save(a.directions, "stack.pt")
    torch.save(a.directions[0].clone(), "one.pt")
    output("convert", "stack.pt", "c.safetensors", "--layers", "20,3-4", "--model", "o/m")
    converted = SteeringVectors.load("c.safetensors")
    assert (converted.layers, converted.provenance.model) == ((3, 4, 20), "o/m")
    for row, layer in enumerate((20, 3, 4)):
        assert torch.equal(converted[layer].direction, a.directions[row])
    assert "--layers 13" in error("convert", "one.pt", "d.safetensors", monkeypatch=monkeypatch, capsys=capsys)
    wrong = error("convert", "one.pt", "d.safetensors", "--layers", "x", monkeypatch=monkeypatch, capsys=capsys)
    assert "layers 'x' are not understood" in wrong


def test_of_a_folder_of_several_models_one_is_chosen(files):
    a, b = files
    write_vectors(replace(a, provenance=replace(a.provenance, model="one")), "folder", "caa")
    write_vectors(replace(b, provenance=replace(b.provenance, model="two")), "folder", "caa")
    output("convert", "folder", "two.safetensors", "--model", "two")
    assert torch.equal(SteeringVectors.load("two.safetensors").directions, b.directions)
