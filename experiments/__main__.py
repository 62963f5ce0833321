"""The command line of the experiments; `python -m experiments --help`."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.catalogue import EXPERIMENTS
from experiments.context import Context
from experiments.experiment import Experiment
from experiments.identity import run_identity, run_notes
from experiments.plan import Rates, measure_rates, memory_bytes, n_parameters, show_duration, show_number, unit_costs
from experiments.progress import UnitProgress
from experiments.run_folder import RunFolder
from experiments.runner import Outcome, run, skip_reasons, with_needs
from experiments.settings import RunConfig
from experiments.workers import is_worker, work_together

Option = typer.Option
WIDEST = 30  # rows of a table that are printed; the report has all


def main(
    names: Annotated[list[str], typer.Argument(help="Experiments, or all.", metavar="NAME...|all")],
    model: Annotated[str, Option("--model", "-m", help="'demo', a hub id, a folder or a GGUF file.")] = "demo",
    out: Annotated[Optional[Path], Option(help="Run folder; runs/<model> by default.")] = None,  # noqa: UP045
    size: Annotated[str, Option(help="'small' or 'paper'; single settings below go before it.")] = "small",
    dry_run: Annotated[bool, Option("--dry-run", help="Say what would be done and what it takes, and stop.")] = False,
    workers: Annotated[int, Option(help="Processes; one model each, on a GPU of its own where there are any.")] = 1,
    base_model: Annotated[Optional[str], Option(help="The model that this one was finetuned from.")] = None,  # noqa: UP045
    behaviors: Annotated[Optional[str], Option(help="Comma-separated; all of the data by default.")] = None,  # noqa: UP045
    data: Annotated[Optional[str], Option(help="'bundled' or 'paper'; by default paper for Llama 2.")] = None,  # noqa: UP045
    layer: Annotated[Optional[int], Option(help="Where to steer; by default the paper's, or the sweep's best.")] = None,  # noqa: UP045
    layer_step: Annotated[Optional[int], Option(help="Sweeps take every n-th layer.")] = None,  # noqa: UP045
    n_generate: Annotated[Optional[int], Option(help="Pairs to extract from.")] = None,  # noqa: UP045
    n_test: Annotated[Optional[int], Option(help="Held-out pairs.")] = None,  # noqa: UP045
    n_prompts: Annotated[Optional[int], Option(help="Open-ended prompts a behavior.")] = None,  # noqa: UP045
    n_questions: Annotated[Optional[int], Option(help="Questions of MMLU and of TruthfulQA.")] = None,  # noqa: UP045
    max_new_tokens: Annotated[Optional[int], Option(help="Length of answers.")] = None,  # noqa: UP045
    dtype: Annotated[Optional[str], Option(help="float32, bfloat16 or float16.")] = None,  # noqa: UP045
    device: Annotated[Optional[str], Option(help="cpu, cuda, mps.")] = None,  # noqa: UP045
    finetune: Annotated[Optional[str], Option(help="'full' or 'lora'.")] = None,  # noqa: UP045
    judge: Annotated[Optional[str], Option(help="The judge's model name.")] = None,  # noqa: UP045
    judge_url: Annotated[Optional[str], Option(help="An OpenAI-compatible endpoint.")] = None,  # noqa: UP045
    seed: Annotated[int, Option(help="Of splits and samples.")] = 0,
    flops: Annotated[Optional[float], Option(help="Operations a second, for estimates; measured by default.")] = None,  # noqa: UP045
) -> None:
    """Reproduce the paper's figures and tables, or some of them.

    Interrupted or killed, the same command goes on where it stopped. Then: `caa-lens report runs/demo`

    Example: `python -m experiments all --model demo --out runs/demo`
    """
    given = {name: value for name, value in locals().items() if name in RunConfig.model_fields and name != "model"}
    if behaviors is not None:
        given["behaviors"] = tuple(name.strip() for name in behaviors.split(","))
    config = RunConfig.of(model, size, **given)
    experiments = with_needs(_chosen(names), EXPERIMENTS, config)
    folder = RunFolder(out or Path("runs") / config.model_name)
    console = Console()
    rates = None if flops is None else Rates(flops=flops, bandwidth=flops / 10, source="stated")
    if dry_run:
        _show_plan(experiments, config, folder, workers, rates or measure_rates(config.dtype, device), console)
        return
    began = time.perf_counter()
    resumed = folder.claim(run_identity(config), run_notes([one.name for one in EXPERIMENTS]))
    if resumed:
        console.print(f"{folder.path} holds this run: going on with what is not finished")
    context = Context(config, folder, device=device)
    skipped = skip_reasons(experiments, config)
    costs = unit_costs([one for one in experiments if one.name not in skipped], context)
    weights = {key: 1e3 + cost.tokens + 20 * cost.steps for key, cost in costs.items()}
    with UnitProgress(console, weights) as progress:
        if workers != 1 and not is_worker():
            command = [sys.executable, "-m", "experiments", *sys.argv[1:]]
            work_together(command, workers, device=device, watch=lambda: progress.look(folder))
        outcomes = run(experiments, config, folder, device=device, progress=progress)
    if is_worker():
        return
    for outcome in outcomes:
        _show_outcome(outcome, folder, console)
    failed = [outcome.experiment.name for outcome in outcomes if outcome.failed]
    console.print(
        f"\nFinished in {show_duration(time.perf_counter() - began)}; "
        f"{len(failed)} of {len(outcomes)} experiments failed{': ' + ', '.join(failed) if failed else ''}. "
        f"Results are in {folder.path}. For the page: caa-lens report {folder.path}",
        soft_wrap=True,
        highlight=False,
    )
    if failed:
        raise typer.Exit(1)


def _chosen(names: list[str]) -> list[Experiment]:
    known = {experiment.name: experiment for experiment in EXPERIMENTS}
    if "all" in names:
        return list(EXPERIMENTS)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown experiments {', '.join(unknown)}: expected all, or some of {', '.join(known)}")
    return [known[name] for name in names]


def _show_plan(
    experiments: list[Experiment], config: RunConfig, folder: RunFolder, workers: int, rates: Rates, console: Console
) -> None:
    """The table of `--dry-run`: units, forwards, tokens and time by experiment, and memory."""
    context = Context(config, folder)
    parameters = n_parameters(config.model)
    skipped = skip_reasons(experiments, config)
    costs = unit_costs([one for one in experiments if one.name not in skipped], context)
    table = Table(title=Text(f"{config.model} into {folder.path}"), title_justify="left")
    for column in ("experiment", "paper", "units left", "forwards", "tokens", "time"):
        table.add_column(column, justify="left" if column in ("experiment", "paper") else "right")
    total = 0.0
    for one in experiments:
        if one.name in skipped:
            continue
        of_one = [cost for (name, _), cost in costs.items() if name == one.name]
        forwards, tokens = sum(cost.forwards for cost in of_one), sum(cost.tokens for cost in of_one)
        seconds = sum(rates.seconds(cost, parameters or 0, config.dtype) for cost in of_one)
        total += seconds
        time_text = show_duration(seconds) if parameters else "?"
        table.add_row(one.name, one.source, str(len(of_one)), show_number(forwards), show_number(tokens), time_text)
    console.print(table)
    for name, reason in skipped.items():
        console.print(Text(f"{name} is skipped: {reason}"))
    if parameters is None:
        console.print(f"No estimate of time and memory: the size of {config.model} is not known before it is loaded.")
        return
    console.print(
        f"{show_number(parameters)} parameters as {config.dtype}: about "
        f"{memory_bytes(config, parameters) / 1e9:.1f} GB a process, {workers} process{'es' if workers > 1 else ''}. "
        f"Time about {show_duration(total / workers)}: two operations a parameter and token at half of "
        f"{show_number(rates.flops)}FLOP/s, and reading the weights for every generated token at "
        f"{show_number(rates.bandwidth)}B/s ({rates.source}); tokens estimated from characters. "
        "Nothing was written.",
        soft_wrap=True,
        highlight=False,
    )


def _show_outcome(outcome: Outcome, folder: RunFolder, console: Console) -> None:
    """What was found, and the tables cell by cell."""
    from caa_lens.run_report import load_section

    one = outcome.experiment
    console.print(Text(f"\n{one.name}: {one.title} ({one.source})", style="bold"))
    if outcome.skipped:
        console.print(Text(f"skipped: {outcome.skipped}"))
        return
    if outcome.failed:
        console.print(
            Text(f"failed: {outcome.failed}\ntraceback in {folder.path / one.name / 'error.txt'}", style="red")
        )
        return
    section = load_section(folder.section_file(one.name))
    for line in section.found:
        console.print(Text(f"- {line}"))
    for caption, frame in section.captioned_tables():
        if len(frame) <= WIDEST * 3:
            console.print(_table(caption, frame))


def _table(caption: str, frame: Any) -> Table:
    table = Table(title=Text(caption), title_justify="left")
    for column in frame.columns:
        table.add_column(Text(str(column)))
    for row in frame.itertuples(index=False):
        table.add_row(*(Text(f"{cell:.4g}" if isinstance(cell, float) else str(cell)) for cell in row))
    return table


if __name__ == "__main__":
    try:
        typer.run(main)
    except (ValueError, TypeError, OSError, MemoryError, IndexError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
