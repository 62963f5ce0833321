"""What a steering vector says in tokens, layer by layer.

Two readings, chosen by name. With g the final norm's weight, W_U the unembedding and v the vector:

    direct   centre( (v * g) W_U )         how v shifts the logits per unit of 1 / (norm of the residual), linear in v
    normed   centre( (v / rms(v) * g) W_U ) the final norm applied as if v were the whole residual

`centre` subtracts the mean over the vocabulary, which softmax ignores. Both rank tokens alike (they differ by the
factor rms(v)); `normed` makes layers comparable, since vectors grow with depth. The final norm's weight is used
whether it was folded into W_U or not. The lens reads the vector's direct path to the logits only: early layers act
through the blocks above them, and may say little here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.activations import check_layers
from caa_lens.vectors import Provenance, SteeringVector, SteeringVectors

if TYPE_CHECKING:
    import pandas as pd

READINGS = ("direct", "normed")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LogitLens:
    """The most promoted and most suppressed tokens of each layer's vector.

    Attributes:
        frame: columns `layer, side, rank, token, token_id, score, probability`; `side` is "promoted" or "suppressed",
            rank 1 is the extreme; `score` is a centred logit, `probability` its softmax over the vocabulary.
        reading: "direct" or "normed".
        vectors: provenance of the vectors.
    """

    frame: "pd.DataFrame"
    reading: str
    vectors: Provenance

    def table(self, k: int = 8) -> "pd.DataFrame":
        """One row a layer: the first `k` promoted and suppressed tokens, joined for reading."""
        top = self.frame[self.frame["rank"] <= k]
        joined = top.groupby(["layer", "side"])["token"].agg("  ".join).unstack("side")
        return joined[["promoted", "suppressed"]]

    def __repr__(self) -> str:
        return f"LogitLens({self.vectors.expression}, {self.reading})\n{self.table(5).to_string()}"

    def _repr_html_(self) -> str:
        return self.table().to_html()


@torch.inference_mode()
def logit_lens(
    model: Any,
    vectors: SteeringVectors | SteeringVector,
    *,
    k: int = 10,
    layers: Sequence[int] | None = None,
    reading: str = "normed",
) -> LogitLens:
    """Project each layer's vector onto the vocabulary.

    Args:
        k: tokens to keep on each side.
        layers: those of the vectors by default.
        reading: "direct" or "normed", see the module's formulas.

    Raises:
        ValueError: for an unknown reading, a vector of another width, or a layer without a vector.
    """
    import pandas as pd

    if isinstance(vectors, SteeringVector):
        vectors = SteeringVectors.from_vectors([vectors])
    if vectors.d_model != model.cfg.d_model:
        raise ValueError(
            f"vectors have d_model={vectors.d_model}, but {model.cfg.model_name!r} has d_model={model.cfg.d_model}: "
            "extract them from this model"
        )
    layers = check_layers(model, vectors.layers if layers is None else layers)
    rows = []
    for layer in layers:
        scores = lens_scores(model, vectors[layer].direction, reading)
        probabilities = scores.softmax(-1)
        for side, largest in (("promoted", True), ("suppressed", False)):
            best = scores.topk(min(k, len(scores)), largest=largest)
            for rank, (score, token) in enumerate(
                zip(best.values.tolist(), best.indices.tolist(), strict=True), start=1
            ):
                rows.append(
                    {
                        "layer": layer,
                        "side": side,
                        "rank": rank,
                        "token": show_token(model.tokenizer, token),
                        "token_id": token,
                        "score": score,
                        "probability": float(probabilities[token]),
                    }
                )
    return LogitLens(frame=pd.DataFrame(rows), reading=reading, vectors=vectors.provenance)


def lens_scores(model: Any, direction: Float[Tensor, " d_model"], reading: str) -> Float[Tensor, " d_vocab"]:
    """Centred logits of one direction, in float32; see the module's formulas."""
    if reading not in READINGS:
        raise ValueError(f"unknown reading {reading!r}: expected one of {', '.join(READINGS)}")
    direction = direction.to(model.W_U.device).float()
    if reading == "normed":
        direction = direction / (direction.pow(2).mean() + model.cfg.eps).sqrt()
    weight = getattr(model.ln_final, "w", None)  # absent where it was folded into W_U
    if weight is not None:
        direction = direction * weight.float()
    scores = direction @ model.W_U.float()
    return scores - scores.mean()


def show_token(tokenizer: Any, token: int) -> str:
    """A token's text with what does not print made visible: `␣` for a leading blank, escapes for the rest."""
    if tokenizer is None:
        return f"[{token}]"
    text = tokenizer.decode([token])
    if not text.strip() or "\N{REPLACEMENT CHARACTER}" in text:
        return repr(tokenizer.convert_ids_to_tokens(token))
    shown = text.replace("\n", "\\n").replace("\t", "\\t")
    return "␣" + shown[1:] if shown.startswith(" ") else shown
