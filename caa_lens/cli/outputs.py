"""What commands write, looked at before any work is done; and the pairs that are held out for it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from caa_lens.cli.stopping import will_write

if TYPE_CHECKING:
    from caa_lens.contrast.sets import ContrastSet
    from caa_lens.results import Result


def check_out(out: Path, ending: str, what: str) -> None:
    """Raises before any work is done for a file that could not be written afterwards; `what`: "vectors are saved"."""
    from caa_lens.atomic_files import check_writable

    if out.suffix != ending:
        raise ValueError(f"{what} as {ending}, got {out.name!r}")
    check_writable(out)
    will_write(out)


def check_result_and_figure(out: Path) -> None:
    """The same of a result's three files."""
    check_out(out, ".parquet", "the frame is written")
    check_out(out.with_suffix(".html"), ".html", "the page is written")

    from caa_lens.results import check_result_path

    check_result_path(out)
    will_write(out.with_suffix(".json"))


def write_result_and_figure(result: "Result", out: Path) -> None:
    """The result as parquet and JSON, and its figure as a page beside them."""
    from caa_lens.atomic_files import write_atomically

    figure = out.with_suffix(".html")
    result.save(out)
    write_atomically(figure, lambda file: result.plot().write_html(file))
    typer.echo(f"written to {out}, {out.with_suffix('.json').name} and {figure}")


def check_result_out(out: Path) -> None:
    """Raises before any work is done for a file that `write_result_out` could not write.

    Raises:
        ValueError: for another ending than .parquet, .csv, .json and .html, or a JSON that belongs to a saved result.
    """
    from caa_lens.atomic_files import check_writable

    if out.suffix == ".parquet":
        check_result_and_figure(out)
        return
    if out.suffix not in (".csv", ".json", ".html"):
        raise ValueError(
            "the result is written as .parquet (with its settings and a figure), .csv, .json or .html (its figure), "
            f"got {out.name!r}"
        )
    if out.suffix == ".json" and out.with_suffix(".parquet").exists():
        raise ValueError(f"{out} belongs to the result {out.with_suffix('.parquet').name}: choose another name")
    check_writable(out)


def write_result_out(result: "Result", out: Path) -> None:
    """A result by a file's ending: all of it (.parquet), its frame (.csv), that with settings (.json), its figure."""
    from caa_lens.atomic_files import write_atomically

    if out.suffix == ".parquet":
        write_result_and_figure(result, out)
        return
    if out.suffix == ".csv":
        write_atomically(out, lambda file: result.frame.to_csv(file, index=False))
    elif out.suffix == ".json":
        about = {"kind": type(result).__name__, "settings": dict(result.settings)}
        made_from = {name: one.expression or one.behavior for name, one in result.provenance.items()}
        rows = json.loads(result.frame.to_json(orient="records"))
        text = json.dumps({**about, "made_from": made_from, "rows": rows}, indent=2, ensure_ascii=False) + "\n"
        write_atomically(out, lambda file: file.write_text(text, encoding="utf-8"))
    else:
        write_atomically(out, lambda file: result.plot().write_html(file))
    typer.echo(f"written to {out}")


def split_off(pairs: "ContrastSet", test: int) -> "tuple[ContrastSet, ContrastSet]":
    """What is left, and the pairs that `--test` holds out: the same in every command."""
    if not 0 < test < len(pairs):
        raise ValueError(f"--test {test}: {pairs.name!r} has {len(pairs)} pairs, expected 1 to {len(pairs) - 1}")
    return pairs.split(test=test, seed=0)
