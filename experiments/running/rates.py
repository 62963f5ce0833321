"""What a device does in a second, by a data sheet or as stated: for plans of a run where the model is not.

Time is two floating-point operations a parameter and token, of which rate half is expected of a whole model. Tokens
that are generated wait for each other: a step takes at least the time of reading all weights once. Rates are stated
with `--flops` and `--bandwidth`, or taken from a card's data sheet: dense products on the tensor cores in half
precision (accumulated in float32), plain float32 (PyTorch leaves TF32 off unless told otherwise), and `REACHED` of the
bandwidth.
Nothing of this was measured by us.
"""

from dataclasses import dataclass

from experiments.running.costs import Cost
from experiments.running.settings import BYTES

EFFICIENCY = 0.5
REACHED = 0.6  # of the peak bandwidth, where weights are read once for every generated token


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
            "--flops 1.5e14 --bandwidth 2e12; or neither"
        )
    return Rates(flops=flops, bandwidth=bandwidth, source="stated")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A card: memory in GB (10^9 bytes), TFLOP/s in half precision and float32, GB/s of memory."""

    name: str
    memory: float
    half: float
    single: float
    bandwidth: float
    bfloat16: bool = True


GPUS = {
    "t4": Gpu(name="T4", memory=16, half=65, single=8.1, bandwidth=320, bfloat16=False),
    "v100": Gpu(name="V100 32 GB", memory=32, half=125, single=15.7, bandwidth=900, bfloat16=False),
    "4090": Gpu(name="RTX 4090", memory=24, half=165, single=82.6, bandwidth=1008),
    "l4": Gpu(name="L4", memory=24, half=121, single=30.3, bandwidth=300),
    "a10": Gpu(name="A10", memory=24, half=125, single=31.2, bandwidth=600),
    "a100-40": Gpu(name="A100 40 GB", memory=40, half=312, single=19.5, bandwidth=1555),
    "l40s": Gpu(name="L40S", memory=48, half=362, single=91.6, bandwidth=864),
    "a100-80": Gpu(name="A100 80 GB", memory=80, half=312, single=19.5, bandwidth=2039),
    "h100": Gpu(name="H100 SXM", memory=80, half=989, single=67, bandwidth=3350),
    "h200": Gpu(name="H200", memory=141, half=989, single=67, bandwidth=4800),
}


def gpu_rates(name: str, dtype: str) -> Rates:
    """A card's rates in a number format.

    Raises:
        ValueError: there is no such card in the list, or it does not compute in this format.
    """
    if name not in GPUS:
        raise ValueError(
            f"got --gpu {name}, expected one of {', '.join(GPUS)}; of another card, give --flops and --bandwidth"
        )
    card = GPUS[name]
    if dtype == "bfloat16" and not card.bfloat16:
        raise ValueError(f"got --gpu {name} and bfloat16, which it does not compute in: give --dtype float16")
    flops = (card.single if dtype == "float32" else card.half) * 1e12
    kind = "float32 without TF32" if dtype == "float32" else dtype
    source = f"planned for one {card.name} in {kind} by its data sheet, {REACHED:.0%} of its bandwidth; not measured"
    return Rates(flops=flops, bandwidth=REACHED * card.bandwidth * 1e9, source=source, memory=card.memory * 1e9)


def smallest_gpu(memory: float, dtype: str) -> str:
    """The smallest card of the list that holds so many bytes in this format; the largest, if none does."""
    able = [name for name, card in GPUS.items() if card.bfloat16 or dtype != "bfloat16"]
    return next((name for name in able if GPUS[name].memory * 1e9 >= memory), able[-1])
