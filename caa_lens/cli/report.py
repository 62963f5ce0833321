"""`caa-lens report`: one page of finished runs."""

from pathlib import Path
from typing import Annotated

import typer

from caa_lens.cli.outputs import check_out


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `python -m experiments ... --out` made.")],
    out: Annotated[Path, typer.Option(help="The .html page to write.")] = Path("report.html"),
) -> None:
    """Write one self-contained page of finished runs, from their folders alone.

    Example: `caa-lens report runs/paper-demo --out report.html`
    """
    from caa_lens.report.runs import write_run_report

    check_out(out, ".html", "the page is written")
    typer.echo(f"Open this file: {write_run_report(runs, out).resolve()}")
