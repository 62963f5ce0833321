"""What a steering vector says in tokens, layer by layer.

Three readings, chosen by name. With g the final norm's weight, W_U and b_U the unembedding, v a layer's vector times
the multiplier, rms(x) = sqrt(mean(x^2) + eps), and h the layer's real residuals at answer positions::

    direct       centre( (v * g) W_U )            how v shifts the logits per unit of 1 / rms(residual), linear in v
    normed       centre( (v / rms(v) * g) W_U )   the final norm applied as if v were the whole residual
    in_context   centre( mean over h of lens(h + v) - lens(h) ),   lens(h) = cap( norm(h) W_U + b_U )

Where the final norm is LayerNorm, v stands for v minus its mean over d_model in the first two, and rms for sd: the norm
as an affine map about zero, norm(v) - norm(0), without its bias, which no vector changes; and `lens` is the model's own
way to logits, soft cap and all (see `unembedding`). `centre` subtracts the mean over the vocabulary, which softmax
ignores. The final norm's weight is used whether or not it was folded into W_U. `direct` and `normed` rank tokens alike
(they differ by the factor rms(v)); `normed` makes layers comparable, since vectors grow with depth. `in_context` is the
faithful one: the size of v against the real residual, and what the norm does to their sum, count. All three follow the
vector's direct path to the logits only: early layers act through the blocks above them, and may say little here.

`in_context` reads h over each prompt's `read` span, at both answers of each pair: the letter of an A/B pair; of a
completion of several tokens the *averaged* residual, one state a prompt. Where unembedding is linear (no soft cap), the
scores need only the mean of h / rms(h), and are unembedded once a layer.

The background of `in_context` is what any vector of this size does: it shrinks the residual's own share behind the
norm, so that tokens the model would have said fall, and others rise, whatever v is. With n random directions u_j of
v's norm, each used with its negative::

    corrected    score(v) - 1/(2n) sum_j [ score(u_j) + score(-u_j) ]

The other readings are odd in v, so that their background is exactly zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.arguments import as_float, as_seed, check_count
from caa_lens.contrast.sets import ContrastSet, check_contrast_set
from caa_lens.engine.overflow import check_finite
from caa_lens.interpretation.lens_in_context import read_in_context
from caa_lens.interpretation.words import check_words, show_token, word_tokens
from caa_lens.models.checks import check_layers, check_model
from caa_lens.models.placement import device_behind, dtype_name
from caa_lens.models.unembedding import centred, normalised, unembed_linear
from caa_lens.plots.lens import rank_curves, token_heatmaps
from caa_lens.prompts.pair_prompts import encode_pairs
from caa_lens.prompts.prompt_formats import PromptFormat, resolve_format
from caa_lens.provenance import name_of
from caa_lens.results import Result
from caa_lens.vectors.checks import as_vector_set, check_width
from caa_lens.vectors.steering_vectors import SteeringVector, SteeringVectors

READINGS = ("direct", "normed", "in_context")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LogitLens(Result):
    """The most promoted and most suppressed tokens of each layer's vector.

    Attributes:
        frame: columns `layer, side, rank, token, token_id, score, probability`; `side` is "promoted" or "suppressed",
            rank 1 is the extreme; `score` is a centred logit. `probability` is the softmax of the scores over the
            vocabulary for `direct` and `normed`; for `in_context` it is the mean *change* of the lens' probability at
            the real residuals (from -1 to 1), of the vector alone, without background correction.
        reading: "direct", "normed" or "in_context".
        settings: model, dtype, multiplier; for `in_context` the pairs and their hash, background, seed as well.
        provenance: of the `vectors`.
    """

    reading: str

    def summary(self, k: int = 8) -> pd.DataFrame:
        """One row a layer: the first `k` promoted and suppressed tokens, joined for reading."""
        top = self.frame[self.frame["rank"] <= k]
        joined = top.groupby(["layer", "side"])["token"].agg("  ".join).unstack("side")
        return joined[["promoted", "suppressed"]]

    def plot(self, k: int = 6) -> go.Figure:
        """Heat maps of the first `k` promoted and suppressed: layer x rank, cells are tokens, colour is the score."""
        vectors = name_of(self.provenance["vectors"])
        return token_heatmaps(self.frame, k, vectors=vectors, reading=self.reading)

    def __repr__(self) -> str:
        k = int(self.frame["rank"].max())
        of = f", the first 10 of {k}" if k > 10 else ""
        vectors = self.provenance["vectors"].expression
        return f"LogitLens({vectors}, {self.reading}{of})\n{self.summary(10).to_string()}"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict:
        """In Jupyter a lens shows its tokens in words."""
        return {"text/plain": repr(self), "text/html": self.summary(10).to_html()}  # pandas escapes the tokens


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WordRanks(Result):
    """Where named words stand among all tokens, by layer.

    Attributes:
        frame: columns `layer, word, token, token_id, pieces, rank, score`; rank 1 is the most promoted token of
            `d_vocab`. A word of several tokens is ranked by its first one: then `pieces` is larger than 1.
        reading, settings, provenance: as in `LogitLens`.
        d_vocab: number of tokens, the rank of the most suppressed one.
    """

    reading: str
    d_vocab: int

    def summary(self) -> pd.DataFrame:
        """Ranks, one row a layer and one column a word, in the order the words were given."""
        words = list(dict.fromkeys(self.frame["word"]))
        return self.frame.pivot(index="layer", columns="word", values="rank")[words]

    def margin(self, positive: Sequence[str], negative: Sequence[str]) -> pd.DataFrame:
        """By layer, the mean score of some of the words, of others, and the difference, in logits.

        Columns `layer, positive, negative, margin`.
        """
        positive, negative = check_words(positive), check_words(negative)
        scores = self.frame.pivot(index="layer", columns="word", values="score")
        if missing := [word for word in [*positive, *negative] if word not in scores]:
            raise ValueError(f"{missing} were not ranked: expected some of {list(scores)}")
        means = scores[list(positive)].mean(axis=1).to_frame("positive")
        means["negative"] = scores[list(negative)].mean(axis=1)
        return means.assign(margin=means["positive"] - means["negative"]).reset_index()

    def plot(self) -> go.Figure:
        """Rank by layer, one line a word; the axis is logarithmic, with rank 1 on top."""
        vectors = name_of(self.provenance["vectors"])
        return rank_curves(self.frame, vectors=vectors, reading=self.reading, d_vocab=self.d_vocab)

    def __repr__(self) -> str:
        vectors = self.provenance["vectors"].expression
        return f"WordRanks({vectors}, {self.reading}, of {self.d_vocab})\n{self.summary().to_string()}"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict:
        """In Jupyter ranks show their table."""
        return {"text/plain": repr(self), "text/html": self.summary().to_html()}


@torch.inference_mode()
def logit_lens(
    model: Any,
    vectors: SteeringVectors | SteeringVector,
    *,
    k: int = 10,
    layers: Sequence[int] | None = None,
    reading: str = "normed",
    pairs: ContrastSet | None = None,
    multiplier: float | int = 1.0,
    background: int = 0,
    seed: int | None = 0,
    prompt_format: PromptFormat | str | None = None,
) -> LogitLens:
    """Project each layer's vector onto the vocabulary.

    Args:
        k: tokens to keep on each side.
        layers: those of the vectors by default.
        reading: "direct", "normed" or "in_context", see the module's formulas.
        pairs: whose answers give the real residuals of `in_context`; the other readings do not look at them.
        multiplier: the vector is read times this; `normed` keeps its sign only.
        background: number of random directions whose mean is subtracted, each with its negative; `in_context` only.
        seed: of the random directions, which are the same at all layers but for their length.
        prompt_format: of the pairs; the model's own by default.

    Raises:
        ValueError: for an unknown reading, `in_context` without pairs, a background of another reading, a vector of
            another width or of zeros, a layer that the model does not have, or a final norm that is neither RMSNorm nor
            LayerNorm.
        IndexError: for a layer without a vector.
    """
    check_model(model)
    k = check_count("k", k)
    vectors = as_vector_set(vectors)
    options = _options(reading, pairs, multiplier, background, seed, prompt_format)
    layers = check_layers(model, vectors.layers if layers is None else layers)
    scores, probabilities = _read(model, vectors, layers, options, with_probabilities=True)
    assert probabilities is not None
    scores, probabilities = scores.cpu(), probabilities.cpu()  # whole: every copy waits for the device
    frames = []
    for layer, layer_scores, layer_probabilities in zip(layers, scores, probabilities, strict=True):
        for side, largest in (("promoted", True), ("suppressed", False)):
            best = layer_scores.topk(min(k, len(layer_scores)), largest=largest)
            columns = {
                "layer": layer,
                "side": side,
                "rank": range(1, len(best.indices) + 1),
                "token": [show_token(model.tokenizer, token) for token in best.indices.tolist()],
                "token_id": best.indices.tolist(),
                "score": best.values.tolist(),
                "probability": layer_probabilities[best.indices].tolist(),
            }
            frames.append(pd.DataFrame(columns))
    frame = pd.concat(frames, ignore_index=True)
    return LogitLens(
        frame=frame, settings=options.settings(model), provenance={"vectors": vectors.provenance}, reading=reading
    )


@torch.inference_mode()
def word_ranks(
    model: Any,
    vectors: SteeringVectors | SteeringVector,
    words: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    reading: str = "normed",
    pairs: ContrastSet | None = None,
    multiplier: float | int = 1.0,
    background: int = 0,
    seed: int | None = 0,
    prompt_format: PromptFormat | str | None = None,
) -> WordRanks:
    """Rank words among all tokens by how much each layer's vector promotes them.

    A word is looked up with a leading blank, then without one; if neither is a single token, the first token of the
    blank-led form stands for it, which other words may share.

    Args:
        words: plain words; blanks around them do not count.
        layers, reading, pairs, multiplier, background, seed, prompt_format: as in `logit_lens`.

    Raises:
        ValueError: for no words, an empty one, or one that the tokenizer does not know; and as `logit_lens`.
        TypeError: for one string instead of a list, or a model without a tokenizer.
    """
    check_model(model)
    looked_up = {word: word_tokens(model.tokenizer, word) for word in check_words(words)}
    vectors = as_vector_set(vectors)
    options = _options(reading, pairs, multiplier, background, seed, prompt_format)
    layers = check_layers(model, vectors.layers if layers is None else layers)
    scores, _ = _read(model, vectors, layers, options, with_probabilities=False)
    scores = scores.cpu()
    rows = [
        {
            "layer": layer,
            "word": word,
            "token": show_token(model.tokenizer, tokens[0]),
            "token_id": tokens[0],
            "pieces": len(tokens),
            "rank": 1 + int((of_layer > of_layer[tokens[0]]).sum()),
            "score": float(of_layer[tokens[0]]),
        }
        for layer, of_layer in zip(layers, scores, strict=True)
        for word, tokens in looked_up.items()
    ]
    return WordRanks(
        frame=pd.DataFrame(rows),
        settings=options.settings(model),
        provenance={"vectors": vectors.provenance},
        reading=reading,
        d_vocab=scores.shape[1],
    )


class _Options(NamedTuple):
    reading: str
    pairs: ContrastSet | None
    multiplier: float
    background: int
    seed: int
    prompt_format: PromptFormat | str | None

    def check(self) -> None:
        _check_reading(self.reading)
        if self.reading == "in_context" and self.pairs is None:
            raise ValueError("reading 'in_context' needs real residuals: give a ContrastSet as pairs=...")
        if self.pairs is not None:
            check_contrast_set(self.pairs)
        if self.background < 0:
            raise ValueError(f"background must be a number of random directions, 0 for none, got {self.background}")
        if self.multiplier == 0:
            raise ValueError("multiplier must be a finite number other than 0, got 0")
        if self.background and self.reading != "in_context":
            raise ValueError(
                f"background={self.background} has nothing to correct in reading {self.reading!r}, whose mean over "
                "random directions is zero: use reading='in_context'"
            )

    def settings(self, model: Any) -> dict[str, str]:
        settings = {
            "model": str(model.cfg.model_name),
            "dtype": dtype_name(model),
            "multiplier": f"{self.multiplier:g}",
        }
        if self.reading == "in_context" and self.pairs is not None:
            settings |= {
                "pairs": self.pairs.name,
                "pairs_hash": self.pairs.content_hash,
                "prompt_format": resolve_format(model, self.prompt_format).name,
                "background": str(self.background),
                "seed": str(self.seed),
            }
        return settings


def _options(reading: str, pairs: Any, multiplier: object, background: object, seed: object, how: Any) -> _Options:
    numbers = as_float("multiplier", multiplier), check_count("background", background, least=None), as_seed(seed)
    return _Options(reading, pairs, *numbers, how)


def _check_reading(reading: str) -> None:
    if not isinstance(reading, str) or reading not in READINGS:
        raise ValueError(f"unknown reading {reading!r}: expected one of {', '.join(READINGS)}")


def _read(
    model: Any, vectors: SteeringVectors, layers: Sequence[int], options: _Options, *, with_probabilities: bool
) -> tuple[Float[Tensor, "layer d_vocab"], Float[Tensor, "layer d_vocab"] | None]:
    """Scores, and if asked for what `LogitLens` calls probabilities."""
    options.check()
    check_width(model, vectors)
    if zero := [layer for layer in layers if not vectors[layer].direction.any()]:
        raise ValueError(f"zero vectors promote no token over another: leave out the layers {zero}, as in layers=[...]")
    steps = options.multiplier * torch.stack([vectors[layer].direction.float() for layer in layers])
    steps = steps.to(device_behind(model))  # [layer d_model]
    check_finite(model, steps, f"the vectors times {options.multiplier:g}")
    if options.reading == "in_context":
        assert options.pairs is not None
        prompts = encode_pairs(model, options.pairs, resolve_format(model, options.prompt_format))
        return read_in_context(
            model,
            steps,
            layers,
            prompts,
            background=options.background,
            seed=options.seed,
            with_probabilities=with_probabilities,
        )
    scores = torch.stack([lens_scores(model, step, options.reading) for step in steps])
    return scores, scores.softmax(-1) if with_probabilities else None


def lens_scores(model: Any, direction: Float[Tensor, " d_model"], reading: str) -> Float[Tensor, " d_vocab"]:
    """Centred logits of one direction by `direct` or `normed`, in float32; see the module's formulas."""
    _check_reading(reading)
    if reading == "in_context":
        raise ValueError("'in_context' is read at the residuals of pairs: call logit_lens(..., pairs=...)")
    direction = direction.to(device_behind(model)).float()
    scores = unembed_linear(model, normalised(model, direction) if reading == "normed" else centred(model, direction))
    return scores - scores.mean()
