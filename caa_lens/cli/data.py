"""`caa-lens data`: fetch the paper's question sets, and say what is there; check and convert pairs of one's own."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from caa_lens.cli.options import App
from caa_lens.cli.own_data import check, convert
from caa_lens.cli.stopping import keeps

if TYPE_CHECKING:
    import pandas

data_app = App(
    help="The paper's question sets: fetch them, list them. Pairs of your own: check them, convert them.",
    rich_markup_mode="markdown",
)
data_app.command()(check)
data_app.command()(convert)

ToOption = Annotated[Optional[Path], typer.Option("--to", help="Data folder; the user's cache by default.")]  # noqa: UP045


@data_app.command()
def fetch(
    names: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="Behaviors, mmlu, truthfulqa; all by default.", metavar="NAME"),
    ] = None,
    source: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--from", help="Take the published files from this folder, not from the network."),
    ] = None,
    to: ToOption = None,
    original: Annotated[bool, typer.Option(help="Cut the sets anew from where the authors took them.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that a server may be silent.")] = 30.0,
) -> None:
    """Get the paper's question sets from where they are published.

    Example: `caa-lens data fetch refusal sycophancy`
    """
    import warnings

    from caa_lens.paper.fetch import PaperDataWarning, in_place
    from caa_lens.paper.fetch import fetch as run_fetch
    from caa_lens.paper.questions import data_folder

    def kept() -> str:
        there, n = in_place(names or (), to or data_folder(), original=original)
        return f"{to or data_folder()} keeps {there} of {n} published files" if there else ""

    keeps(kept)
    with warnings.catch_warnings(record=True, action="always", category=PaperDataWarning) as notes:
        found = run_fetch(names or (), to=to, source=source, original=original, timeout=timeout)
    typer.echo(f"{_table(found)}\nin {to or data_folder()}")
    for note in notes:
        typer.echo(f"note: {note.message}", err=True)


@data_app.command("list")
def list_sets(to: ToOption = None) -> None:
    """Say which of the paper's sets were fetched, and what they hold.

    Example: `caa-lens data list`
    """
    from caa_lens.paper.questions import data_folder, inventory

    folder = to or data_folder()
    found = inventory(folder)
    if found.empty:
        typer.echo(f"nothing in {folder} yet: run `caa-lens data fetch`")
    else:
        typer.echo(f"{_table(found)}\nin {folder}")


def _table(found: "pandas.DataFrame") -> str:
    short = found.assign(
        sha256=["+".join(digest[:12] for digest in digests.split("+")) for digests in found["sha256"]],
        published=["" if size != size else f"{size:.0f}" for size in found["published"]],
    )
    return short.to_string(index=False)
