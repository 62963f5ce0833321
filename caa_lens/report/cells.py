"""What the cells of a sweep are means of: questions, their scores, and texts, which a click on a figure shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from caa_lens.provenance import layer_ranges

if TYPE_CHECKING:
    from caa_lens.contrast.sets import ContrastSet

Texts = Mapping[tuple[int, float], Sequence[tuple[str, str]]]
"""Of a cell (layer, multiplier), prompts and what the model wrote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """The questions behind each cell, as a page holds them.

    Attributes:
        label: what a score is, with its units.
        layers, multipliers: of the rows and columns, ascending.
        scores: of each question, `[layer][multiplier][question]`.
        questions: each with the answer that shows the behavior and the other one.
        texts: by (layer, multiplier), prompts with what the model wrote there.
    """

    label: str
    layers: Sequence[int]
    multipliers: Sequence[float]
    scores: Sequence[Sequence[Sequence[float]]]
    questions: Sequence[tuple[str, str, str]]
    texts: Texts = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.layers), len(self.multipliers), len(self.questions))
        whole = len(self.scores) == shape[0] and all(
            len(row) == shape[1] and all(len(cell) == shape[2] for cell in row) for row in self.scores
        )
        if not whole:
            raise ValueError(f"scores are not of the shape {shape}: layers, multipliers, questions")
        if strange := sorted(set(self.texts) - {(layer, m) for layer in self.layers for m in self.multipliers}):
            raise ValueError(f"there are texts of {strange[0]}, which is no layer and multiplier of the scores")

    def plain(self) -> dict[str, Any]:
        """As JSON holds it; scores with five digits, which no question needs more of."""
        return {
            "label": self.label,
            "layers": list(self.layers),
            "multipliers": list(self.multipliers),
            "scores": [[[float(f"{score:.5g}") for score in cell] for cell in row] for row in self.scores],
            "questions": [list(one) for one in self.questions],
            "texts": [[layer, m, [list(one) for one in texts]] for (layer, m), texts in self.texts.items()],
            "texts_at": layer_ranges(sorted({layer for layer, _ in self.texts})),
        }

    @classmethod
    def of_plain(cls, data: Mapping[str, Any]) -> "Cells":
        """What `plain` gave."""
        return cls(
            **{name: data[name] for name in ("label", "layers", "multipliers", "scores")},
            questions=[(question, positive, negative) for question, positive, negative in data["questions"]],
            texts={(layer, m): [(prompt, text) for prompt, text in texts] for layer, m, texts in data["texts"]},
        )


def cells_of(sweep: Any, pairs: "ContrastSet", texts: Texts | None = None) -> Cells:
    """The cells of the figures of a `caa_lens.measures.Sweep`.

    Args:
        pairs: those that the sweep scored.
        texts: by (layer, multiplier), prompts with what the model wrote there; of those that were swept.

    Raises:
        ValueError: for other pairs than the sweep's.
    """
    if (known := sweep.settings.get("test_hash")) != pairs.content_hash:
        raise ValueError(
            f"the sweep scored a set with hash {str(known)[:12]}, and {pairs.name!r} has {pairs.content_hash[:12]}: "
            "give the pairs that were swept"
        )
    table = sweep.frame.pivot(index=["layer", "multiplier"], columns="question", values=sweep.metric)
    layers, multipliers = (sorted(set(sweep.frame[name])) for name in ("layer", "multiplier"))
    swept = {(int(layer), float(m)) for layer, m in table.index}
    return Cells(
        label=sweep.label,
        layers=[int(layer) for layer in layers],
        multipliers=[float(m) for m in multipliers],
        scores=[[table.loc[(layer, m)].tolist() for m in multipliers] for layer in layers],
        questions=[(str(pair.question), pair.positive, pair.negative) for pair in pairs],
        texts={key: some for key, some in (texts or {}).items() if key in swept},
    )
