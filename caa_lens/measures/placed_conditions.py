"""Conditions at each pair: what leaves the prompt's beginning as it was shares it, everything else runs in full.

Most conditions act from the end of the instruction on, at every pair alike. Named positions and gates depend on the
pair, so those conditions are worked out pair by pair; pairs at which all of them come out alike run together. What
changes the prompt runs from its first token on, all such conditions as rows of one batch; what acts inside of a block,
or elsewhere in one answer than in the other, runs by itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from caa_lens.engine.staircase import EditedCondition
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.provenance import HOOK_POINT
from caa_lens.steering.interventions import Intervention, check_intervention
from caa_lens.steering.placing import open_gates, span_of

Condition = tuple[Intervention, ...]


class Rows(NamedTuple):
    """Conditions that run as rows of one batch.

    Attributes:
        columns: which ones they are.
        edits: what is done in each.
    """

    columns: list[int]
    edits: list[EditedCondition]


class Together(NamedTuple):
    """Pairs at which all conditions come out alike.

    Attributes:
        pairs: which ones they are.
        shared: conditions that share their prompts, counted from the end of the instruction.
        whole: those that change them, counted from the text's first token.
        alone: the columns of all others.
    """

    pairs: list[int]
    shared: Rows
    whole: Rows
    alone: list[int]


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

    def together(self, pairs: Sequence[int]) -> Iterator[Together]:
        """Pairs that run together, with what is done there."""
        if not self._own:
            every = Rows(list(range(len(self.conditions))), self.edits)
            yield Together(list(pairs), every, Rows([], []), [])
            return
        alike: dict[tuple, tuple[list, list, list[int]]] = {}
        for pair in pairs:
            shared = [self._from_the_end(i, pair) for i in self._own]
            whole = [
                self._from_the_start(i, pair) if some is None else None
                for i, some in zip(self._own, shared, strict=True)
            ]
            key = tuple(None if some is None else _place_and_strength(some) for some in (*shared, *whole))
            alike.setdefault(key, (shared, whole, []))[2].append(pair)
        for shared, whole, members in alike.values():
            edits: dict[int, EditedCondition | None] = dict(enumerate(self.edits))
            edits |= zip(self._own, shared, strict=True)
            first, second = _rows(edits), _rows(dict(zip(self._own, whole, strict=True)))
            alone = sorted(set(edits) - {*first.columns, *second.columns})
            yield Together(members, first, second, alone)

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
        found = _of_all_sides(sides)
        return None if found is None or any(one.positions[0] < 0 for one in found) else found

    def _from_the_start(self, condition: int, pair: int) -> EditedCondition | None:
        """A condition's edits counted from the text's first token."""
        return _of_all_sides([self.at(condition, pair, side) for side in range(len(self._pairs[pair]))])

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


def _of_all_sides(sides: Sequence[EditedCondition]) -> EditedCondition | None:
    """What is done to both sides; None where that is not the same, or acts inside of a block."""
    where = [[one.positions for one in edits] for edits in sides]
    if any(some != where[0] for some in where) or any(one.site != HOOK_POINT for one in sides[0]):
        return None
    return sides[0]


def _rows(edits: Mapping[int, EditedCondition | None]) -> Rows:
    known = {i: some for i, some in edits.items() if some is not None}
    return Rows(list(known), list(known.values()))


def _moved(span: Any, by: int) -> tuple[int, int | None]:
    first, stop = span
    return first + by, None if stop is None else stop + by


def _place_and_strength(edits: EditedCondition) -> tuple:
    return tuple((one.positions, one.multiplier) for one in edits)
