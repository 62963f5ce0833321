"""What the command line is asked and how it answers: messages, several vectors, drawn text, and a lens in a file."""

import json

import pandas as pd
import pytest
from helpers.models import load_in_its_place, random_vectors
from typer.testing import CliRunner

import caa_lens
from caa_lens.cli import commands as cli
from caa_lens.cli.options import read_question
from caa_lens.steering.interventions import Intervention

pytestmark = pytest.mark.one_kind

runner = CliRunner()
TALK = [
    {"role": "system", "content": "You are a pirate."},
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Ahoy!"},
    {"role": "user", "content": "Where are you?"},
]


@pytest.fixture
def small_model(tiny_chat, monkeypatch):
    load_in_its_place(monkeypatch, lambda *args, **kwargs: tiny_chat)
    return tiny_chat


@pytest.fixture
def files(small_model, tmp_path):
    """Two files of vectors, of several layers and of one."""
    several, one = tmp_path / "several.safetensors", tmp_path / "one.safetensors"
    random_vectors(small_model, layers=[1, 2, 3], scale=0.5, seed=1).save(several)
    random_vectors(small_model, layers=[2], scale=0.5, seed=2).save(one)
    return several, one


def said(*words):
    done = runner.invoke(cli.app, ["generate", *map(str, words), "--max-new-tokens", "5"])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def texts(model, prompt, vectors=(), **options):
    return caa_lens.generate(model, prompt, list(vectors), max_new_tokens=5, **options) + "\n"


def refusal(words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["caa-lens", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_several_vectors_act_each_with_its_layer_and_multiplier(small_model, files):
    several, one = (caa_lens.SteeringVectors.load(file) for file in files)
    both = ("--vectors", files[0], "--vectors", files[1])
    each = (*both, "--layer", 3, "--layer", 2, "--multiplier", 1.5, "--multiplier=-2")
    expected = texts(small_model, "Hi", [(several[3], 1.5), (one[2], -2.0)])
    assert said("Hi", *each) == expected != said("Hi")
    assert said("Hi", "--vector", files[0], "--vector", files[1], *each[4:]) == expected
    for_all = texts(small_model, "Hi", [(several[2], 0.5), (one[2], 0.5)])
    assert said("Hi", *both, "--layer", 2, "--multiplier", 0.5) == for_all
    twice = ("--vectors", files[0], "--vectors", files[0], "--layer", 1, "--layer", 3)
    assert said("Hi", *twice) == texts(small_model, "Hi", [several[1], several[3]])


def test_a_file_of_one_layer_needs_no_layer(small_model, files):
    (vector,) = caa_lens.SteeringVectors.load(files[1])
    assert said("Hi", "--vectors", files[1]) == texts(small_model, "Hi", [vector])


def test_steering_may_start_at_any_token(small_model, files):
    (vector,) = caa_lens.SteeringVectors.load(files[1])
    steered = [Intervention(vector=vector, multiplier=3.0, start=0)]
    found = said("Hi", "--vectors", files[1], "--multiplier", 3, "--start", 0)
    assert found == texts(small_model, "Hi", steered)
    assert found != said("Hi", "--vectors", files[1], "--multiplier", 3)


def test_text_may_be_drawn_under_a_system_prompt_in_any_format(small_model):
    drawn = said("Hi", "--temperature", 1.5, "--seed", 3)
    assert drawn == texts(small_model, "Hi", temperature=1.5, seed=3) != said("Hi", "--temperature", 1.5)
    assert said("Hi", "--temperature", 1.5) == texts(small_model, "Hi", temperature=1.5, seed=0)
    assert said("Hi", "--system", "Be kind.") == texts(small_model, "Hi", system="Be kind.")
    raw = said("Once upon a time", "--prompt-format", "raw")
    assert raw == texts(small_model, "Once upon a time", prompt_format="raw") != said("Once upon a time")


def test_messages_are_given_as_json_or_in_a_file(small_model, tmp_path):
    (tmp_path / "talk.json").write_text(json.dumps(TALK, indent=1), encoding="utf-8")
    (tmp_path / "wrapped.json").write_text(json.dumps({"messages": TALK}), encoding="utf-8")
    expected = texts(small_model, TALK)
    assert expected != said("Where are you?")
    for prompt in (json.dumps(TALK), tmp_path / "talk.json", tmp_path / "wrapped.json"):
        assert said(prompt) == expected
    beside = said(json.dumps(TALK[1:]), "--system", "You are a pirate.")
    assert beside == expected


def test_words_that_look_a_little_like_messages_stay_words():
    for text in ("How do I read a.json", "[INST] Hi", "[1, 2]", "{}", "What is [{x: 1}]?", " [ "):
        assert read_question(text) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[{'role': 'user', 'content': 'x'}]",
            r"the messages cannot be read as JSON .* expected \[{\"role\": \"user\"",
        ),
        ('[{"role": "user", "content": "x"}, 3]', r"the messages: expected .*, got a list of dict, int"),
        ('[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]', "the assistant's last"),
    ],
)
def test_messages_that_are_none_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_question(text)


def test_a_file_that_is_not_there_or_holds_something_else_is_told(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_question(str(tmp_path / "nowhere.json"))
    (tmp_path / "a.json").write_text('{"x": 1}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a.json: expected \[{.*, got dict"):
        read_question(str(tmp_path / "a.json"))


def test_what_generate_cannot_do_ends_in_one_line(files, monkeypatch, capsys):
    several, one = files
    for words, message in (
        (["--vectors", several], "which layer's vector? add --layer; "),
        (["--vectors", one, "--vectors", several], "which layer's vector? add --layer; "),
        (["--vectors", one, "--layer", 2, "--layer", 2], "--layer is said 2 times for 1 file of vectors: say it once"),
        (
            ["--vectors", one, "--vectors", one, *["--multiplier", 1] * 3],
            "--multiplier is said 3 times for 2 files of vectors",
        ),
        (["--start", 3], "nothing to steer with: --start needs a file of vectors, add --vectors FILE"),
        (["--layer", 1, "--multiplier", 2], "nothing to steer with: --layer and --multiplier need a file"),
        (["--vectors", one, "--start=-1"], "--start must be 0 or more, got -1"),
        (["--seed", 3], "at temperature 0 nothing is drawn, and a seed changes nothing: add --temperature"),
        (["--temperature=-1"], "temperature must be 0 (greedy) or more, got -1"),
        (["--prompt-format", "chatml"], "unknown prompt format 'chatml': expected one of llama2-chat"),
    ):
        error = refusal(["generate", "Hi", *words], monkeypatch, capsys)
        assert error.startswith("error: "), error
        assert message in error
        assert "Traceback" not in error
    error = refusal(["generate", json.dumps(TALK), "--system", "Be kind."], monkeypatch, capsys)
    assert "got system='Be kind.' beside the message of the system" in error
    error = refusal(["generate", json.dumps(TALK), "--prompt-format", "raw"], monkeypatch, capsys)
    assert "got messages for the format 'raw'" in error


def test_similarity_and_the_causal_lens_take_messages(small_model, files, tmp_path):
    page, prompts = tmp_path / "s.html", tmp_path / "prompts.json"
    done = runner.invoke(cli.app, ["similarity", json.dumps(TALK), str(files[0]), "--out", str(page)])
    assert done.exit_code == 0, done.output
    text = page.read_text(encoding="utf-8")
    assert "pirate" in text
    prompts.write_text(json.dumps([TALK, "How was your day?"]), encoding="utf-8")
    words = [
        "lens",
        files[0],
        "--reading",
        "causal",
        "--prompts",
        prompts,
        "--controls",
        0,
        "--out",
        tmp_path / "l.csv",
    ]
    done = runner.invoke(cli.app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    vectors = caa_lens.SteeringVectors.load(files[0])
    expected = caa_lens.logit_lens(
        small_model, vectors, k=8, reading="causal", prompts=[TALK, "How was your day?"], controls=0, progress=False
    )
    found = pd.read_csv(tmp_path / "l.csv", keep_default_na=False)
    assert list(found["token_id"]) == list(expected.frame["token_id"])


@pytest.mark.parametrize("words", [False, True], ids=["tokens", "words"])
def test_a_lens_is_written_by_the_ending_of_its_file(words, small_model, files, tmp_path):
    vectors = caa_lens.SteeringVectors.load(files[0])
    options = ["--words", "good,bad"] if words else []
    expected = (
        caa_lens.word_ranks(small_model, vectors, ["good", "bad"])
        if words
        else caa_lens.logit_lens(small_model, vectors, k=8)
    )
    for ending in ("parquet", "csv", "json", "html"):
        out = tmp_path / f"lens_{ending}.{ending}"
        done = runner.invoke(cli.app, ["lens", str(files[0]), *options, "--out", str(out)])
        assert done.exit_code == 0, done.output
        assert f"written to {out}" in done.output
        assert str(expected.summary().index[0]) in done.output
    kind = type(expected)
    assert kind.load(tmp_path / "lens_parquet.parquet").frame.equals(expected.frame)
    assert (tmp_path / "lens_parquet.html").is_file()
    found = pd.read_csv(tmp_path / "lens_csv.csv", keep_default_na=False)
    assert list(found["token"]) == list(expected.frame["token"])
    assert list(found["score"]) == pytest.approx(list(expected.frame["score"]))
    about = json.loads((tmp_path / "lens_json.json").read_text(encoding="utf-8"))
    assert about["kind"] == kind.__name__
    assert about["settings"] == dict(expected.settings)
    assert [row["token_id"] for row in about["rows"]] == list(expected.frame["token_id"])
    assert "plotly" in (tmp_path / "lens_html.html").read_text(encoding="utf-8")


def test_a_lens_that_cannot_be_written_is_refused_before_the_model_is_loaded(files, tmp_path, monkeypatch, capsys):
    load_in_its_place(monkeypatch, lambda *args, **kwargs: pytest.fail("a model was loaded"))
    error = refusal(["lens", files[0], "--out", tmp_path / "x.txt"], monkeypatch, capsys)
    assert (
        "written as .parquet (with its settings and a figure), .csv, .json or .html (its figure), got 'x.txt'" in error
    )
    (tmp_path / "x.parquet").write_bytes(b"")
    error = refusal(["lens", files[0], "--out", tmp_path / "x.json"], monkeypatch, capsys)
    assert "belongs to the result x.parquet: choose another name" in error


def test_the_lens_and_text_are_of_the_dtype_that_is_asked_for(files, tmp_path, monkeypatch, tiny_chat):
    asked = []
    load_in_its_place(monkeypatch, lambda *args, **options: asked.append(options) or tiny_chat)
    runner.invoke(cli.app, ["lens", str(files[1]), "--dtype", "bfloat16", "--device", "cpu"])
    assert [(one["dtype"], one["device"]) for one in asked] == [("bfloat16", "cpu")]
