"""The files that commands write: looked at before the work, written after it."""

from pathlib import Path
from typing import Any

import typer


def check_out(out: Path, ending: str, what: str) -> None:
    """Raises before any work is done for a file that could not be written afterwards; `what`: "vectors are saved"."""
    from caa_lens.atomic_files import check_writable

    if out.suffix != ending:
        raise ValueError(f"{what} as {ending}, got {out.name!r}")
    check_writable(out)


def check_frame_and_figure(out: Path) -> None:
    check_out(out, ".parquet", "the frame is written")
    check_out(out.with_suffix(".html"), ".html", "the page is written")


def write_frame_and_figure(result: Any, out: Path) -> None:
    """The result's frame as parquet, and its figure as a page beside it."""
    from caa_lens.atomic_files import write_atomically

    figure = out.with_suffix(".html")
    write_atomically(out, lambda file: result.frame.to_parquet(file, index=False))
    write_atomically(figure, lambda file: result.plot().write_html(file))
    typer.echo(f"written to {out} and {figure}")
