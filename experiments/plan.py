"""What a run will take, before it starts: forwards, tokens, memory and time.

Tokens are estimated from characters (4 a token, and 12 of a chat format a prompt), so that no tokenizer and no model
is needed. Time is two floating-point operations a parameter and token, at a rate that is measured here on one matrix
product of the model's type (or stated with `--flops`), of which half is expected of a whole model. Tokens that are
generated wait for each other: a step takes at least the time of reading all weights once, at a rate measured by copying
memory (or stated with `--bandwidth`). For another machine, `--gpu` takes both rates from a data sheet (see `gpus`);
where the model would not run on this one at all, that is done for the smallest card that holds it. Prompts that many
conditions share run once; conditions run from their own layer on, on average half the depth, which is what `depth`
says.
"""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.experiment import Cost, Experiment, Unit
from experiments.settings import RunConfig

if TYPE_CHECKING:
    from caa_lens.contrast.sets import ContrastSet
    from experiments.context import Context

CHARACTERS_A_TOKEN = 4
FORMAT_TOKENS = 12
LETTER_TOKENS = 4
EFFICIENCY = 0.5
KNOWN_LAYERS = {"demo": 30, "Llama-2-7b": 32, "Llama-2-13b": 40}
KNOWN_PARAMETERS = {"demo": 134_515_008, "Llama-2-7b": 6_738_415_616, "Llama-2-13b": 13_015_864_320}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def tokens_of(texts: Iterable[str]) -> float:
    """Estimated tokens of some prompts, formats included."""
    return sum(len(text) / CHARACTERS_A_TOKEN + FORMAT_TOKENS for text in texts)


def reading_cost(pairs: "ContrastSet") -> Cost:
    """Both answers of every pair, behind one pass of the question."""
    questions = tokens_of(pair.question for pair in pairs)
    return Cost(forwards=2 * len(pairs), tokens=questions + _answers(pairs))


def scoring_cost(pairs: "ContrastSet", n_conditions: int, *, depth: float = 1.0) -> Cost:
    """All pairs under some conditions: the questions once, the answers once a condition."""
    questions = tokens_of(pair.question for pair in pairs)
    sides = 1 if pairs.kind == "ab" else 2
    return Cost(forwards=sides * len(pairs) * n_conditions, tokens=questions + n_conditions * depth * _answers(pairs))


def generation_cost(prompts: Sequence[str], max_new_tokens: int) -> Cost:
    """One batch of prompts, each answered with all the tokens that are allowed."""
    n_new = len(prompts) * max_new_tokens
    return Cost(forwards=len(prompts) + n_new, tokens=tokens_of(prompts) + n_new, steps=max_new_tokens)


def _answers(pairs: "ContrastSet") -> float:
    if pairs.kind == "ab":
        return len(pairs) * LETTER_TOKENS
    return tokens_of(text for pair in pairs for text in (pair.positive, pair.negative)) - 2 * len(pairs) * (
        FORMAT_TOKENS - 2
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the device does: floating-point operations a second, and bytes of memory read a second."""

    flops: float
    bandwidth: float
    source: str
    memory: float | None = None
    """Bytes of the device's memory, where it is not this machine's."""

    def seconds(self, cost: Cost, n_parameters: float, dtype: str) -> float:
        compute = 2 * n_parameters * cost.tokens / (EFFICIENCY * self.flops)
        return max(compute, cost.steps * n_parameters * BYTES[dtype] / self.bandwidth)


def stated_rates(flops: float | None, bandwidth: float | None) -> Rates | None:
    """Rates as given on the command line; None where neither is.

    Raises:
        ValueError: only one of them is given, as nothing of the one follows from the other; or one is not positive.
    """
    if flops is None and bandwidth is None:
        return None
    if flops is None or bandwidth is None or min(flops, bandwidth) <= 0:
        raise ValueError(
            f"got --flops {flops} and --bandwidth {bandwidth}, expected two positive numbers: of an A100, for example, "
            "--flops 1.5e14 --bandwidth 2e12; or neither, and they are measured here"
        )
    return Rates(flops=flops, bandwidth=bandwidth, source="stated")


def planned_rates(
    config: RunConfig, experiments: Sequence[Experiment], gpu: str | None, stated: Rates | None, device: str | None
) -> Rates:
    """As stated, or of a card by its name; else measured here, or of the smallest card that would do, if this does not.

    Raises:
        ValueError: rates and a card are given; or as `gpus.gpu_rates`.
    """
    from experiments.gpus import gpu_rates, smallest_gpu

    if gpu is not None and stated is not None:
        raise ValueError("got --gpu and --flops, expected one of them: the card's rates, or your own")
    if stated is not None:
        return stated
    if gpu is not None:
        return gpu_rates(gpu, config.dtype)
    parameters = n_parameters(config.model)
    if parameters is not None:
        import torch

        from caa_lens.models.loading.device_memory import free_memory

        here = device or ("cuda" if torch.cuda.is_available() else "cpu")
        needed, free = memory_bytes(config, parameters, experiments), free_memory(here)
        if needed > free:
            rates = gpu_rates(smallest_gpu(needed, config.dtype), config.dtype)
            lacking = f"it would not run here, as {here} has {free / 1e9:.1f} GB free; {rates.source}"
            return replace(rates, source=lacking)
    return measure_rates(config.dtype, device)


def measure_rates(dtype: str, device: str | None = None) -> Rates:
    """Time one matrix product and one copy, about half a second in all."""
    import torch

    from caa_lens.models.loading.load import DTYPES

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    n = 4096 if device.startswith("cuda") else 1024
    a = torch.randn(n, n, device=device).to(DTYPES[dtype])
    memory = torch.empty(2**26, dtype=torch.uint8, device=device)

    def best(do: object) -> float:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            do()  # type: ignore[operator]
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return min(times)

    flops = 2 * n**3 / best(lambda: a @ a)
    bandwidth = 2 * memory.numel() / best(memory.clone)
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    return Rates(flops=flops, bandwidth=bandwidth, source=f"measured on {device}{threads}")


def n_parameters(model: str) -> int | None:
    """From the model's own configuration where it lies on this machine, else from its name; None if neither tells."""
    from caa_lens.models.loading.load import n_parameters as count

    if (Path(model) / "config.json").is_file():
        from caa_lens.models.loading.llama_config import read_config

        return count(read_config(Path(model)))
    basename = model.rstrip("/").rsplit("/", 1)[-1]
    return next((number for name, number in KNOWN_PARAMETERS.items() if basename.startswith(name)), None)


def unit_costs(experiments: Sequence[Experiment], context: "Context") -> dict[tuple[str, Unit], Cost]:
    """The cost of every unit that is not finished."""
    return {
        (one.name, unit): one.cost(unit, context)
        for one in experiments
        for unit in one.units(context.config)
        if not context.folder.is_done(one.name, unit)
    }


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


def stored_bytes(model: str) -> float | None:
    """Of a model's weights on the disk: of its files where they are here, else Llama 2's, stored in half precision."""
    from caa_lens.models.loading.checkpoints import INDEX_NAME

    path = Path(model).expanduser()
    if path.is_file():
        return path.stat().st_size
    if path.is_dir():
        sharded = (path / INDEX_NAME).is_file() and not (path / "model.safetensors").is_file()
        return sum(file.stat().st_size for file in path.glob("model-*.safetensors" if sharded else "model.safetensors"))
    parameters = n_parameters(model)
    return None if parameters is None else parameters * (4 if model == "demo" else 2)


def scratch_bytes(config: RunConfig, parameters: int, experiments: Sequence[Experiment]) -> float:
    """What lies in the run folder for a moment: the weights with adapters merged into them, in float32."""
    adapts = config.finetune == "lora" and any(one.name == "finetuning" for one in experiments)
    return 4.0 * parameters if adapts else 0.0


def show_duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def show_number(number: float) -> str:
    """With about two digits and a unit: 12 k, 3.4 M."""
    if number < 1000:
        return f"{number:.0f}"
    power = min(int(math.log10(number)) // 3, 4)
    scaled = number / 1000**power
    return f"{scaled:.{0 if scaled >= 10 else 1}f} {' kMGT'[power]}"
