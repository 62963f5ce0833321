"""What a user says of steering: which vector, how much of it, from where on.

An `Intervention` is an order, an `engine.edits.Edit` is what is done: `edit` makes one of the other once it is known
where steering starts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from caa_lens.arguments import describe
from caa_lens.engine.edits import Edit, check_edit, said
from caa_lens.engine.overflow import check_steps
from caa_lens.engine.positions import Positions
from caa_lens.vectors.checks import check_vector
from caa_lens.vectors.steering_vectors import SteeringVector, SteeringVectors


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Intervention:
    """A vector, what is done with it, how much of it, and where.

    Where it says neither `start` nor `positions`, it acts from the end of the instruction on, wherever the prompt is
    known: in `generate`, `residual_lens`, `steer(prompt=...)` and whatever scores answers. A hook knows no prompt, so
    `hook` needs it said; `start=0` is every position.

    Attributes:
        vector: the steering vector; its layer says where.
        multiplier: a number, or one number a row of the batch, `[batch]`.
        start: first steered position in padded coordinates of the first forward, a number or `[batch]`.
        operator: "add", "ablate" or "set".
        positions: instead of `start`, the steered positions: a span `(first, stop)` or a bool mask `[batch pos]`; see
            `caa_lens.engine.positions`.

    Raises:
        TypeError, ValueError: for an unknown operator, a multiplier that is not finite or not a number or `[batch]`,
            positions that are none, or both `start` and `positions`.
    """

    vector: SteeringVector
    multiplier: float | int | Tensor = 1.0
    start: int | Tensor | None = None
    operator: str = "add"
    positions: Positions | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.vector, SteeringVector):
            kind = type(self.vector).__name__
            raise TypeError(f"expected a SteeringVector, got {kind}: of a set choose a layer, as in vectors[13]")
        multiplier = check_edit(
            multiplier=self.multiplier, operator=self.operator, start=self.start, positions=self.positions
        )
        object.__setattr__(self, "multiplier", multiplier)

    @property
    def where(self) -> Positions | None:
        """What `start` or `positions` says, as positions; None where it is not said."""
        return self.positions if self.start is None else (self.start, None)

    def edit(self, start: int | Tensor | None = None) -> Edit:
        """What is done in a run.

        Args:
            start: where the instruction ends; what the intervention itself says comes first.

        Raises:
            ValueError: if neither says where steering starts.
        """
        return Edit(
            direction=self.vector.direction,
            layer=self.vector.layer,
            positions=said(start, None) if self.where is None else self.where,
            multiplier=self.multiplier,
            operator=self.operator,
        )

    def hook(self) -> tuple[Callable[[str], bool], Callable[..., Tensor | None]]:
        """A `(name, function)` pair for TransformerLens' `fwd_hooks=[...]`, aware of the KV cache.

        Raises:
            ValueError: if the intervention does not say where steering starts.
        """
        return self.edit().hook()


Steering = SteeringVector | tuple[SteeringVector, float | int | Tensor] | Intervention


def as_interventions(
    model: Any,
    vectors: Sequence[Steering],
    *,
    multiplier: float | int | Tensor = 1.0,
    start: int | Tensor | None = None,
    positions: Positions | None = None,
) -> list[Intervention]:
    """Interventions from the forms a user may write, checked against the model.

    Raises:
        TypeError: for anything else, `SteeringVectors` included: iterated over, it would steer at all its layers.
        ValueError: for a vector that does not fit the model.
    """
    if isinstance(vectors, SteeringVectors):
        raise TypeError("expected a list of vectors, got SteeringVectors: choose a layer, as in [vectors[13]]")
    if isinstance(vectors, SteeringVector | Intervention):
        raise TypeError(f"expected a list of vectors, got one {type(vectors).__name__}: put it into a list")
    if not isinstance(vectors, Sequence) or isinstance(vectors, str):
        raise TypeError(f"expected a list of vectors, got {describe(vectors)}: without any, [], nothing is steered")
    interventions = []
    for given in vectors:
        if isinstance(given, Intervention):
            made = replace(given, start=start, positions=positions) if given.where is None else given
        elif isinstance(given, SteeringVector):
            made = Intervention(vector=given, multiplier=multiplier, start=start, positions=positions)
        elif _is_pair(given):
            made = Intervention(vector=given[0], multiplier=given[1], start=start, positions=positions)
        else:
            if isinstance(given, int | float):
                remedy = "a multiplier stands in a pair with its vector, as in (vectors[13], 2.0)"
            elif isinstance(given, list):
                remedy = "leave out the list: steer takes vectors one after another, generate one list of them"
            else:
                remedy = (
                    "of SteeringVectors choose a layer, as in vectors[13], and of a tensor make a vector with "
                    "SteeringVector.from_direction"
                )
            raise TypeError(
                "expected a SteeringVector, a (SteeringVector, multiplier) pair or an Intervention, got "
                f"{describe(given)}; {remedy}"
            )
        check_vector(model, made.vector)
        interventions.append(made)
    check_steps(model, [one.edit(0) for one in interventions])
    return interventions


def _is_pair(given: object) -> bool:
    """A vector with something that is meant as its multiplier."""
    if not isinstance(given, tuple | list) or len(given) != 2:
        return False
    return isinstance(given[0], SteeringVector) and not isinstance(given[1], SteeringVector | tuple | Intervention)
