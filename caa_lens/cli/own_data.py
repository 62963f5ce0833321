"""`caa-lens data check` and `data convert`: pairs of your own, looked at, and written in our form."""

from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from caa_lens.cli.options import DataArgument
from caa_lens.cli.outputs import check_out

ColumnsOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="What the file calls them, e.g. question=prompt,positive=chosen,negative=rejected."),
]
OnBadOption = Annotated[str, typer.Option(help="What to do with rows that are no pair: raise or drop.")]


def check(
    data: DataArgument,
    other: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A set or file, such as the test set, that should share no pair with it."),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--model", "-m", help="Look for its special tokens, and for answers that begin inside a token."),
    ] = None,
    columns: ColumnsOption = None,
    on_bad: OnBadOption = "raise",
) -> None:
    """Say what in a set of pairs may end up in its vector although it is not the behavior.

    Example: `caa-lens data check sentiment`
    """
    from caa_lens import ContrastSet, load_model

    pairs = ContrastSet.load(data, columns=_columns(columns), on_bad=_on_bad(on_bad))
    others = ContrastSet.load(other) if other else None
    typer.echo(pairs.check(other=others, model=load_model(model) if model else None))


def convert(
    data: DataArgument,
    out: Annotated[Path, typer.Argument(help="The .jsonl file to write.")],
    columns: ColumnsOption = None,
    on_bad: OnBadOption = "raise",
) -> None:
    """Write pairs of any form (CSV, TSV, parquet, preference data) as JSON lines, which every command takes.

    Example: `caa-lens data convert theirs.csv mine.jsonl --columns question=prompt,positive=chosen,negative=rejected`
    """
    from caa_lens import ContrastSet

    check_out(out, ".jsonl", "pairs are written")
    pairs = ContrastSet.load(data, columns=_columns(columns), on_bad=_on_bad(on_bad))
    pairs.save(out)
    n = pairs.dropped
    left = f", {n} row{'s' if n > 1 else ''} left out" if n else ""
    typer.echo(f"{len(pairs)} pairs{left}\nwritten to {out}")


def _columns(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    named = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() and column.strip() for name, _, column in named):
        raise ValueError(f"got --columns {text!r}, expected NAME=COLUMN,..., e.g. question=prompt,positive=chosen")
    return {name.strip(): column.strip() for name, _, column in named}


def _on_bad(word: str) -> Literal["raise", "drop"]:
    if word == "raise":
        return "raise"
    if word == "drop":
        return "drop"
    raise ValueError(f"got --on-bad {word}, expected raise or drop")
