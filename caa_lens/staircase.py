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

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.hooks import OPERATORS, Intervention

Condition = tuple[Intervention, ...]


class Staircase:
    """An `edit` for `run_suffixes` that runs many steering conditions at once.

    All conditions start as one group of rows. After block l a group splits: the conditions that steer at l go on in
    new, steered groups, the others in the old one. Conditions with the same history share their rows to the end, so
    all multipliers 0 of a sweep cost one row, and a vector at layer 20 costs nothing below layer 20.

    Which rows split where depends on the conditions alone, so it is worked out at once, with all tensors on the device.

    Attributes:
        groups: after the last block, the indices of each group's conditions. Rows are ordered `[group branch]`, where
            a branch is one of a question's suffixes.
    """

    def __init__(self, conditions: Sequence[Condition], n_branches: int, device: torch.device | str = "cpu") -> None:
        self.n_branches = n_branches
        self.n_conditions = len(conditions)
        self.groups: list[list[int]] = [list(range(len(conditions)))]
        self._steps: dict[int, _Step] = {}
        active = [tuple(step for step in condition if _acts(step)) for condition in conditions]
        for layer in sorted({step.vector.layer for condition in active for step in condition}):
            self._steps[layer] = self._split(active, layer, torch.device(device))

    def _split(self, conditions: Sequence[Condition], layer: int, device: torch.device) -> "_Step":
        """Split the groups at a layer, and say which rows the new groups come from and what is done to them."""
        kept: list[tuple[int, list[int]]] = []  # (the group it comes from, its conditions)
        new: list[tuple[int, list[int]]] = []
        actions: list[Condition] = []
        for source, members in enumerate(self.groups):
            alike: dict[tuple, tuple[Condition, list[int]]] = {}
            for index in members:
                action = tuple(step for step in conditions[index] if step.vector.layer == layer)
                alike.setdefault(tuple(map(_identity, action)), (action, []))[1].append(index)
            for action, indices in alike.values():
                if action:
                    new.append((source, indices))
                    actions.append(action)
                else:
                    kept.append((source, indices))
        self.groups = [indices for _, indices in (*kept, *new)]
        additions = None
        if all(len(action) == 1 and action[0].operator == "add" for action in actions):
            directions = torch.stack([step.vector.direction.float() for (step,) in actions]).to(device)
            additions = directions * torch.tensor([[float(step.multiplier)] for (step,) in actions], device=device)
        return _Step(
            sources=torch.tensor([source for source, _ in (*kept, *new)], device=device),
            n_kept=len(kept),
            actions=[tuple(step.to(device) for step in action) for action in actions],
            additions=additions,
        )

    def __call__(self, layer: int, resid: Float[Tensor, "question row pos d_model"]) -> Tensor:
        step = self._steps.get(layer)
        if step is None:
            return resid
        grouped = resid.unflatten(1, (-1, self.n_branches))[:, step.sources]  # [question group branch pos d_model]
        steered = grouped[:, step.n_kept :]
        if step.additions is not None:
            steered += step.additions.to(resid.dtype)[None, :, None, None]  # rounded once, as `hooks.add` does
        else:
            for row, action in enumerate(step.actions):
                for i in action:
                    multiplier = torch.as_tensor(i.multiplier)
                    steered[:, row] = OPERATORS[i.operator](steered[:, row], i.vector.direction, multiplier)
        return grouped.flatten(1, 2)

    def condition_groups(self) -> list[int]:
        """For each condition, the group its rows are in."""
        of_condition = {index: group for group, members in enumerate(self.groups) for index in members}
        return [of_condition[index] for index in range(self.n_conditions)]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Step:
    """What happens to the rows after one block.

    Attributes:
        sources: for each group after the step, the group it is copied from; kept groups first, `[group]`.
        n_kept: number of groups that go on unsteered.
        actions: for each new group, its interventions.
        additions: if every new group just has one vector added, what is added, `[new d_model]` in float32.
    """

    sources: Tensor
    n_kept: int
    actions: list[Condition]
    additions: Tensor | None


def _acts(step: Intervention) -> bool:
    return step.operator == "set" or float(step.multiplier) != 0


def _identity(step: Intervention) -> tuple:
    return id(step.vector.direction), step.operator, float(step.multiplier)
