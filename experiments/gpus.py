"""What common GPUs do by their vendor's data sheets: for plans of a run on another machine than this one.

Peak rates: dense products on the tensor cores in half precision (accumulated in float32), plain float32 (PyTorch leaves
TF32 off unless told otherwise), and memory. A whole model reaches about half of the operations (`plan.EFFICIENCY`) and
some of the bandwidth (`REACHED`); nothing of this was measured by us.
"""

from dataclasses import dataclass

from experiments.plan import Rates

REACHED = 0.6  # of the peak bandwidth, where weights are read once for every generated token


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
