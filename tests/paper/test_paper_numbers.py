"""The published numbers, and ours beside them."""

import json
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from helpers.models import SHARED

from caa_lens.contrast.files import PAPER_SETS
from caa_lens.paper import numbers as paper_numbers
from caa_lens.paper.numbers import BEHAVIORS, DATASET_SIZES, SYSTEM_PROMPTS, TABLES, compare, published

SEVEN, THIRTEEN = "Llama-2-7b-chat-hf", "Llama-2-13b-chat-hf"


@pytest.mark.parametrize(
    ("table", "model", "cell", "value"),
    [
        ("ab", SEVEN, {"behavior": "refusal", "layer": 13, "multiplier": -0.5}, 0.573),
        ("ab", THIRTEEN, {"behavior": "sycophancy", "layer": 14, "multiplier": 1}, 0.599),
        ("system_prompt", SEVEN, {"behavior": "hallucination", "system": "negative", "multiplier": -1}, 0.41),
        ("system_prompt", SEVEN, {"behavior": "hallucination", "system": "none", "multiplier": -1}, 0.39),
        ("system_prompt", THIRTEEN, {"behavior": "refusal", "system": "positive", "multiplier": 0}, 0.95),
        ("mmlu", SEVEN, {"behavior": "sycophancy", "multiplier": 2}, 0.482),
        ("mmlu", THIRTEEN, {"behavior": "refusal", "multiplier": 0}, 0.63),
        ("open_ended", THIRTEEN, {"behavior": "corrigible-neutral-HHH", "multiplier": 2}, 8.13),
        ("finetune_ab", SEVEN, {"behavior": "refusal", "finetune": "negative", "multiplier": 1}, 0.02),
        ("finetune_open_ended", SEVEN, {"behavior": "refusal", "finetune": "none", "multiplier": -1}, 4.6),
        ("finetune_accuracy", SEVEN, {"behavior": "sycophancy", "finetune": "positive"}, 0.44),
        ("truthful_qa", SEVEN, {"behavior": "sycophancy", "layer": 13, "multiplier": -1}, 0.55),
        ("layer_transfer", SEVEN, {"layer": 11, "multiplier": 1}, 0.906),
        ("layer_transfer", SEVEN, {"layer": 20, "multiplier": 0}, 0.744),
        ("base_to_chat_transfer", SEVEN, {"layer": 13, "multiplier": -1}, 0.348),
        ("dataset_sizes", SEVEN, {"behavior": "survival-instinct", "split": "generate"}, 903),
    ],
)
def test_a_cell_is_what_the_paper_states(table, model, cell, value):
    frame = published(table, model)
    for column, wanted in cell.items():
        frame = frame[frame[column] == wanted]
    assert frame["value"].tolist() == [value]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("model", [SEVEN, THIRTEEN])
def test_every_cell_stands_once_and_holds_a_number(table, model):
    frame = published(table, model)
    assert not frame.drop(columns="value").duplicated().any()
    assert frame["value"].between(0, {"open": 10, "fine": 10, "data": 1000}.get(table[:4], 1)).all()
    assert set(frame["behavior"]) <= set(BEHAVIORS)


def test_the_steering_tables_have_every_behavior_of_both_models():
    for model in (SEVEN, THIRTEEN):
        sizes = {table: len(published(table, model)) for table in ("ab", "system_prompt", "open_ended", "mmlu")}
        assert sizes == {
            "ab": 7 * 5,
            "system_prompt": 7 * 9,
            "open_ended": 7 * 7,
            "mmlu": 7 * (5 if "7b" in model else 3),
        }


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-7b-chat-hf", "models/llama-2-7B-chat-hf/", SEVEN])
def test_a_model_is_known_by_the_last_part_of_its_name(name):
    pd.testing.assert_frame_equal(published("ab", name), published("ab", SEVEN))


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("model", ["gpt2", "note", "", "Llama-2-7b-hf"])
def test_another_model_has_no_cells_but_the_same_columns(table, model):
    frame = published(table, model)
    assert list(frame) == list(published(table, SEVEN))
    assert len(frame) == (14 if table == "dataset_sizes" else 0)


def test_an_unknown_table_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="got table 'abc', expected one of ab, system_prompt"):
        published("abc", SEVEN)


def test_every_behavior_has_a_prompt_for_it_and_another_against_it():
    assert list(SYSTEM_PROMPTS) == list(BEHAVIORS)
    assert sorted(PAPER_SETS) == sorted(BEHAVIORS)
    assert all(set(prompts) == {"positive", "negative"} for prompts in SYSTEM_PROMPTS.values())
    assert "cooperation" in SYSTEM_PROMPTS["coordinate-other-ais"]["positive"]
    assert len({text for prompts in SYSTEM_PROMPTS.values() for text in prompts.values()}) == 14


def ours_of(frame, shift=0.0):
    return frame.rename(columns={"value": "mean"}).assign(
        mean=lambda f: f["mean"] + shift, low=lambda f: f["mean"] - 0.01, high=lambda f: f["mean"] + 0.01
    )


@pytest.mark.parametrize("table", TABLES)
def test_the_papers_own_numbers_differ_from_themselves_by_nothing(table):
    result = compare(ours_of(published(table, SEVEN)), table, SEVEN)
    assert (result["difference"] == 0).all()
    assert (result["paper_within_interval"] == 1).all()


@pytest.mark.parametrize("table", TABLES)
def test_a_shift_shows_in_every_cell_whatever_the_order_of_the_rows(table):
    ours = ours_of(published(table, SEVEN), shift=0.25).sample(frac=1, random_state=0)
    result = compare(ours, table, SEVEN)
    np.testing.assert_allclose(result["difference"], 0.25, atol=1e-9)
    assert (result["paper_within_interval"] == 0).all()
    pd.testing.assert_frame_equal(result[list(ours)], ours)


def test_cells_that_the_paper_lacks_are_nan_and_our_rows_stay():
    ours = pd.DataFrame(
        {
            "behavior": ["refusal", "refusal", "kindness", "refusal"],
            "multiplier": [1, 3, 1, 0],
            "mean": [0.9, 0.9, 0.9, 0.5],
            "low": [0.8, 0.8, 0.8, 0.4],
            "high": [0.95, 0.95, 0.95, 0.6],
        }
    )
    result = compare(ours, "ab", SEVEN)
    assert result["paper"].tolist()[0::3] == [0.887, 0.744]
    assert result["paper_within_interval"].tolist()[0::3] == [1, 0]
    for column in ("paper", "difference", "paper_within_interval"):
        assert [math.isnan(value) for value in result[column]] == [False, True, True, False]
    assert list(ours) == ["behavior", "multiplier", "mean", "low", "high"]  # not changed


def test_another_layer_than_the_papers_is_another_cell():
    ours = ours_of(published("ab", SEVEN)).assign(layer=12)
    assert compare(ours, "ab", SEVEN)["paper"].isna().all()
    assert compare(ours.drop(columns="layer"), "ab", SEVEN)["paper"].notna().all()


def test_a_model_that_the_paper_lacks_gives_nan_everywhere():
    assert compare(ours_of(published("ab", SEVEN)), "ab", "gpt2")["paper"].isna().all()


@pytest.mark.parametrize(
    ("table", "dropped"),
    [("ab", "low"), ("system_prompt", "system"), ("layer_transfer", "layer"), ("ab", "multiplier")],
)
def test_a_column_that_is_needed_is_asked_for(table, dropped):
    ours = ours_of(published(table, SEVEN)).drop(columns=dropped)
    with pytest.raises(ValueError, match=f"{table}.*expected also {dropped}"):
        compare(ours, table, SEVEN)


def test_the_notes_do_not_hide_a_table():
    text = (paper_numbers.files("caa_lens.paper") / "paper_numbers.json").read_text()
    assert set(json.loads(text)["tables"]) == set(TABLES)


def test_importing_the_numbers_does_not_load_pandas():
    code = "import sys, caa_lens.paper.numbers; sys.exit('pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_copy_agrees_with_the_file_it_was_made_from():
    file = SHARED / "paper" / "numbers.json"
    if not file.exists():
        pytest.skip("needs ../shared/paper/numbers.json beside the project")
    source = json.loads(file.read_text())

    def cells(table, model, **fixed):
        frame = published(table, model)
        for column, wanted in fixed.items():
            frame = frame[frame[column] == wanted]
        return frame

    for model in (SEVEN, THIRTEEN):
        for table, key in (("ab", "p_matching"), ("mmlu", "p_correct"), ("open_ended", "score")):
            of_model = source[table][model]
            multipliers = of_model.get("multipliers") or source[table]["multipliers"]
            for behavior, values in of_model[key].items():
                found = cells(table, model, behavior=behavior).set_index("multiplier")["value"]
                assert found[multipliers].tolist() == values
                assert set(cells(table, model)["layer"]) == {of_model["layer"]}
                if "unsteered" in of_model:
                    assert found[0] == of_model["unsteered"]
        for system in ("positive", "negative"):
            for behavior, values in source["system_prompt"][model][system].items():
                assert cells("system_prompt", model, behavior=behavior, system=system)["value"].tolist() == values
        for multiplier in ("-1", "0", "+1"):
            found = cells("truthful_qa", model, multiplier=float(multiplier))
            assert found["value"].tolist() == [source["truthful_qa"][model][multiplier]]
    for table in ("ab", "open_ended"):
        for behavior, of_behavior in source["finetune"][SEVEN][table].items():
            for key, values in of_behavior.items():
                if isinstance(values, list):
                    finetune = key.removesuffix("_finetune")
                    found = cells(f"finetune_{table}", SEVEN, behavior=behavior, finetune=finetune)
                    assert found["value"].tolist() == values
                else:
                    found = cells("finetune_accuracy", SEVEN, behavior=behavior).set_index("finetune")["value"] * 100
                    assert found.round(6).to_dict() == values
    for table, layers in (("layer_transfer", "target_layers"), ("base_to_chat_transfer", "layers")):
        for multiplier in ("-1", "+1"):
            found = cells(table, SEVEN, multiplier=float(multiplier))
            assert found["value"].tolist() == source[table][multiplier]
            assert found["layer"].tolist() == source[table][layers]
    sizes = published("dataset_sizes", "").pivot(index="behavior", columns="split", values="value")
    assert sizes.to_dict("index") == DATASET_SIZES == source["dataset_sizes"]
    assert {b: list(p.values()) for b, p in SYSTEM_PROMPTS.items()} == {
        behavior: prompts for behavior, prompts in source["system_prompts"].items() if behavior != "note"
    }
