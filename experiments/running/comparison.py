"""Ours beside the paper's, cell by cell: the cells that both have."""

from typing import TYPE_CHECKING

from experiments.running.settings import RunConfig

if TYPE_CHECKING:
    import pandas as pd


def beside_the_paper(cells: "pd.DataFrame", table: str, config: RunConfig) -> "pd.DataFrame":
    """Cells (with `mean, low, high`) joined to the paper's for this model, as they are shown.

    Only the cells that the paper has too: none, where we steer at another layer. Where the paper has no such table of
    this model, all of ours, alone. Nothing is said of an interval where there is none.
    """
    import pandas as pd

    from caa_lens.paper.numbers import compare

    shown = cells.drop(columns=["metric"], errors="ignore")
    if has_paper_numbers(table, config):
        shown = compare(shown, table, config.model_name)
        shown = shown[shown["paper"].notna()].reset_index(drop=True)
        within = shown.pop("paper_within_interval").map({1.0: "yes", 0.0: "no"}).astype(object)
        shown["paper within interval"] = within.where(shown["low"].notna(), "")
    shown = shown.rename(columns={"mean": "ours", "low": "95 % low", "high": "95 % high"})
    numbers = [column for column in shown if pd.api.types.is_float_dtype(shown[column]) and column != "multiplier"]
    return shown.assign(**{column: shown[column].round(4) for column in numbers})


def paper_tables(cells: "pd.DataFrame", table: str, config: RunConfig) -> list[tuple[str, "pd.DataFrame"]]:
    """Our cells beside the paper's, with a caption, for a section; none where the paper has none, or we have none."""
    if not has_paper_numbers(table, config) or cells.empty:
        return []
    return [("Beside the paper's, cell by cell", beside_the_paper(cells, table, config))]


def has_paper_numbers(table: str, config: RunConfig) -> bool:
    from caa_lens.paper.numbers import published

    return config.data == "paper" and len(published(table, config.model_name)) > 0


def grid(cells: "pd.DataFrame", rows: list[str], column: str, *, digits: int = 3) -> "pd.DataFrame":
    """For reading: one row a behavior (and what else is in `rows`), one column a value, `mean [low, high]`."""
    text = [
        f"{c.mean:.{digits}f} [{c.low:.{digits}f},\N{NO-BREAK SPACE}{c.high:.{digits}f}]"
        for c in cells[["mean", "low", "high"]].itertuples(index=False, name="Cell")
    ]
    labels = [f"{v:+g}" if v else "0" for v in cells[column]] if cells[column].dtype.kind == "f" else cells[column]
    order = list(dict.fromkeys(labels))
    table = cells.assign(_text=text, _label=list(labels)).pivot(index=rows, columns="_label", values="_text")
    table = table.reindex(cells.set_index(rows).index.drop_duplicates())[order]
    table.columns.name = None
    return table.reset_index()
