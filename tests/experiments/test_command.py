"""`python -m experiments`: its defaults, a run from it, and that a mistake is one line and leaves nothing behind."""

import importlib.util
import json
import re

import pandas as pd
import pytest
import torch
import typer
from helpers.experiments_command import command
from helpers.models import random_llama

from caa_lens.contrast.files import PAPER_SETS
from experiments.__main__ import main
from experiments.running.beforehand import n_layers
from experiments.running.run_folder import OtherRunError
from experiments.running.settings import SIZES, RunConfig

LLAMA = "meta-llama/Llama-2-7b-chat-hf"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a random Llama of few layers; without a tokenizer, as nothing here gets so far."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    random_llama(folder)
    return str(folder)


# ---- defaults --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_for_llama_2_chat_nothing_need_be_said_to_do_as_the_paper_did(size):
    config = RunConfig.of(f"meta-llama/Llama-2-{size}-chat-hf")
    assert config == RunConfig.of(
        config.model, "paper", base_model=f"meta-llama/Llama-2-{size}-hf", data="paper", behaviors=PAPER_SETS
    )
    assert (config.n_test, config.layer_step, config.max_new_tokens) == (50, 1, 100)
    assert (config.n_generate, config.n_prompts, config.n_questions) == (None, None, None)
    assert (config.layer, config.dtype) == {"7b": (13, "float32"), "13b": (14, "float16")}[size]
    assert RunConfig.of(config.model, layer=12).layer == 12
    assert RunConfig.of(config.model, "small", n_test=9).n_generate == SIZES["small"]["n_generate"]
    assert RunConfig.of(config.model, base_model="none").base_model is None


def test_all_other_models_start_small_and_without_a_base_model():
    for name in ("demo", "someone/else-chat-hf", "meta-llama/Llama-2-7b-hf"):
        config = RunConfig.of(name)
        assert (config.n_test, config.base_model) == (SIZES["small"]["n_test"], None)


def test_a_run_of_no_behaviors_is_refused():
    with pytest.raises(ValueError, match="behaviors"):
        RunConfig.of("demo", behaviors=())


def test_a_folder_of_llama_takes_the_base_model_beside_it(tmp_path):
    chat = tmp_path / "Llama-2-7b-chat-hf"
    assert RunConfig.of(str(chat)).base_model == "meta-llama/Llama-2-7b-hf"
    (tmp_path / "Llama-2-7b-hf").mkdir()
    assert RunConfig.of(str(chat)).base_model == str(tmp_path / "Llama-2-7b-hf")


def test_a_run_without_the_papers_data_names_the_one_command_and_leaves_nothing(no_data, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.__main__.n_layers", lambda model, fetch: 32)
    with pytest.raises(
        FileNotFoundError, match=r"no coordinate-other-ais, .*refusal\. `caa-lens data fetch` gets every"
    ):
        main(["vectors"], model=LLAMA, out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# ---- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("layer", 99, r"layer is 99, but tiny has layers 0 to 2: give another with --layer"),
        ("layer", -1, r"layer is -1, expected at least 0: give another with --layer"),
        ("dtype", "int8", r"dtype is 'int8', expected 'float32', 'bfloat16' or 'float16': give another with --dtype"),
        ("data", "x", r"data is 'x', expected 'bundled' or 'paper': give another with --data"),
        ("n_test", 1, r"n_test is 1, expected at least 2: give another with --n-test"),
        ("behaviors", "a,a", r"behaviors must differ, got a, a: name each once with --behaviors"),
        ("device", "tpu", r"device is 'tpu', but this machine has 1 cpu.*: give another with --device"),
        ("device", "cpu:1", r"device is 'cpu:1', but this machine has"),
        ("workers", 0, r"workers is 0, expected at least 1: give another with --workers"),
        ("flops", 1e12, r"got --flops 1000000000000\.0 and --bandwidth None, expected two"),
        ("gpu", "gtx", r"got --gpu gtx, expected one of t4, .*h100.*; of another card, give --flops and --bandwidth"),
        ("size", "huge", r"unknown size 'huge': expected one of small, paper"),
        ("finetune", "some", r"finetune is 'some', expected 'full' or 'lora'"),
    ],
)
def test_a_setting_that_does_not_fit_is_told_in_a_line_and_leaves_nothing(model, tmp_path, option, value, said):
    with pytest.raises(ValueError, match=said) as caught:
        main(["vectors"], **{"model": model, "out": tmp_path / "run", option: value})
    text = str(caught.value)
    assert "\n" not in text
    assert "pydantic" not in text
    assert "http" not in text
    assert list(tmp_path.iterdir()) == []


def test_several_misfits_are_told_at_once():
    with pytest.raises(ValueError, match=r"dtype is 'x', .*; n_test is 0, expected at least 2"):
        RunConfig.of("demo", dtype="x", n_test=0)
    with pytest.raises(ValueError, match="unknown setting 'colour': expected some of model, "):
        RunConfig.of("demo", colour="blue")


def test_a_file_in_the_place_of_the_run_folder_is_told(model, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below" / "it"):
        with pytest.raises(ValueError, match=rf"{file} is a file, expected a folder .*--out"):
            main(["vectors"], model=model, out=out)
    assert file.read_text() == "mine"


def test_a_model_that_is_not_there_is_told_before_anything_is_written(tmp_path):
    for name in (str(tmp_path / "none"), "a/b/c", "none.gguf", "nothing"):
        with pytest.raises(FileNotFoundError, match=r"there is no model .* give another with --model"):
            main(["vectors"], model=name, out=tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        main(["vectors"], model=str(tmp_path / "empty"), out=tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_the_depth_is_read_from_the_configuration(model):
    assert n_layers(model, fetch=False) == 3
    assert n_layers("demo", fetch=False) == 30
    assert n_layers("meta-llama/Llama-2-13b-chat-hf", fetch=False) == 40
    assert n_layers("someone/else", fetch=False) is None


def test_on_the_command_line_a_mistake_is_one_line_and_no_traceback(model, tmp_path):
    done = command("vectors", "--model", model, "--layer", "99", "--out", str(tmp_path / "run"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: layer is 99, but tiny has layers 0 to 2: give another with --layer, or none for the one that the layer "
        "sweep finds best"
    ]
    assert not (tmp_path / "run").exists()


def test_help_says_what_is_the_default_for_llama(model):
    done = command("--help", COLUMNS="200")
    assert "paper by default for Llama 2's chat models" in done.stdout
    assert "python -m experiments all --model meta-llama/Llama-2-7b-chat-hf" in re.sub(r"\s+", " ", done.stdout)
    assert "--bandwidth" in done.stdout


# ---- a run -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_command_runs_one_experiment_with_what_it_needs_and_refuses_other_settings(models, tmp_path, capsys):
    several = ("--workers", "2") if importlib.util.find_spec("ray") else ()
    words = ("multipliers", "--model", str(models / "chat"), "--behaviors", "sentiment", "--n-generate", "4")
    words += ("--n-test", "3", "--layer-step", "2", "--out", str(tmp_path / "run"))
    done = command(*words, *several)
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stderr == ""  # no word of Ray's
    assert "ray" not in done.stdout.lower().replace("array", "")
    assert "Effect by multiplier (Figure 4)" in done.stdout
    assert "0 of 3 experiments failed" in done.stdout
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["config"]["n_test"] == 3
    assert set(about["data"]) == {"sentiment/generate", "sentiment/validation", "sentiment/test"}
    (first,) = json.loads((tmp_path / "run" / "starts.json").read_text())  # once, not once a worker
    assert first["settings"]["n_test"] == 3
    assert first["versions"]["torch"] == torch.__version__
    assert first["command"].startswith("python -m experiments multipliers --model ")
    assert (first["device"] is None) == bool(several)  # workers choose theirs
    settings = {"model": str(models / "chat"), "behaviors": "sentiment", "n_generate": 4, "n_test": 3, "layer_step": 2}
    main(["multipliers"], out=tmp_path / "alone", **settings)  # by this process: the same to the bit
    assert "0 of 3 experiments failed" in capsys.readouterr().out
    for file in (tmp_path / "alone").rglob("*.*"):
        twin = tmp_path / "run" / file.relative_to(tmp_path / "alone")
        if file.suffix == ".parquet":
            pd.testing.assert_frame_equal(pd.read_parquet(file), pd.read_parquet(twin), check_exact=True)
        elif file.name not in ("run.json", "starts.json"):
            assert file.read_bytes() == twin.read_bytes(), file
    with pytest.raises(typer.Exit):  # status 1
        main(
            ["multipliers", "judged"],
            out=tmp_path / "run",
            judge="x",
            judge_url="http://127.0.0.1:9/v1",
            **settings,
        )
    said = capsys.readouterr().out
    assert "not complete: 7 of 7 units are left undone (the judge at http://127.0.0.1:9/v1 cannot be used" in said
    assert "0 of 5 experiments failed" in said
    assert len(json.loads((tmp_path / "run" / "starts.json").read_text())) == 2
    with pytest.raises(OtherRunError, match=r"config\.seed: 0 there, 1 now"):
        main(["multipliers"], out=tmp_path / "run", seed=1, **settings)
    with pytest.raises(ValueError, match="unknown experiments figure3: expected all, or some of"):
        main(["figure3"])
