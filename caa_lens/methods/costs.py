"""What a method costs beside its side effects: passes to fit it, numbers to keep, and how much of a run it changes."""

from collections.abc import Sequence
from dataclasses import dataclass

from caa_lens.measures.placed_conditions import Condition
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.provenance import HOOK_POINT
from caa_lens.steering.placing import span_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Costs of one method.

    Attributes:
        method: its name.
        forward, backward: texts that are run through the model to fit it at one setting, and that gradients come back
            through; of blocks above a layer alone a text counts as a whole one.
        seconds: that the fit of all settings took.
        numbers: that are kept to apply it at the chosen setting.
        coordinates: share of the numbers at a changed place that are changed.
        tokens: share of the tokens of the neutral prompts and their answers that are changed, in each changed block.
        shares_prefix: whether what comes before the end of the instruction is the same in all conditions.
    """

    method: str
    forward: int
    backward: int
    seconds: float
    numbers: int
    coordinates: float
    tokens: float
    shares_prefix: bool


def numbers_of(condition: Condition) -> int:
    """How many numbers an intervention needs, all its layers and parameters."""
    return sum(
        tensor.numel()
        for one in condition
        for tensor in (*one.parameters.values(), *(() if one.vector is None else (one.vector.direction,)))
    )


def share_of_coordinates(condition: Condition) -> float:
    """The share of the numbers at a changed place that a condition changes; masks leave the others alone."""
    shares = [
        float((one.parameters["factor"] != 0).float().mean()) if "factor" in one.parameters else 1.0
        for one in condition
    ]
    return sum(shares) / len(shares) if shares else 0.0


def share_of_tokens(condition: Condition, prompts: Sequence[Prompt]) -> float:
    """The share of all tokens of some prompts at which a condition acts, where it acts at all."""
    changed = 0
    for prompt in prompts:
        places = [_span(one.where, one.n_rows, prompt) for one in condition]
        changed += max((stop - first for first, stop in places), default=0)
    return changed / sum(map(len, prompts))


def shares_prefix(condition: Condition, prompts: Sequence[Prompt]) -> bool:
    """Whether a condition leaves the inside of blocks, and all tokens before the instruction's end, as they were."""
    return all(
        one.site == HOOK_POINT and _span(one.where, one.n_rows, prompt)[0] >= prompt.steer_start
        for one in condition
        for prompt in prompts
    )


def _span(where: object, n_rows: int | None, prompt: Prompt) -> tuple[int, int]:
    first, stop = span_of(where if isinstance(where, str) else "caa", prompt, n_rows)
    return first, len(prompt) if stop is None else stop
