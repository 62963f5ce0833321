"""Conditions at each pair: what leaves the prompt's beginning as it was shares it, everything else runs in full.

Most conditions act from the end of the instruction on, at every pair alike. Named positions and gates depend on the
pair, so those conditions are worked out pair by pair; pairs at which all of them come out alike run together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from caa_lens.engine.staircase import EditedCondition
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.provenance import HOOK_POINT
from caa_lens.steering.interventions import Intervention, check_intervention
from caa_lens.steering.placing import open_gates, span_of

Condition = tuple[Intervention, ...]


class Shared(NamedTuple):
    """Pairs that run together.

    Attributes:
        pairs: which ones they are.
        columns: the conditions that share their prompts.
        edits: what is done in each of these, counted from the end of the instruction.
    """

    pairs: list[int]
    columns: list[int]
    edits: list[EditedCondition]


def check_condition(model: Any, condition: object) -> None:
    """Raises `TypeError` or `ValueError` for what is no tuple of interventions, or cannot be scored under."""
    assert isinstance(condition, tuple | list)
    for one in condition:
        check_intervention(model, one)
        if isinstance(one.multiplier, Tensor) and one.multiplier.ndim:
            raise ValueError("a condition's multiplier must be one number: make one condition of each multiplier")
        if one.where is not None and not isinstance(one.where, str):
            raise ValueError(
                "a condition steers from the instruction's last token on, so it takes no start and no positions: "
                "score the model's logits inside `with steer(model, v, positions=...)` instead, or give positions by "
                "a name, such as 'all' or 'last'"
            )


class PlacedConditions:
    """What each condition does at each pair.

    Attributes:
        edits: of each condition as if it acted from the end of the instruction on, counted from there.
        in_full: why some conditions cannot share a prompt, None if all can.
    """

    def __init__(self, model: Any, conditions: Sequence[Condition], pairs: Sequence[Sequence[Prompt]]) -> None:
        self.conditions = conditions
        self.edits: list[EditedCondition] = [tuple(one._at((0, None)) for one in some) for some in conditions]
        self._pairs = pairs
        self._own = [i for i, some in enumerate(conditions) if any(map(_depends_on_the_pair, some))]
        gates = [one.gate for i in self._own for one in conditions[i] if one.gate is not None]
        self._open = open_gates(model, gates, [branches[0] for branches in pairs])
        self.in_full: str | None = None
        reasons = {why for i in self._own for why in map(self._why_in_full, conditions[i]) if why}
        if reasons:
            n = sum(any(map(self._why_in_full, conditions[i])) for i in self._own)
            self.in_full = f"{n} of {len(conditions)} conditions {' or '.join(sorted(reasons))}"

    def shared(self, pairs: Sequence[int]) -> Iterator[Shared]:
        """Pairs that run together, with what is done there; conditions that run in full are not among the columns."""
        if not self._own:
            yield Shared(list(pairs), list(range(len(self.conditions))), self.edits)
            return
        alike: dict[tuple, tuple[list[EditedCondition | None], list[int]]] = {}
        for pair in pairs:
            found = [self._from_the_end(i, pair) for i in self._own]
            key = tuple(None if some is None else _place_and_strength(some) for some in found)
            alike.setdefault(key, (found, []))[1].append(pair)
        for found, members in alike.values():
            edits: list[EditedCondition | None] = list(self.edits)
            for i, some in zip(self._own, found, strict=True):
                edits[i] = some
            columns = [i for i, some in enumerate(edits) if some is not None]
            yield Shared(members, columns, [some for some in edits if some is not None])

    def at(self, condition: int, pair: int, side: int) -> EditedCondition:
        """What is done to one side's whole text, counted from its own first token."""
        prompt = self._pairs[pair][side]
        return tuple(self._edit(one, pair, prompt) for one in self.conditions[condition])

    def _edit(self, one: Intervention, pair: int, prompt: Prompt) -> Any:
        if one.n_rows is None and not isinstance(one.where, str):
            span: tuple[int, int | None] = (prompt.steer_start, None)
        else:
            span = span_of(one.where if isinstance(one.where, str) else "caa", prompt, one.n_rows)
        edit = one._at(span)
        if one.gate is not None:
            edit = replace(edit, multiplier=float(one.multiplier) * float(self._open[id(one.gate)][pair]))
        return edit

    def _from_the_end(self, condition: int, pair: int) -> EditedCondition | None:
        """A condition's edits counted from the end of the instruction; None where it changes what is before that."""
        sides = []
        for side, prompt in enumerate(self._pairs[pair]):
            # Behind a closed gate nothing is done, wherever that would be.
            edits = [one for one in self.at(condition, pair, side) if one.operator == "set" or one.multiplier != 0]
            sides.append(tuple(replace(one, positions=_moved(one.positions, -prompt.steer_start)) for one in edits))
        where = [[one.positions for one in edits] for edits in sides]
        if any(some != where[0] for some in where) or any(span[0] < 0 for span in where[0]):
            return None
        return None if any(one.site != HOOK_POINT for one in sides[0]) else sides[0]

    @staticmethod
    def _why_in_full(one: Intervention) -> str | None:
        if one.operator != "set" and float(one.multiplier) == 0:
            return None
        if one.site != HOOK_POINT:
            return "act inside of a block"
        return "change the prompt before the end of its instruction" if one.where in _BEFORE else None


_BEFORE = ("all", "after_first", "prompt", "front")


def _depends_on_the_pair(one: Intervention) -> bool:
    return one.where not in (None, "caa") or one.gate is not None or one.n_rows is not None or one.site != HOOK_POINT


def _moved(span: Any, by: int) -> tuple[int, int | None]:
    first, stop = span
    return first + by, None if stop is None else stop + by


def _place_and_strength(edits: EditedCondition) -> tuple:
    return tuple((one.positions, one.multiplier) for one in edits)
