"""Where a vector belongs and what it was computed from."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

PAIR_HASHES = "pair_hashes"  # the key of `Provenance.details` that lists `ContrastSet.pair_hashes`
LONGEST_SHOWN = 80  # characters of a detail; the whole is in `details`
HOOK_POINT = "hook_resid_post"
UNKNOWN = "unknown"
DEMO_NAME = "SmolLM2-135M-Instruct-4bit"  # what the model "demo" is
# And was called before it had a name after its 4 bits. The original of that name is told by its owner.
FORMER_NAMES = {"SmolLM2-135M-Instruct": DEMO_NAME}


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Provenance:
    """What a vector was computed from, and by which expression.

    `details` holds whatever else identifies the computation (library versions, ...), as strings, so that it can be
    stored beside the tensor. `n_pairs` is 0 where no one number is known.
    """

    model: str = UNKNOWN
    behavior: str = "unnamed"
    method: str = "given"
    prompt_format: str = ""
    token_position: str = ""
    n_pairs: int = 0
    dataset_hash: str = ""
    normalisation: str = "none"
    expression: str = ""
    details: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """What is known, a line each; of long lists, such as the hashes of all pairs, how many entries they have."""
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "details"}
        lines = [f"{name}={value!r}" for name, value in known.items() if value not in ("", 0)]
        lines += [f"details[{key!r}]={_shortened(value)}" for key, value in self.details.items()]
        return "Provenance(\n" + "".join(f"  {line}\n" for line in lines) + ")"

    def merged(self, *others: "Provenance") -> "Provenance":
        """What a vector made of several says: what they agree on, or all of it, `a | b`; the expression is not merged.

        Of one model's names the fuller stays, and an unknown model gives way to a known one; numbers of pairs of
        different data are no one number, so 0.
        """
        every = (self, *others)
        texts: dict[str, Any] = {
            f.name: _joined(getattr(p, f.name) for p in every) for f in fields(self) if f.type is str
        }
        known = [p.model for p in every if p.model != UNKNOWN]
        same_pairs = len({(p.n_pairs, p.dataset_hash) for p in every}) == 1
        keys = dict.fromkeys(key for p in every for key in p.details)
        return replace(
            Provenance(**texts),
            model=one_model(known) or _joined(known),
            expression=self.expression,
            n_pairs=self.n_pairs if same_pairs else 0,
            details={key: _joined(p.details[key] for p in every if key in p.details) for key in keys},
        )


def _shortened(text: str) -> str:
    words = text.split()
    if len(text) <= LONGEST_SHOWN:
        return repr(text)
    return f"<{len(words)} entries, {words[0][:12]} ...>" if len(words) > 1 else f"{text[:LONGEST_SHOWN]!r}..."


def one_model(names: Iterable[str]) -> str | None:
    """The fuller of several names of one model, or None if they are names of different ones.

    A model goes by its hub id (`owner/name`) or its address on the hub, its folder's name (`name`), a path to that
    folder, or the hub cache's folder (`models--owner--name`, and what is in it). Two owners' models are different ones,
    even of the same name. An unknown model goes with any. A former name without an owner goes with what it became.
    """
    known = list(dict.fromkeys(name for name in names if name.strip() not in ("", UNKNOWN)))
    parts = [_owner_and_name(name) for name in known]
    if {name for _, name in parts} & set(FORMER_NAMES.values()):
        parts = [(owner, name if owner else FORMER_NAMES.get(name, name)) for owner, name in parts]
    owners = sorted({owner for owner, _ in parts} - {""})
    if len({name for _, name in parts}) > 1 or len(owners) > 1:
        return None
    if len(known) <= 1:
        return known[0] if known else UNKNOWN
    return "/".join([*owners, parts[0][1]])


def called(model: str) -> str:
    """What pages call a model: as it was asked for, but `demo`, which says nothing of what it is."""
    return DEMO_NAME if model == "demo" else model


def last_part(model: str) -> str:
    """A model's name without owner and folders, as files are called after it."""
    return _owner_and_name(model)[1] or UNKNOWN


def _owner_and_name(model: str) -> tuple[str, str]:
    """The owner is empty where none is told."""
    parts = [part for part in re.split(r"[/\\]", model.strip()) if part not in ("", ".")]
    for part in parts:
        if cached := re.fullmatch(r"models--(.+?)--(.+)", part):
            return cached[1], cached[2]
    if len(parts) > 3 and parts[0] in ("http:", "https:"):
        return parts[2], parts[3]
    is_hub_id = len(parts) == 2 and re.fullmatch(r"\w[^/\\]*/[^/\\]+/?", model.strip())
    return (parts[0], parts[1]) if is_hub_id else ("", parts[-1] if parts else "")


def name_of(provenance: Provenance) -> str:
    """What vectors are called in titles and messages."""
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


def hook_name_of(layer: int) -> str:
    """Full TransformerLens name of the hook point of a layer's vector."""
    return f"blocks.{layer}.{HOOK_POINT}"


def layer_ranges(layers: Iterable[int]) -> str:
    """`0-29` for a run, `3, 7-9` otherwise."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _joined(texts: Iterable[str]) -> str:
    """Every different text once, in order; what was joined before is not joined twice."""
    return " | ".join(dict.fromkeys(part for text in texts for part in text.split(" | ") if part))
