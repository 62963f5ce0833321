"""Many steering conditions at once, as rows that split off where they are steered.

One column a layer: a condition that steers at layer 2 costs nothing below it, because it is copied from the unsteered
rows there::

    layer            0    1    2    3
    unsteered       ===================
    v[0] * 1             ==============
    v[0] * 2             ==============
    v[1] * 1                  =========
    ...
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

import torch
from jaxtyping import Float, Int
from torch import Tensor

from caa_lens.engine.edits import Edit
from caa_lens.engine.operators import formula_of
from caa_lens.engine.positions import chosen

EditedCondition = tuple[Edit, ...]


class Staircases:
    """The staircases of one call: its conditions in chunks that fit into memory, for every batch of questions.

    Which rows split where depends on the conditions alone, so a chunk's staircase is built when a batch first needs it,
    and serves all batches after. The number of chunks is a power of two, so that batches of different lengths ask for
    few different ones.
    """

    def __init__(self, conditions: Sequence[EditedCondition], device: torch.device | str = "cpu") -> None:
        self.conditions = _with_plain_numbers(conditions)
        self.device = device
        # Whether all that is done is the same at every position, whatever else is in the row.
        self.act_alike = all(_acts_alike(step) for condition in self.conditions for step in condition)
        self._built: dict[int, list[tuple[Tensor, Staircase]]] = {}  # by the number of chunks

    def at_most(self, at_once: int) -> Iterator[tuple[Int[Tensor, " condition"], "Staircase"]]:
        """Chunks of at most `at_once` conditions: which ones they are, on the device, and their staircase."""
        n, n_chunks = len(self.conditions), 1
        while n_chunks < n and n > n_chunks * at_once:
            n_chunks *= 2
        if n_chunks not in self._built:
            # Conditions of neighbouring layers share the most rows.
            order = sorted(range(n), key=lambda i: [step.layer for step in self.conditions[i]])
            size = -(-n // n_chunks)
            chunks = [order[first : first + size] for first in range(0, n, size)]
            indices = torch.tensor(order).to(self.device).split(size)
            stairs = [Staircase([self.conditions[i] for i in some], self.device) for some in chunks]
            self._built[n_chunks] = list(zip(indices, stairs, strict=True))
        yield from self._built[n_chunks]


class Staircase:
    """An `edit` for `run_suffixes` that runs many steering conditions at once.

    All conditions start as one group of rows. After block l a group splits: the conditions that steer at l go on in
    new, steered groups, the others in the old one. Conditions with the same history share their rows to the end, so
    all multipliers 0 of a sweep cost one row, and a vector at layer 20 costs nothing below layer 20.

    Which rows split where depends on the conditions alone, so it is worked out at once. What the device needs goes up
    in one copy of indices and two of directions and multipliers, however many conditions there are; to run, it moves
    nothing and waits for nothing.

    Attributes:
        groups: after the last block, the indices of each group's conditions. Rows are ordered `[group branch]`, where
            a branch is one of a question's suffixes: as many as there are rows when the blocks begin.
    """

    def __init__(self, conditions: Sequence[EditedCondition], device: torch.device | str = "cpu") -> None:
        self.groups: list[list[int]] = [list(range(len(conditions)))]
        active = [tuple(step for step in condition if _acts(step)) for condition in _with_plain_numbers(conditions)]
        layers = sorted({step.layer for condition in active for step in condition})
        splits = [self._split(active, layer) for layer in layers]
        of_condition = {index: group for group, members in enumerate(self.groups) for index in members}

        indices = [[of_condition[i] for i in range(len(conditions))], *(sources for sources, _ in splits)]
        flat = torch.tensor(list(chain.from_iterable(indices))).to(device)
        self._group_of, *sources = flat.split([len(some) for some in indices])
        edits = [step for _, actions in splits for action in actions for step in action]
        directions = _stacked([_plain_direction(step) for step in edits], device)
        multipliers = torch.tensor([float(step.multiplier) for step in edits]).to(device)
        moved = _on_device(edits, device)

        self._steps: dict[int, _Step] = {}
        first, n_groups = 0, 1
        for layer, source, (_, actions) in zip(layers, sources, splits, strict=True):
            stop = first + sum(map(len, actions))
            its = iter(zip(range(first, stop), edits[first:stop], strict=True))
            self._steps[layer] = _Step(
                n_before=n_groups,
                sources=source,
                actions=[
                    tuple(
                        _Action(step, _parameters(step, i, directions, moved), multipliers[i])
                        for i, step in islice(its, len(action))
                    )
                    for action in actions
                ],
                directions=directions[first:stop],
                multipliers=multipliers[first:stop],
                only_adds=all(len(action) == 1 and _is_plain_add(action[0]) for action in actions),
            )
            first, n_groups = stop, len(source)

    def _split(self, conditions: Sequence[EditedCondition], layer: int) -> tuple[list[int], list[EditedCondition]]:
        """Split the groups at a layer: which group each one comes from, and what is done to the new ones, the last."""
        kept: list[tuple[int, list[int]]] = []  # (the group it comes from, its conditions)
        new: list[tuple[int, list[int]]] = []
        actions: list[EditedCondition] = []
        for source, members in enumerate(self.groups):
            alike: dict[tuple, tuple[EditedCondition, list[int]]] = {}
            for index in members:
                action = tuple(step for step in conditions[index] if step.layer == layer)
                alike.setdefault(tuple(map(_identity, action)), (action, []))[1].append(index)
            for action, indices in alike.values():
                if action:
                    new.append((source, indices))
                    actions.append(action)
                else:
                    kept.append((source, indices))
        self.groups = [indices for _, indices in (*kept, *new)]
        return [source for source, _ in (*kept, *new)], actions

    def __call__(self, layer: int, resid: Float[Tensor, "question row pos d_model"]) -> Tensor:
        step = self._steps.get(layer)
        if step is None:
            return resid
        if step.sources.device != resid.device:  # a block on another device than the first one: moved there once
            step = self._steps[layer] = step.to(resid.device)
        grouped = resid.unflatten(1, (step.n_before, -1))[:, step.sources]  # [question group branch pos d_model]
        steered = grouped[:, -len(step.actions) :]
        if step.only_adds:
            added = (step.multipliers[:, None] * step.directions).to(resid.dtype)  # rounded once, as `add` does
            steered += added[None, :, None, None]
        else:
            for row, action in enumerate(step.actions):
                for one in action:
                    steered[:, row] = one(steered[:, row])
        return grouped.flatten(1, 2)

    def condition_groups(self) -> Int[Tensor, " condition"]:
        """For each condition, the group its rows are in, on the device."""
        return self._group_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Step:
    """What happens to the rows after one block.

    Attributes:
        n_before: the number of groups before the step.
        sources: for each group after the step, the group it is copied from; groups that go on unsteered come first.
        actions: for each new group, what is done to it, one after another.
        directions, multipliers: of all new groups' edits in order, in float32.
        only_adds: whether every new group has one vector added everywhere, which is done to all of them at once.
    """

    n_before: int
    sources: Int[Tensor, " group"]
    actions: "list[tuple[_Action, ...]]"
    directions: Float[Tensor, "edit d_model"]
    multipliers: Float[Tensor, " edit"]
    only_adds: bool

    def to(self, device: torch.device) -> "_Step":
        return replace(
            self,
            sources=self.sources.to(device),
            actions=[tuple(one.to(device) for one in action) for action in self.actions],
            directions=self.directions.to(device),
            multipliers=self.multipliers.to(device),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Action:
    """An edit of some rows, with what it needs on their device."""

    edit: Edit
    parameters: dict[str, Tensor]
    multiplier: Tensor

    def to(self, device: torch.device) -> "_Action":
        moved = {name: one.to(device) for name, one in self.parameters.items()}
        return _Action(self.edit, moved, self.multiplier.to(device))

    def __call__(self, rows: Float[Tensor, "question branch pos d_model"]) -> Tensor:
        edit, parameters, n_pos = self.edit, self.parameters, rows.shape[2]
        here = None
        if edit.by_position:
            assert isinstance(edit.positions, tuple)
            index = torch.arange(n_pos, device=rows.device) - int(edit.positions[0])
            here = index >= 0
            for name in edit.by_position:
                n_told = len(parameters[name])
                here = here & (index < n_told)
                parameters = {**parameters, name: parameters[name][index.clamp(0, n_told - 1)]}
        steered = formula_of(edit.operator)(rows, parameters, self.multiplier)
        if not _is_everywhere(edit):
            span = chosen(edit.positions, behind=0, n_rows=1, n_pos=n_pos, device=rows.device)[0]
            here = span if here is None else here & span
        return steered if here is None else torch.where(here[:, None], steered, rows)


def _is_everywhere(edit: Edit) -> bool:
    """Whether an edit acts on every position of a suffix, as nearly all do."""
    if isinstance(edit.positions, Tensor):
        return False
    first, stop = edit.positions
    return stop is None and not isinstance(first, Tensor) and first == 0


def _acts_alike(edit: Edit) -> bool:
    """Whether an edit does the same at every position: its formula is one of ours, which look at one at a time."""
    return isinstance(edit.operator, str) and not edit.by_position and _is_everywhere(edit)


def _is_plain_add(edit: Edit) -> bool:
    return edit.operator == "add" and edit.direction is not None and not edit.by_position and _is_everywhere(edit)


def _plain_direction(edit: Edit) -> Tensor:
    """The direction of an edit that has one for all positions; a placeholder of no numbers else."""
    return torch.empty(0) if edit.direction is None or edit.by_position else edit.direction


def _on_device(edits: Sequence[Edit], device: torch.device | str) -> dict[int, Tensor]:
    """Parameters other than plain directions on a device by their id, each copied once."""
    found: dict[int, Tensor] = {}
    for edit in edits:
        more = edit.all_parameters if edit.by_position else edit.parameters
        found |= {id(one): one.to(device) for one in more.values() if id(one) not in found}
    return found


def _parameters(edit: Edit, row: int, directions: Tensor, moved: dict[int, Tensor]) -> dict[str, Tensor]:
    found = {name: moved[id(one)] for name, one in edit.all_parameters.items() if id(one) in moved}
    if edit.direction is not None and not edit.by_position:
        found["direction"] = directions[row]
    return found


def _with_plain_numbers(conditions: Sequence[EditedCondition]) -> list[EditedCondition]:
    """The conditions with plain numbers as multipliers; those that are tensors are read once from every device."""
    tensors: dict[torch.device, dict[int, Tensor]] = {}
    for condition in conditions:
        for step in condition:
            if isinstance(step.multiplier, Tensor):
                tensors.setdefault(step.multiplier.device, {})[id(step.multiplier)] = step.multiplier
    numbers: dict[int, float] = {}
    for some in tensors.values():
        numbers |= zip(some, torch.stack([one.double().reshape(()) for one in some.values()]).tolist(), strict=True)
    if not numbers:
        return list(conditions)
    return [
        tuple(
            replace(step, multiplier=numbers[id(step.multiplier)]) if id(step.multiplier) in numbers else step
            for step in condition
        )
        for condition in conditions
    ]


def _stacked(directions: Sequence[Tensor], device: torch.device | str) -> Float[Tensor, "row d_model"]:
    """All directions in float32 on a device, with one copy from every device that they lie on; rows of 0 for none."""
    lying: dict[torch.device, list[int]] = {}
    for row, direction in enumerate(directions):
        if len(direction):
            lying.setdefault(direction.device, []).append(row)
    rows: dict[int, Tensor] = {}
    for some in lying.values():
        rows |= zip(some, torch.stack([directions[i].float() for i in some]).to(device), strict=True)
    if not rows:
        return torch.empty(len(directions), 0, device=device)
    if len(rows) < len(directions):
        none = torch.zeros_like(next(iter(rows.values())))
        rows = {i: rows.get(i, none) for i in range(len(directions))}
    return torch.stack([rows[i] for i in range(len(directions))])


def _acts(step: Edit) -> bool:
    return step.operator == "set" or float(step.multiplier) != 0


def _identity(step: Edit) -> tuple:
    """What two edits must have in common for their rows to be shared; tensors are the same only if they are one."""
    ends = step.positions if isinstance(step.positions, tuple) else (step.positions,)
    where = tuple(id(end) if isinstance(end, Tensor) else end for end in ends)
    parameters = tuple(sorted((name, id(one)) for name, one in step.all_parameters.items()))
    operator = step.operator if isinstance(step.operator, str) else id(step.operator)
    return parameters, operator, float(step.multiplier), where, step.by_position
