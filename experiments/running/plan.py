"""What a run will take, before it starts: the work of its units, memory, disk, and time by stated rates.

Where the model is on this machine, the time is measured instead (see `measured`). Where it is not, or would not run
here, it is planned from rates: those of `--flops` and `--bandwidth`, those of a card's data sheet with `--gpu`, and
else those of the smallest card that holds the run (see `rates`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from experiments.running.beforehand import n_parameters, place_of, stored_bytes
from experiments.running.context import Context
from experiments.running.costs import Cost
from experiments.running.experiment import Experiment
from experiments.running.rates import Rates, gpu_rates, smallest_gpu
from experiments.running.settings import BYTES, RunConfig
from experiments.running.terminal import show_number
from experiments.running.units import Unit

Costs = Mapping[tuple[str, Unit], Cost]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """How long units will take, and how that is known."""

    seconds: Mapping[tuple[str, Unit], float]
    how: Mapping[str, str]
    """Of each experiment, in a word or two: measured, planned."""
    source: str
    """What the times rest on, as the end of a sentence."""
    once: float = 0.0
    """Seconds that every process takes beside its units, for loading the model."""
    memory: float | None = None
    """Bytes of the device's memory, where it is not this machine's."""


def unit_costs(experiments: Sequence[Experiment], context: Context) -> dict[tuple[str, Unit], Cost]:
    """The cost of every unit that is not finished."""
    return {
        (one.name, unit): one.cost(unit, context)
        for one in experiments
        for unit in one.units(context.config)
        if not context.folder.is_done(one.name, unit)
    }


def rates_elsewhere(
    config: RunConfig, experiments: Sequence[Experiment], gpu: str | None, stated: Rates | None, device: str | None
) -> Rates | None:
    """As stated, or of a card by its name; else of the smallest card that would do, if this machine does not.

    None where the run can be measured here, or where nothing is known of the model.

    Raises:
        ValueError: rates and a card are given; or as `rates.gpu_rates`.
    """
    if gpu is not None and stated is not None:
        raise ValueError("got --gpu and --flops, expected one of them: the card's rates, or your own")
    if stated is not None:
        return stated
    if gpu is not None:
        return gpu_rates(gpu, config.dtype)
    parameters = n_parameters(config.model)
    if parameters is None:
        return None
    needed = memory_bytes(config, parameters, experiments)
    if place_of(config.model) is None:
        lacking = f"{config.model} is not on this machine"
    else:
        from caa_lens.models.loading.device_memory import free_memory

        here = this_device() if device in (None, "auto") else str(device)
        if needed <= (free := free_memory(here)):
            return None
        lacking = f"it would not run here, as {here} has {free / 1e9:.1f} GB free"
    rates = gpu_rates(smallest_gpu(needed, config.dtype), config.dtype)
    return replace(rates, source=f"{lacking}; {rates.source}")


def this_device() -> str:
    """Where a model is loaded to if nothing else is said."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def planned(costs: Costs, config: RunConfig, rates: Rates) -> Estimate:
    """The times of units at some rates; none where the number of the model's parameters is not known."""
    parameters = n_parameters(config.model)
    return Estimate(
        seconds={key: rates.seconds(cost, parameters, config.dtype) for key, cost in costs.items() if parameters},
        how={name: "planned" for name, _ in costs},
        source="two operations a parameter and token at half of "
        f"{show_number(rates.flops)}FLOP/s, and reading the weights for every generated token at "
        f"{show_number(rates.bandwidth)}B/s ({rates.source}); tokens estimated from characters",
        memory=rates.memory,
    )


def memory_bytes(config: RunConfig, parameters: int, experiments: Sequence[Experiment]) -> float:
    """Of one process, at the neediest experiment: its weights with a tenth for what runs through them."""
    most = max((one.weights(config) for one in experiments), default=1.0)
    return 1.1 * most * parameters * BYTES[config.dtype]


def disk_bytes(config: RunConfig) -> float | None:
    """Of the checkpoints that a run reads, as they are stored; None where that is not known before they are here.

    Only safetensors are downloaded. Adapters need more for a moment (see `scratch_bytes`).
    """
    sizes = [stored_bytes(name) for name in (config.model, config.base_model) if name is not None]
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def scratch_bytes(config: RunConfig, parameters: int, experiments: Sequence[Experiment]) -> float:
    """What lies in the run folder for a moment: the weights with adapters merged into them, in float32."""
    adapts = config.finetune == "lora" and any(one.name == "finetuning" for one in experiments)
    return 4.0 * parameters if adapts else 0.0
