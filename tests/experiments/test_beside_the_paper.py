"""Our numbers beside the paper's, cell by cell, and grids for reading."""

import numpy as np
import pandas as pd
import pytest
from helpers.made_up_scores import NBSP, PAPER_7B, paper_scores, section_of, tables_of
from helpers.stand_in_context import CONFIG

from experiments.running import comparison
from experiments.running.comparison import beside_the_paper, grid
from experiments.running.settings import RunConfig


def test_ours_stands_beside_the_papers_with_whether_it_lies_within():
    config = RunConfig.of("meta-llama/Llama-2-7b-chat-hf", "paper")
    assert (config.data, config.layer, config.dtype, len(config.behaviors)) == ("paper", 13, "float32", 7)
    cells = pd.DataFrame(
        {
            "behavior": ["refusal", "refusal"],
            "metric": "p_matching",
            "layer": 13,
            "multiplier": [-1.0, -0.5],
            "mean": [0.4, 0.4],
            "low": [0.3, 0.3],
            "high": [0.5, 0.5],
        }
    )
    shown = beside_the_paper(cells, "ab", config)
    assert list(shown["paper"]) == [0.423, 0.573]
    assert list(shown["difference"]) == [-0.023, -0.173]
    assert list(shown["paper within interval"]) == ["yes", "no"]
    elsewhere = beside_the_paper(cells.assign(multiplier=[-1.0, 7.0]), "ab", config)  # the paper has no such cell
    assert list(elsewhere["multiplier"]) == [-1.0]
    assert len(beside_the_paper(cells.assign(layer=3), "ab", config)) == 0
    alone = beside_the_paper(cells, "ab", RunConfig.of("demo"))
    assert "paper" not in alone
    assert grid(cells, ["behavior"], "multiplier").iloc[0].to_dict() == {
        "behavior": "refusal",
        "-1": "0.400 [0.300,\N{NO-BREAK SPACE}0.500]",
        "-0.5": "0.400 [0.300,\N{NO-BREAK SPACE}0.500]",
    }


@pytest.mark.parametrize(
    ("table", "columns", "name"),
    [
        ("ab", ["behavior"], "multipliers"),
        ("system_prompt", ["behavior", "system"], "system_prompts"),
        ("layer_transfer", ["behavior"], "vector_transfer"),
        ("base_to_chat_transfer", ["behavior"], "base_transfer"),
        ("mmlu", ["behavior"], "mmlu"),
        ("truthful_qa", ["behavior"], "truthful_qa"),
        ("finetune_ab", ["behavior", "finetune"], "finetuning"),
    ],
)
def test_each_section_meets_every_cell_of_the_papers_own_table(table, columns, name):
    frames, n_cells = paper_scores(table, columns)
    beside = tables_of(section_of(name, frames, PAPER_7B))["Beside the paper's, cell by cell"]
    assert len(beside) == n_cells
    assert beside["difference"].abs().max() < 1e-4
    assert set(beside["paper within interval"]) == {"yes"}
    assert "Beside the paper's, cell by cell" not in tables_of(section_of(name, frames, CONFIG))


def test_nothing_stands_beside_the_paper_where_it_has_no_table_or_there_are_no_cells():
    cells = pd.DataFrame(
        {"behavior": ["refusal"], "layer": 13, "multiplier": 1.0, "mean": 0.5, "low": 0.4, "high": 0.6}
    )
    assert [caption for caption, _ in comparison.paper_tables(cells, "ab", PAPER_7B)] == [
        "Beside the paper's, cell by cell"
    ]
    assert comparison.paper_tables(cells[:0], "ab", PAPER_7B) == []
    assert comparison.paper_tables(cells, "ab", CONFIG) == []
    assert not comparison.has_paper_numbers("ab", PAPER_7B.model_copy(update={"data": "bundled"}))
    assert not comparison.has_paper_numbers(
        "finetune_ab", PAPER_7B.model_copy(update={"model": "m/Llama-2-13b-chat-hf"})
    )


def test_numbers_beside_the_paper_are_rounded_and_one_answer_has_no_interval():
    cells = pd.DataFrame({"behavior": "refusal", "metric": "p_matching", "layer": 13, "multiplier": [-0.5, 0.5]})
    cells = cells.assign(mean=0.123456, low=[np.nan, 0.0], high=[np.nan, 0.111149])
    shown = comparison.beside_the_paper(cells, "ab", PAPER_7B)
    assert list(shown) == [
        *("behavior", "layer", "multiplier", "ours", "95 % low", "95 % high", "paper", "difference"),
        "paper within interval",
    ]
    assert shown["ours"].tolist() == [0.1235, 0.1235]
    assert shown["95 % high"].tolist()[1] == 0.1111
    assert shown["multiplier"].tolist() == [-0.5, 0.5]
    assert shown["paper within interval"].tolist() == ["", "no"]


def test_a_grid_has_its_rows_and_columns_in_the_order_of_the_cells():
    cells = pd.DataFrame(
        {
            "behavior": ["z", "z", "a", "a"],
            "side": ["right", "left", "right", "left"],
            "mean": [0.25, 1, 2, 3],
            "low": [0.5, 1, 2, 3],
            "high": [0.75, 1, 2, 3],
        }
    )
    shown = comparison.grid(cells, ["behavior"], "side", digits=2)
    assert shown.to_dict("list") == {
        "behavior": ["z", "a"],
        "right": [f"0.25 [0.50,{NBSP}0.75]", f"2.00 [2.00,{NBSP}2.00]"],
        "left": [f"1.00 [1.00,{NBSP}1.00]", f"3.00 [3.00,{NBSP}3.00]"],
    }
    assert shown.columns.name is None
