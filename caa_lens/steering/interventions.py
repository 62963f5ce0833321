"""What a user says of steering: what is done, how much of it, at which layer, from where on.

An `Intervention` is an order, an `engine.edits.Edit` is what is done: `edit` makes one of the other once it is known
where steering starts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from caa_lens.arguments import check_count, describe
from caa_lens.engine.edits import SITES, Edit, check_edit, said
from caa_lens.engine.operators import Formula, check_operator, check_parameters, name_of
from caa_lens.engine.overflow import check_steps
from caa_lens.engine.positions import Positions
from caa_lens.models.adapters.choice import adapter_of
from caa_lens.models.checks import check_layers
from caa_lens.provenance import HOOK_POINT, Provenance, one_model
from caa_lens.vectors.checks import check_vector
from caa_lens.vectors.steering_vectors import SteeringVector, SteeringVectors

FITTED_AT = "fitted_at"  # the key of `Provenance.details` that says where parameters belong, as `place_of` writes it
POSITIONS = ("caa", "all", "after_first", "prompt", "answer", "last", "front")  # see `placing`


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gate:
    """Lets an intervention act on a prompt or not: it is open where h . s + bias > 0.

    Source: InferAligner, arXiv 2401.11206, where s is a safety-related vector.

    Attributes:
        direction: s, `[d_model]`.
        bias: in the units of the projection.
        layer: the 0-based block behind which h is read, at the prompt's last token, in a run without steering.
    """

    direction: Float[Tensor, " d_model"]
    bias: float
    layer: int

    def is_open(self, states: Float[Tensor, "prompt d_model"]) -> Bool[Tensor, " prompt"]:
        """Which prompts open it, from their streams at their last tokens."""
        return states.double() @ self.direction.to(states.device).double() + self.bias > 0


def is_fitted(what: object) -> bool:
    """Whether it is a fitted method of `caa_lens.methods`, which says itself what is done, and not a vector."""
    return hasattr(what, "interventions") and hasattr(what, "at")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Intervention:
    """What is done to the stream (a vector is added, if nothing else is said), how much of it, and where.

    Where it says neither `start` nor `positions`, it acts from the end of the instruction on, wherever the prompt is
    known: in `generate`, `residual_lens`, `steer(prompt=...)` and whatever scores answers. A hook knows no prompt, so
    `hook` needs it said; `start=0` is every position.

    Attributes:
        vector: the steering vector; its layer says where. None for an operator that needs none.
        multiplier: the operator's strength: a number, or one number a row of the batch, `[batch]`.
        start: first steered position in padded coordinates of the first forward, a number or `[batch]`.
        operator: "add", "ablate", "set", or any other of `caa_lens.engine.OPERATORS`; or a function
            `(stream, parameters, strength) -> stream`, which gets the vector as `parameters["direction"]`.
        positions: instead of `start`, the steered positions: a span `(first, stop)` or a bool mask `[batch pos]`, see
            `caa_lens.engine.positions`; or, where the prompt is known, one of the names "caa", "all", "after_first",
            "prompt", "answer", "last" and "front", see `caa_lens.steering.placing`.
        parameters: what the operator takes beside the vector, tensors by name, `[width]` or one number.
        by_position: names of parameters that have a row for each position, `[pos width]` or `[pos 1]`.
        layer: the 0-based block; the vector's by default.
        site: the hook point in the block, its output by default; inside of a block, nothing can be shared.
        gate: whether it acts on a prompt at all, decided by the prompt.
        provenance: what the parameters were computed from; the vector's by default.

    Raises:
        TypeError, ValueError: for an unknown operator, parameters that it cannot use, a multiplier that is not finite
            or not a number or `[batch]`, positions or a site that are none, both `start` and `positions`, or neither a
            vector nor a layer.
    """

    vector: SteeringVector | None = None
    multiplier: float | int | Tensor = 1.0
    start: int | Tensor | None = None
    operator: str | Formula = "add"
    positions: str | Positions | None = None
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    by_position: frozenset[str] | set[str] = frozenset()
    layer: int | None = None
    site: str = HOOK_POINT
    gate: Gate | None = None
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        if self.vector is not None and not isinstance(self.vector, SteeringVector):
            kind = type(self.vector).__name__
            raise TypeError(f"expected a SteeringVector, got {kind}: of a set choose a layer, as in vectors[13]")
        check_operator(self.operator)
        named = isinstance(self.positions, str)
        if named and self.positions not in POSITIONS:
            raise ValueError(f"unknown positions {self.positions!r}: expected one of {', '.join(POSITIONS)}, or a span")
        if named and self.start is not None:
            raise ValueError("give either start or positions")
        multiplier = check_edit(
            multiplier=self.multiplier,
            operator=self.operator,
            start=self.start,
            positions=None if named else self.positions,  # type: ignore[arg-type]
        )
        object.__setattr__(self, "multiplier", multiplier)
        object.__setattr__(self, "by_position", frozenset(self.by_position))
        if self.site not in SITES:
            raise ValueError(f"unknown site {self.site!r}: expected one of {', '.join(SITES)}")
        self._check_parts()

    def _check_parts(self) -> None:
        given = dict(self.parameters)
        if self.vector is not None:
            if "direction" in given:
                raise ValueError("the direction is given twice, as vector and in parameters: give one of them")
            if self.layer not in (None, self.vector.layer):
                raise ValueError(
                    f"the vector is of layer {self.vector.layer}, and layer={self.layer} was given: leave that out, or "
                    f"take vector.at_layer({self.layer})"
                )
            if self.site != HOOK_POINT:
                raise ValueError(
                    f"a steering vector lives at {HOOK_POINT}, not at {self.site}: give a direction of that site as "
                    "parameters={'direction': ...} with layer=..."
                )
            given["direction"] = self.vector.direction
            object.__setattr__(self, "layer", self.vector.layer)
            if self.provenance is None:
                object.__setattr__(self, "provenance", self.vector.provenance)
        elif self.layer is None:
            raise ValueError("it is not said at which layer: give a vector, or layer=...")
        else:
            object.__setattr__(self, "layer", check_count("layer", self.layer, least=0))
        if unknown := sorted(self.by_position - set(given)):
            raise ValueError(f"{unknown[0]!r} is said to differ by position, but is no parameter")
        check_parameters(self.operator, given, frozenset(self.by_position))

    @property
    def where(self) -> str | Positions | None:
        """What `start` or `positions` says, as positions; None where it is not said."""
        return self.positions if self.start is None else (self.start, None)

    @property
    def n_rows(self) -> int | None:
        """How many positions its parameters are for; None where they are the same at all."""
        return min((len(self.parameters[name]) for name in self.by_position), default=None)

    def edit(self, start: int | Tensor | None = None) -> Edit:
        """What is done in a run.

        Args:
            start: where the instruction ends; what the intervention itself says comes first.

        Raises:
            ValueError: if neither says where steering starts, or the prompt decides where or whether it acts.
        """
        if isinstance(self.where, str) or self.gate is not None:
            what = f"positions={self.where!r} is" if isinstance(self.where, str) else "whether its gate is open is"
            raise ValueError(
                f"{what} known only with the prompt: use generate, score_answers or steer(model, ..., prompt=...), or "
                "say start=... and a multiplier of your own"
            )
        return self._at(said(start, None) if self.where is None else self.where)

    def _at(self, positions: Positions) -> Edit:
        assert self.layer is not None
        return Edit(
            direction=None if self.vector is None else self.vector.direction,
            layer=self.layer,
            positions=positions,
            multiplier=self.multiplier,
            operator=self.operator,
            parameters=self.parameters,
            by_position=frozenset(self.by_position),
            site=self.site,
        )

    def hook(self) -> tuple[Callable[[str], bool], Callable[..., Tensor | None]]:
        """A `(name, function)` pair for TransformerLens' `fwd_hooks=[...]`, aware of the KV cache.

        Raises:
            ValueError: if the intervention does not say where steering starts.
        """
        return self.edit().hook()

    @property
    def in_words(self) -> str:
        """What is done, without where: `1.5 * v`, or `affine x 1 at layer 14`."""
        if self.vector is not None and self.operator == "add":
            return f"{self.multiplier} * {self.vector!r}"
        site = "" if self.site == HOOK_POINT else f", {self.site}"
        of = f" of {self.vector!r}" if self.vector is not None else ""
        return f"{name_of(self.operator)} x {self.multiplier}{of} at layer {self.layer}{site}"


def check_intervention(model: Any, one: Intervention) -> None:
    """Raises `ValueError` for an intervention that cannot be done in this model.

    Its layer, its hook points, the widths of its vector and parameters; and parameters other than a vector that were
    fitted on another model, since coordinates of two models have nothing in common, or at another place in it.
    """
    if one.vector is not None:
        check_vector(model, one.vector)
    assert one.layer is not None
    check_layers(model, [one.layer])
    adapter = adapter_of(model)
    adapter.hook_points(model, one.layer, one.site)
    width = adapter.site_width(model, one.layer, one.site)
    for name, tensor in one.parameters.items():
        its = tensor.shape[-1] if tensor.ndim else 1
        if width is not None and its not in (1, width):
            raise ValueError(
                f"{name} has {its} numbers, but {one.site} of {model.cfg.model_name!r} has {width}: fit it at this "
                "site of this model"
            )
    if one.gate is not None:
        check_layers(model, [one.gate.layer])
        if len(one.gate.direction) != model.cfg.d_model:
            raise ValueError(
                f"the gate has d_model={len(one.gate.direction)}, but {model.cfg.model_name!r} has "
                f"d_model={model.cfg.d_model}: fit it on this model"
            )
    if one.vector is not None or one.provenance is None:
        return
    if one_model([one.provenance.model, str(model.cfg.model_name)]) is None:
        raise ValueError(
            f"the parameters of {name_of(one.operator)} were fitted on {one.provenance.model!r}, and this model is "
            f"{model.cfg.model_name!r}: fit them on this one"
        )
    here = place_of(one.layer, one.site)
    if (fitted_at := one.provenance.details.get(FITTED_AT, here)) != here:
        raise ValueError(
            f"the parameters of {name_of(one.operator)} were fitted at {fitted_at}, and are to act at {here}: fit them "
            "there"
        )


def place_of(layer: int, site: str) -> str:
    """A place in a model in words."""
    return f"layer {layer}" if site == HOOK_POINT else f"layer {layer}, {site}"


Steering = SteeringVector | tuple[SteeringVector, float | int | Tensor] | Intervention


def as_interventions(
    model: Any,
    vectors: Sequence[Steering],
    *,
    multiplier: float | int | Tensor = 1.0,
    start: int | Tensor | None = None,
    positions: str | Positions | None = None,
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
            elif isinstance(given[0] if isinstance(given, tuple) and given else given, str | PathLike):
                remedy = (
                    "a file is read by SteeringVectors.load, and a layer chosen, as in SteeringVectors.load(path)[13]"
                )
            else:
                remedy = (
                    "of SteeringVectors choose a layer, as in vectors[13], and of a tensor make a vector with "
                    "SteeringVector.from_direction"
                )
            raise TypeError(
                "expected a SteeringVector, a (SteeringVector, multiplier) pair or an Intervention, got "
                f"{describe(given)}; {remedy}"
            )
        check_intervention(model, made)
        interventions.append(made)
    check_steps(model, [one._at((0, None)) for one in interventions])
    return interventions


def _is_pair(given: object) -> bool:
    """A vector with something that is meant as its multiplier."""
    if not isinstance(given, tuple | list) or len(given) != 2:
        return False
    return isinstance(given[0], SteeringVector) and not isinstance(given[1], SteeringVector | tuple | Intervention)
