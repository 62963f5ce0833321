"""What a run says of itself: outcomes when it has ended, and the plan of `--dry-run` before it begins."""

from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.text import Text

from experiments.running.beforehand import n_parameters
from experiments.running.costs import Cost
from experiments.running.experiment import Experiment
from experiments.running.plan import Costs, Estimate, disk_bytes, memory_bytes, scratch_bytes
from experiments.running.run_folder import RunFolder
from experiments.running.runner import Outcome
from experiments.running.settings import BYTES, RunConfig
from experiments.running.terminal import show_duration, show_number, show_table

LONGEST = 90  # rows of a table that are printed; the report has all


def show_outcome(outcome: Outcome, folder: RunFolder, console: Console) -> None:
    """What was found, and the tables cell by cell."""
    from caa_lens.report.runs import load_section

    one = outcome.experiment
    console.print(Text(f"\n{one.name}: {one.title} ({one.source})", style="bold"))
    if outcome.skipped:
        console.print(Text(f"skipped: {outcome.skipped}"), soft_wrap=True)
        return
    if outcome.failed:
        console.print(Text(f"failed: {outcome.failed}", style="red"), soft_wrap=True)
        if outcome.traceback:
            console.print(Text(f"traceback in {outcome.traceback}", style="red"), soft_wrap=True)
        return
    if outcome.unfinished:
        console.print(Text(f"not complete: {outcome.unfinished}", style="yellow"), soft_wrap=True)
    file = folder.section_file(one.name)
    section = load_section(file)
    for line in section.found:
        console.print(Text(f"- {line}"))
    for caption, frame in section.captioned_tables():
        if len(frame) > LONGEST:
            line = f"{caption}: {len(frame)} rows, too many to print here; they are in the report, and in {file}"
            console.print(Text(line, style="italic"), soft_wrap=True)
        elif not len(frame):
            why = ": the paper has none of these cells" if "paper" in caption else ""
            console.print(Text(f"{caption}: no rows{why}", style="italic"))
        else:
            show_table(caption, frame, console)


def units_told(experiments: Sequence[Experiment], config: RunConfig, folder: RunFolder) -> str:
    """How many units of a run are finished and kept."""
    units = [(one.name, unit) for one in experiments for unit in one.units(config)]
    done = sum(folder.is_done(*one) for one in units)
    return f"{folder.path} keeps {done} of {len(units)} units"


def disk_said(config: RunConfig, parameters: int, experiments: Sequence[Experiment]) -> str:
    """What a run needs on the disk, in a sentence."""
    stored, scratch = disk_bytes(config), scratch_bytes(config, parameters, experiments) / 1e9
    two = f" and of the base model {config.base_model}" if config.base_model else ""
    size = "of unknown size before they are here" if stored is None else f"{stored / 1e9:.1f} GB"
    said = f"On the disk: {size} for the weights of {config.model}{two}, less what is here already"
    return said + (f"; and {scratch:.1f} GB in the run folder for a moment, for merged adapters." if scratch else ".")


def show_plan(
    experiments: Sequence[Experiment],
    skipped: Mapping[str, str],
    costs: Costs,
    estimate: Estimate | None,
    config: RunConfig,
    folder: RunFolder,
    workers: int,
    console: Console,
) -> None:
    """What `--dry-run` says: units, forwards, tokens and time by experiment, memory, and requests to the judge.

    Args:
        skipped: why some of the experiments cannot run.
        costs: of the units that are not finished.
        estimate: of their times; None where nothing can be said of them.
    """
    import pandas as pd

    able = [one for one in experiments if one.name not in skipped]
    rows, every = [], Cost()
    total = 0.0
    for one in able:
        of_one = {key: cost for key, cost in costs.items() if key[0] == one.name}
        cost = sum(of_one.values(), Cost())
        every += cost
        row = {"experiment": one.name, "paper": one.source, "units left": len(of_one)}
        row |= {"forwards": show_number(cost.forwards), "tokens": show_number(cost.tokens)}
        known = estimate is not None and of_one.keys() <= estimate.seconds.keys()
        if estimate is not None and known:
            seconds = sum(estimate.seconds[key] for key in of_one)
            total += seconds
            row |= {"time": show_duration(seconds), "how": estimate.how.get(one.name, "")}
        else:
            row |= {"time": "?", "how": ""}
        rows.append(row)

    def say(text: str) -> None:
        console.print(Text(text), soft_wrap=True)

    show_table(f"{config.model} into {folder.path}", pd.DataFrame(rows), console)
    for name, reason in skipped.items():
        say(f"{name} is skipped: {reason}")
    if config.stand_ins:
        say(
            f"The paper's data are not all here yet: blank questions stand in for {', '.join(config.stand_ins)}, as "
            "many as the paper has. `caa-lens data fetch` gets all of them; a run needs them."
        )
    if every.requests:
        say(f"{show_number(every.requests)} requests to the judge {config.judge}; their time is not in the estimate.")
    parameters = n_parameters(config.model)
    if parameters is None:
        say(f"No estimate of memory: the size of {config.model} is not known before it is loaded.")
    else:
        _say_memory(able, config, parameters, workers, estimate, say)
    if estimate is None or not estimate.seconds:
        say("No estimate of time.")
    else:
        of_many = f" by {workers} processes" if workers > 1 else ""
        say(f"Time about {show_duration(estimate.once + total / workers)}{of_many}: {estimate.source}.")
    say("Nothing was written.")


def _say_memory(
    able: Sequence[Experiment],
    config: RunConfig,
    parameters: int,
    workers: int,
    estimate: Estimate | None,
    say: Callable[[str], None],
) -> None:
    neediest = max(able, key=lambda one: one.weights(config)) if able else None
    memory = memory_bytes(config, parameters, able) / 1e9
    why = f", for {neediest.name}" if neediest and neediest.weights(config) > 1 else ""
    say(
        f"{show_number(parameters)} parameters as {config.dtype}: about {memory:.1f} GB a process{why} "
        f"({BYTES[config.dtype] * parameters / 1e9:.1f} GB are its weights), "
        f"{workers} process{'es' if workers > 1 else ''}."
    )
    if estimate is not None and estimate.memory is not None and memory > estimate.memory / 1e9:
        say(f"That is more than the {estimate.memory / 1e9:.0f} GB of this card: a model is on one device.")
    say(disk_said(config, parameters, able))
