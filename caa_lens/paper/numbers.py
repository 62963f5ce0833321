"""The numbers that the paper published, as tidy frames, and ours beside them.

*Steering Llama 2 via Contrastive Activation Addition*, arXiv 2312.06681 v4 (ACL 2024). `paper_numbers.json` holds
its tables; every frame from here has one row a published cell.

| table | columns before `value` | what `value` is |
|---|---|---|
| `ab` | behavior, layer, multiplier | mean p(matching), 50 held-out questions (Figure 4) |
| `system_prompt` | behavior, layer, system, multiplier | the same; system `positive`, `negative` or `none` (Table 3) |
| `mmlu` | behavior, layer, multiplier | mean p(correct) (Table 5) |
| `open_ended` | behavior, layer, multiplier | judge's score, 0 to 10 (Figure 5) |
| `finetune_ab` | behavior, layer, finetune, multiplier | mean p(matching) after finetuning `positive` or `negative` |
| `finetune_open_ended` | behavior, layer, finetune, multiplier | judge's score, 0 to 10; also finetune `none` |
| `finetune_accuracy` | behavior, finetune | share of test questions answered as trained, unsteered |
| `truthful_qa` | behavior, layer, multiplier | mean over categories of p(correct) (Table 12) |
| `layer_transfer` | behavior, layer, multiplier | p(matching), layer 13's vector added at `layer` (Figure 8) |
| `base_to_chat_transfer` | behavior, layer, multiplier | p(matching), the base model's vectors (Figure 10) |
| `dataset_sizes` | behavior, split | number of questions; the same for every model |

Multiplier 0 is a row of its own wherever the paper states the unsteered model.
"""

import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from caa_lens.contrast.files import PAPER_SETS

if TYPE_CHECKING:
    import pandas

_NUMBERS: dict[str, Any] = json.loads((files("caa_lens.paper") / "paper_numbers.json").read_text(encoding="utf-8"))

TABLES: tuple[str, ...] = tuple(_NUMBERS["tables"])

SYSTEM_PROMPTS: dict[str, dict[str, str]] = _NUMBERS["system_prompts"]
"""Of every behavior, the system prompts that ask for it (`positive`) and against it (`negative`); Table 14."""

BEHAVIORS: tuple[str, ...] = PAPER_SETS
"""The paper's seven behaviors, by the names of the authors' folders."""

DATASET_SIZES: dict[str, dict[str, int]] = {
    row["behavior"]: dict(zip(row["split"], row["value"], strict=True)) for row in _NUMBERS["tables"]["dataset_sizes"]
}
"""Questions of every behavior's `generate` and `test` set."""


def published(table: str, model: str) -> "pandas.DataFrame":
    """The cells of one of the paper's tables for a model; columns as in the module's table, last `value`.

    Args:
        table: one of `TABLES`.
        model: the model's name; what stands before its last slash does not count, nor does upper case.

    Returns:
        An empty frame, with the table's columns, where the paper has no such numbers of that model.

    Raises:
        ValueError: there is no such table.
    """
    import pandas as pd

    if table not in TABLES:
        raise ValueError(f"got table {table!r}, expected one of {', '.join(TABLES)}")
    name = model.rstrip("/").rsplit("/", 1)[-1].lower()
    every = _NUMBERS["tables"][table]
    columns = [column for column in every[0] if column != "model"]
    series = [one for one in every if one.get("model", name).lower() == name]
    lists = [column for column in columns if isinstance(every[0][column], list)]
    frame = pd.DataFrame(series, columns=columns).explode(lists, ignore_index=True)
    kinds = {"layer": int, "multiplier": float, "value": float}
    return frame.astype({column: kind for column, kind in kinds.items() if column in columns})


def compare(ours: "pandas.DataFrame", table: str, model: str) -> "pandas.DataFrame":
    """Our measurements with the paper's beside them, cell by cell.

    Args:
        ours: `mean`, `low` and `high` (its confidence interval) and the table's other columns: behavior, multiplier,
            and where the table has several, system, finetune or layer.
        table: one of `TABLES`.
        model: as in `published`.

    Returns:
        A copy of `ours` with `paper`; `difference`, which is `mean` minus `paper`; and `paper_within_interval`, 1.0
        where `low <= paper <= high`, else 0.0. All three are NaN where the paper has no such cell.

    Raises:
        ValueError: there is no such table, or `ours` lacks a column.
    """
    import numpy as np

    theirs = published(table, model)
    columns = [column for column in theirs if column != "value"]
    # Where the paper uses one layer only, results that do not state theirs are still comparable.
    stated = [column for column in columns if column in ours or column != "layer" or theirs["layer"].nunique() > 1]
    if missing := [column for column in [*stated, "mean", "low", "high"] if column not in ours]:
        raise ValueError(
            f"cannot compare with the paper's table {table!r}: got the columns {', '.join(map(str, ours))}, "
            f"expected also {', '.join(map(str, missing))}"
        )
    cells = {tuple(key): value for *key, value in theirs[[*stated, "value"]].itertuples(index=False)}
    paper = np.array([cells.get(key, np.nan) for key in ours[stated].itertuples(index=False, name=None)], dtype=float)
    within = np.where(np.isnan(paper), np.nan, (ours["low"] <= paper) & (paper <= ours["high"]))
    return ours.assign(paper=paper, difference=ours["mean"] - paper, paper_within_interval=within)
