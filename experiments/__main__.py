"""The command line of the experiments; `python -m experiments --help`."""

import logging
import sys
import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from caa_lens.cli.stopping import StoppableCommand, command_given, keeps, stop_on_terminate
from caa_lens.models.cpu_threads import sleep_while_waiting

if __name__ == "__main__":
    sleep_while_waiting()  # before torch, which the next lines bring

from experiments.catalogue import EXPERIMENTS
from experiments.running.beforehand import (
    check_data,
    check_device,
    check_layer,
    check_out,
    check_workers,
    n_layers,
    n_parameters,
    place_of,
)
from experiments.running.behavior_sets import missing_sets
from experiments.running.context import Context
from experiments.running.engines import Engine, Here
from experiments.running.experiment import Experiment
from experiments.running.first_units import measured
from experiments.running.identity import hold, run_identity, run_notes, start_notes
from experiments.running.plan import memory_bytes, planned, rates_elsewhere, this_device, unit_costs
from experiments.running.rates import GPUS, gpu_rates, stated_rates
from experiments.running.ray_cluster import demanded, load
from experiments.running.ray_workers import RayWorkers
from experiments.running.run_folder import RunFolder
from experiments.running.runner import run, skip_reasons, with_needs
from experiments.running.settings import RunConfig
from experiments.running.shown import show_outcome, show_plan, units_told
from experiments.running.terminal import UnitProgress, make_console, show_duration

Option = typer.Option
OF_SIZE = "'small' or 'paper'; paper by default for Llama 2's chat models. Single settings below go before it."


def main(
    names: Annotated[list[str], typer.Argument(help="Experiments, or all.", metavar="NAME...|all")],
    model: Annotated[str, Option("--model", "-m", help="'demo', a hub id, a folder or a GGUF file.")] = "demo",
    out: Annotated[Optional[Path], Option(help="Run folder; runs/paper-<model> by default.")] = None,  # noqa: UP045
    size: Annotated[Optional[str], Option(help=OF_SIZE)] = None,  # noqa: UP045
    dry_run: Annotated[bool, Option("--dry-run", help="Say what would be done and what it takes, and stop.")] = False,
    workers: Annotated[Optional[int], Option(help="Ray's workers; one model each, on a GPU of its own.")] = None,  # noqa: UP045
    engine: Annotated[Optional[str], Option(help="'process' (this one) or 'ray'.")] = None,  # noqa: UP045
    address: Annotated[Optional[str], Option(help="Of a Ray cluster: auto, or HOST:PORT.")] = None,  # noqa: UP045
    num_gpus_per_worker: Annotated[Optional[float], Option(help="Below 1, workers share a GPU.")] = None,  # noqa: UP045
    num_cpus_per_worker: Annotated[Optional[float], Option(help="Also a worker's threads.")] = None,  # noqa: UP045
    accelerator: Annotated[Optional[str], Option(help="Ray's name of the cards to use, e.g. A100.")] = None,  # noqa: UP045
    base_model: Annotated[Optional[str], Option(help="What this one was finetuned from, or 'none'.")] = None,  # noqa: UP045
    behaviors: Annotated[Optional[str], Option(help="Comma-separated; all of the data by default.")] = None,  # noqa: UP045
    data: Annotated[Optional[str], Option(help="'bundled' or 'paper'; by default paper for Llama 2.")] = None,  # noqa: UP045
    layer: Annotated[Optional[int], Option(help="Where to steer; by default the paper's, or the sweep's best.")] = None,  # noqa: UP045
    layer_step: Annotated[Optional[int], Option(help="Sweeps take every n-th layer.")] = None,  # noqa: UP045
    n_generate: Annotated[Optional[int], Option(help="Pairs to extract from.")] = None,  # noqa: UP045
    n_test: Annotated[Optional[int], Option(help="Held-out pairs.")] = None,  # noqa: UP045
    n_validation: Annotated[Optional[int], Option(help="Pairs that the layer is chosen on.")] = None,  # noqa: UP045
    n_prompts: Annotated[Optional[int], Option(help="Open-ended prompts a behavior.")] = None,  # noqa: UP045
    n_questions: Annotated[Optional[int], Option(help="Questions of MMLU and of TruthfulQA.")] = None,  # noqa: UP045
    max_new_tokens: Annotated[Optional[int], Option(help="Length of answers.")] = None,  # noqa: UP045
    dtype: Annotated[Optional[str], Option(help="float32, bfloat16 or float16.")] = None,  # noqa: UP045
    device: Annotated[Optional[str], Option(help="cpu, cuda, mps; auto: all cards of a process together.")] = None,  # noqa: UP045
    finetune: Annotated[Optional[str], Option(help="'full' or 'lora'.")] = None,  # noqa: UP045
    judge: Annotated[Optional[str], Option(help="The judge's model name.")] = None,  # noqa: UP045
    judge_url: Annotated[Optional[str], Option(help="An OpenAI-compatible endpoint.")] = None,  # noqa: UP045
    judge_settings: Annotated[Optional[str], Option(help="Sent to the judge beside the prompt: a JSON object.")] = None,  # noqa: UP045
    judge_concurrency: Annotated[Optional[int], Option(help="Requests to the judge at once; 8 by default.")] = None,  # noqa: UP045
    judge_rpm: Annotated[Optional[float], Option(help="Requests to the judge a minute, at most.")] = None,  # noqa: UP045
    judge_timeout: Annotated[Optional[float], Option(help="Seconds for one request; 60 by default.")] = None,  # noqa: UP045
    seed: Annotated[int, Option(help="Of splits and samples.")] = 0,
    gpu: Annotated[Optional[str], Option(help=f"For --dry-run: plan for another card; {', '.join(GPUS)}.")] = None,  # noqa: UP045
    flops: Annotated[Optional[float], Option(help="Operations a second, for --dry-run.")] = None,  # noqa: UP045
    bandwidth: Annotated[Optional[float], Option(help="Bytes of memory a second; given with --flops.")] = None,  # noqa: UP045
) -> None:
    """Reproduce the paper's figures and tables, or some of them.

    Interrupted or killed, the same command goes on where it stopped. Then: `caa-lens report runs/paper-demo`

    Example: `python -m experiments all --model demo`

    The paper, all of it, after `caa-lens data fetch`: `python -m experiments all --model meta-llama/Llama-2-7b-chat-hf`
    """
    given = {name: value for name, value in locals().items() if name in RunConfig.model_fields and name != "model"}
    if behaviors is not None:
        given["behaviors"] = tuple(name.strip() for name in behaviors.split(","))
    config = RunConfig.of(model, size, **given)
    wanted, folder, console = (
        _chosen(names),
        RunFolder(out or Path("runs") / f"paper-{config.model_name}"),
        make_console(),
    )
    check_out(folder.path)
    by_ray = check_workers(engine, workers, address)
    if by_ray and not dry_run:
        load(loopback=address is None)
    if address is None:  # else it is the nodes' affair
        check_device(device)
    stated = stated_rates(flops, bandwidth)
    if gpu is not None:
        gpu_rates(gpu, config.dtype)  # a mistake is told at once
    if not dry_run:
        check_data(config)
    check_layer(config, n_layers(config.model, fetch=not dry_run))
    if dry_run:
        config = config.model_copy(update={"stand_ins": missing_sets(config)})
        plan = with_needs(wanted, EXPERIMENTS, config)
        skipped = skip_reasons(plan, config)
        able = [one for one in plan if one.name not in skipped]
        costs = unit_costs(able, Context(config, folder))
        estimate = None
        if rates := rates_elsewhere(config, able, gpu, stated, device):
            estimate = planned(costs, config, rates)
        elif place_of(config.model) is not None:
            estimate = measured(able, costs, config, device=device, console=console)
        show_plan(plan, skipped, costs, estimate, config, folder, workers or 1, console)
        return
    experiments = with_needs(wanted, EXPERIMENTS, config)
    began = time.perf_counter()
    folder.check_ours()
    identity = run_identity(config)
    with folder.held(say=console.print):
        resumed = folder.claim(identity, run_notes([one.name for one in EXPERIMENTS]))
        if resumed:
            console.print(f"{folder.path} holds this run: going on with what is not finished")
        skipped = skip_reasons(experiments, config)
        able = [one for one in experiments if one.name not in skipped]
        hold(able, config, folder)
        where = None if by_ray else device or this_device()
        started = [one.name for one in experiments]
        folder.record_start(start_notes(config, started, device=where, command=command_given()))
        keeps(lambda: units_told(able, config, folder))
        costs = unit_costs(able, Context(config, folder, device=device))
        weights = {key: 1e3 + cost.work + 2e3 * cost.requests for key, cost in costs.items()}
        doing: Engine = Here()
        if by_ray:
            n, demand = demanded(
                workers,
                address,
                device,
                gpus=num_gpus_per_worker,
                cpus=num_cpus_per_worker,
                accelerator=accelerator,
                memory=memory_bytes(config, n_parameters(config.model) or 0, able),
            )
            doing = RayWorkers(n, address=address, demand=demand, device=device, say=console.print)
        with UnitProgress(console, weights) as progress:
            outcomes = run(experiments, config, folder, device=device, progress=progress, engine=doing)
    for outcome in outcomes:
        show_outcome(outcome, folder, console)
    failed = [outcome.experiment.name for outcome in outcomes if outcome.failed]
    console.print(
        f"\nFinished in {show_duration(time.perf_counter() - began)}; "
        f"{len(failed)} of {len(outcomes)} experiments failed{': ' + ', '.join(failed) if failed else ''}. "
        f"Results are in {folder.path}. For the page: caa-lens report {folder.path}",
        soft_wrap=True,
        highlight=False,
    )
    if failed or any(outcome.unfinished for outcome in outcomes):
        raise typer.Exit(1)


def _chosen(names: list[str]) -> list[Experiment]:
    known = {experiment.name: experiment for experiment in EXPERIMENTS}
    if unknown := [name for name in names if name not in known and name != "all"]:
        raise ValueError(f"unknown experiments {', '.join(unknown)}: expected all, or some of {', '.join(known)}")
    if "all" in names:
        return [experiment for experiment in EXPERIMENTS if not experiment.apart or experiment.name in names]
    return [known[name] for name in names]


if __name__ == "__main__":
    stop_on_terminate()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of kernels that nothing here needs
    app = typer.Typer(add_completion=False)
    app.command(cls=StoppableCommand)(main)
    try:
        app()
    except (ValueError, TypeError, OSError, MemoryError, IndexError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
