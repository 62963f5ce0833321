"""The command line: one verb a thing, the same engine as the library.

Modules are imported inside the commands, so that `--help` answers at once.
"""

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from caa_lens.cli.comparisons import compare
from caa_lens.cli.data import data_app
from caa_lens.cli.explore_command import explore
from caa_lens.cli.generate_command import generate
from caa_lens.cli.lens_command import lens
from caa_lens.cli.options import (
    App,
    BackendOption,
    DataArgument,
    DeviceOption,
    DtypeOption,
    LayersOption,
    ModelOption,
    ScoredOption,
    VectorsArgument,
    note_other_model,
    parse_layers,
    parse_numbers,
    read_question,
)
from caa_lens.cli.outputs import check_out, check_result_and_figure, split_off, write_result_and_figure
from caa_lens.cli.stopping import StoppableGroup, end_stopped, keeps, stop_on_terminate
from caa_lens.cli.trust_commands import calibrate, reliability, side_effects
from caa_lens.cli.vectors import vectors_app
from caa_lens.models.cpu_threads import sleep_while_waiting

if TYPE_CHECKING:
    from caa_lens.contrast.sets import ContrastSet
    from caa_lens.vectors.steering_vectors import SteeringVectors

app = App(
    name="caa-lens",
    cls=StoppableGroup,
    help="Contrastive Activation Addition: extract steering vectors, steer, and ask what the vectors are.",
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> bool:
    if wanted:
        import caa_lens

        typer.echo(f"caa_lens {caa_lens.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Say which version this is.", callback=_show_version, is_eager=True)
    ] = False,
) -> None: ...


app.add_typer(vectors_app, name="vectors")
app.add_typer(data_app, name="data")


@app.command()
def demo(
    out: Annotated[Optional[Path], typer.Option(help="Run folder; runs/demo by default.")] = None,  # noqa: UP045
    layers: Annotated[str, typer.Option(help="'coarse' (every third), 'all', or e.g. 3,9,14-20.")] = "coarse",
    behavior: Annotated[str, typer.Option(help="A bundled set or a file.")] = "sentiment",
    model: ModelOption = "demo",
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
) -> None:
    """Do the main job on a real model and write a report.

    Example: `caa-lens demo --layers all --out runs/full`
    """
    from caa_lens.demo.kept_files import kept_told
    from caa_lens.demo.main_job import DemoConfig, run_demo

    if out is None:
        given = [part for part in (behavior, layers) if part not in ("sentiment", "coarse")]
        out = Path("runs") / "-".join(["demo", *given]).replace(",", "_").replace("/", "_")
    folder = out
    keeps(lambda: kept_told(folder))
    chosen: Any = layers if layers in ("coarse", "all") else parse_layers(layers)
    config = DemoConfig(model=model, dtype=dtype, device=device, backend=backend, behavior=behavior, layers=chosen)
    run_demo(config, folder)


@app.command()
def extract(
    data: DataArgument,
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    model: ModelOption = "demo",
    layers: LayersOption = None,
    test: Annotated[int, typer.Option(help="Pairs to hold out for `sweep --test` and `transfer --test`.")] = 0,
    balance: Annotated[bool, typer.Option(help="Swap options until answer letters are even.")] = False,
    estimator: Annotated[
        str, typer.Option(help="How a direction is made of both sides: mean (the paper's), pca or probe.")
    ] = "mean",
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
) -> None:
    """Extract steering vectors from a contrast set.

    Example: `caa-lens extract sentiment sentiment.safetensors --test 20`
    """
    from caa_lens import ContrastSet, load_model
    from caa_lens import extract as run_extract
    from caa_lens.contrast.sets import LetterBalanceWarning
    from caa_lens.vectors.extraction import check_estimator

    check_out(out, ".safetensors", "vectors are saved")
    if balance:
        warnings.simplefilter("ignore", LetterBalanceWarning)
    pairs = ContrastSet.load(data)
    if test:
        pairs, _ = split_off(pairs, test)
    if balance:
        pairs = pairs.balance_letters()
    chosen = parse_layers(layers) if layers else None
    check_estimator(estimator)
    loaded = load_model(model, dtype=dtype, device=device, backend=backend)
    vectors = run_extract(loaded, pairs, layers=chosen, estimator=estimator)
    vectors.save(out)
    typer.echo(f"{vectors!r}\nwritten to {out}")


app.command()(reliability)


@app.command()
def sweep(
    data: DataArgument,
    vectors: VectorsArgument,
    out: Annotated[Path, typer.Option(help="The .parquet file to write; settings and a figure come beside it.")] = Path(
        "sweep.parquet"
    ),
    model: ModelOption = "demo",
    multipliers: Annotated[str, typer.Option(help="Numbers, comma-separated.")] = "-1,0,1",
    layers: LayersOption = None,
    test: ScoredOption = 0,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
) -> None:
    """Score a test set at every layer and multiplier.

    Example: `caa-lens sweep sentiment sentiment.safetensors --multipliers=-2,-1,0,1,2 --layers 9-20 --test 20`
    """
    from caa_lens import ContrastSet, load_model, read_vectors
    from caa_lens import sweep as run_sweep
    from caa_lens.measures.answers import METRIC_LABEL
    from caa_lens.measures.honest_choice import MIN_QUESTIONS

    check_result_and_figure(out)
    of_each = read_vectors(vectors)
    pairs = _held_out(ContrastSet.load(data), test, of_each)
    numbers = parse_numbers("multipliers", multipliers)
    chosen = parse_layers(layers) if layers else None
    loaded = load_model(model, dtype=dtype, device=device, backend=backend)
    note_other_model(of_each, loaded)
    result = run_sweep(loaded, pairs, of_each, multipliers=numbers, layers=chosen)
    typer.echo(f"{result!r}\nmean {METRIC_LABEL[result.metric]}\n{result.table().round(4).to_string()}")
    if result.paired_multipliers:
        typer.echo("by layer, +m against -m per question, with a 95 % interval; one that includes 0 may be chance")
        typer.echo(result.effect().round(4).to_string(index=False))
    write_result_and_figure(result, out)
    if result.paired_multipliers and result.frame["question"].nunique() >= MIN_QUESTIONS:
        try:
            typer.echo(f"best {result.best}")
        except ValueError as error:  # NaN somewhere, or no layer stands out
            typer.echo(f"no best layer: {error}")


app.command()(calibrate)


app.command()(side_effects)


@app.command()
def transfer(
    data: DataArgument,
    vectors: VectorsArgument,
    out: Annotated[Path, typer.Option(help="The .parquet file to write; settings and a figure come beside it.")] = Path(
        "transfer.parquet"
    ),
    model: ModelOption = "demo",
    multiplier: Annotated[float, typer.Option(help="How much of each vector.")] = 1.0,
    size: Annotated[str, typer.Option(help="'keep', 'target', or a share of the residual norm, e.g. 0.1.")] = "keep",
    layers: Annotated[Optional[str], typer.Option(help="Source layers; all by default.")] = None,  # noqa: UP045
    targets: Annotated[Optional[str], typer.Option(help="Target layers; the source layers by default.")] = None,  # noqa: UP045
    test: ScoredOption = 0,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
) -> None:
    """Add every layer's vector at every layer: the effect of layer i's vector at layer j.

    Example: `caa-lens transfer sentiment sentiment.safetensors --layers 3,9,15,21,27 --test 20`
    """
    from caa_lens import ContrastSet, load_model, read_vectors
    from caa_lens import transfer_layers as run_transfer
    from caa_lens.measures.answers import METRIC_LABEL

    check_result_and_figure(out)
    sources = read_vectors(vectors)
    pairs = _held_out(ContrastSet.load(data), test, sources)
    sources = sources.at(parse_layers(layers)) if layers else sources
    chosen = parse_layers(targets) if targets else None
    loaded = load_model(model, dtype=dtype, device=device, backend=backend)
    note_other_model(sources, loaded)
    result = run_transfer(
        loaded,
        pairs,
        sources,
        multiplier=multiplier,
        targets=chosen,
        size=float(size) if size.replace(".", "", 1).isdecimal() else size,
    )
    typer.echo(
        f"{result!r}\nchange of {METRIC_LABEL[result.metric]} against the unsteered model, per unit of multiplier;\n"
        f"rows: the layer a vector is of, columns: the layer it is added at\n{result.table().round(4).to_string()}"
    )
    write_result_and_figure(result, out)


app.command()(compare)


app.command()(lens)


app.command()(generate)


app.command()(explore)


@app.command()
def similarity(
    text: Annotated[str, typer.Argument(help="A question or messages, as for `generate`; with --raw, any text.")],
    vectors: VectorsArgument,
    out: Annotated[Path, typer.Option(help="The .html page to write.")] = Path("similarity.html"),
    layers: Annotated[Optional[str], typer.Option(help="e.g. 14 or 10-20; all by default.")] = None,  # noqa: UP045
    answer: Annotated[str, typer.Option(help="An answer to follow the question.")] = "",
    raw: Annotated[bool, typer.Option(help="Take the text as it is, in no prompt format.")] = False,
    model: ModelOption = "demo",
    backend: BackendOption = None,
) -> None:
    """Colour every token of a text by its similarity with a vector.

    Example: `caa-lens similarity "How was your day?" sentiment.safetensors --layers 14 --answer "It was awful."`
    """
    from caa_lens import load_model, read_vectors, token_similarity

    if raw and answer:
        raise ValueError("an answer follows a question, and --raw takes the text as it is: leave out one of the two")
    check_out(out, ".html", "the page is written")
    asked = text if raw else read_question(text)
    chosen = read_vectors(vectors)
    chosen = chosen.at(parse_layers(layers)) if layers else chosen
    loaded = load_model(model, backend=backend)
    note_other_model(chosen, loaded)
    result = token_similarity(loaded, asked, chosen, answer=answer, raw_text=raw)
    result.show().save(out)
    typer.echo(f"written to {out}")


@app.command()
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


def _held_out(pairs: "ContrastSet", test: int, vectors: "SteeringVectors") -> "ContrastSet":
    """The pairs to score; says so, in the command line's words, if the vectors were extracted from some of them."""
    from caa_lens.measures.training_pairs import TrainingPairsWarning, count_training_pairs

    scored = split_off(pairs, test)[1] if test else pairs
    if n_pairs := count_training_pairs(scored, vectors):
        typer.echo(
            f"note: {n_pairs} of the {len(scored)} pairs scored are among those that the vectors were extracted from: "
            "hold pairs out with the same --test in `extract` and here",
            err=True,
        )
        warnings.simplefilter("ignore", TrainingPairsWarning)
    return scored


_SAID_IN_PYTHON = {
    "on_bad='drop' leaves": "`caa-lens data convert IN OUT --on-bad drop` leaves",
    "columns={'question': ..., 'positive': ..., 'negative': ...}": (
        "`caa-lens data convert IN OUT --columns 'question=...,positive=...,negative=...'`"
    ),
    "columns={'question': ...}": "--columns 'question=...,positive=...,negative=...'",
    ", which columns= names for": ", which --columns names for",
}
"""Remedies that messages say in Python, and what is written for them on the command line."""


def main() -> None:
    """Run the command line; mistakes of the caller end in one line and with exit code 2, not in a traceback."""
    import sys

    sleep_while_waiting()
    stop_on_terminate()
    # Where it is installed, TransformerLens imports it, and it says that kernels which nothing here needs are not.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.showwarning = lambda message, *_, **__: typer.echo(f"note: {message}", err=True)
    try:
        app()
    except KeyboardInterrupt as stop:  # before any command began
        end_stopped(stop)
    except (ValueError, TypeError, OSError, MemoryError, IndexError, ImportError) as error:
        # What the system could not read as text stands in messages as it does in `repr`.
        said = str(error)
        for python, command in _SAID_IN_PYTHON.items():
            said = said.replace(python, command)
        typer.echo(f"error: {said}".encode(errors="backslashreplace").decode(), err=True)
        sys.exit(2)
