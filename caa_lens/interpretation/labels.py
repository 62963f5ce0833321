"""What vectors are called in titles and messages."""

from caa_lens.provenance import Provenance


def name_of(provenance: Provenance) -> str:
    return provenance.expression or provenance.behavior


def label(provenance: Provenance, other: Provenance | None = None) -> str:
    """`sentiment of SmolLM2`, or of two: `sentiment and refusal of SmolLM2`, `sentiment of Llama and Llama-chat`."""
    name, model = name_of(provenance), provenance.model
    if other is None or provenance == other:
        return f"{name} of {model}"
    if model == other.model:
        return f"{name} and {name_of(other)} of {model}"
    if name == name_of(other):
        return f"{name} of {model} and {other.model}"
    return f"{name} of {model} and {label(other)}"


def what_differs(provenance: Provenance, other: Provenance) -> tuple[str, str]:
    """What tells two sets apart: their models, or else their names."""
    if provenance.model != other.model:
        return provenance.model, other.model
    return name_of(provenance), name_of(other)
