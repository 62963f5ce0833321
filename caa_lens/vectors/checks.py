"""Whether something is a set of vectors, and whether vectors fit a model."""

from typing import Any

from caa_lens.arguments import describe
from caa_lens.models.adapters.choice import adapter_of
from caa_lens.models.checks import check_layers
from caa_lens.vectors.steering_vectors import SteeringVector, SteeringVectors


def check_vector_set(vectors: object) -> None:
    """Raises `TypeError` for anything but `SteeringVectors`."""
    if isinstance(vectors, SteeringVectors):
        return
    if isinstance(vectors, SteeringVector):
        raise TypeError(
            "expected SteeringVectors, got one SteeringVector: give the set, with the layer as layers=[...] or "
            f"vectors.at([{vectors.layer}]), or make a set with SteeringVectors.from_vectors([...])"
        )
    remedy = "extract them, or SteeringVectors.load(a file)"
    if isinstance(vectors, list | tuple) and any(isinstance(one, SteeringVector) for one in vectors):
        remedy = "make a set of them with SteeringVectors.from_vectors([...])"
    raise TypeError(f"expected SteeringVectors, got {describe(vectors)}: {remedy}")


def as_vector_set(vectors: object) -> SteeringVectors:
    """A set, also of one vector or of a list of them. Raises `TypeError` for anything else."""
    if isinstance(vectors, SteeringVector):
        return SteeringVectors.from_vectors([vectors])
    if isinstance(vectors, list | tuple) and vectors and all(isinstance(one, SteeringVector) for one in vectors):
        return SteeringVectors.from_vectors(vectors)
    check_vector_set(vectors)
    assert isinstance(vectors, SteeringVectors)
    return vectors


def check_width(model: Any, vectors: SteeringVector | SteeringVectors) -> None:
    """Raises `ValueError` if vectors are of another width than the model's residual stream."""
    if vectors.d_model != model.cfg.d_model:
        what, them = ("vector has", "it") if isinstance(vectors, SteeringVector) else ("vectors have", "them")
        raise ValueError(
            f"{what} d_model={vectors.d_model}, but {model.cfg.model_name!r} has d_model={model.cfg.d_model}: "
            f"extract {them} from this model"
        )


def check_vector(model: Any, vector: SteeringVector) -> None:
    """Raises `ValueError` for a vector that cannot be added in this model: its layer, its width, its hook points."""
    check_layers(model, [vector.layer])
    check_width(model, vector)
    adapter_of(model).hook_points(model, vector.layer)
