"""What a steering vector says in tokens, layer by layer.

Five readings, chosen by name. With g the final norm's weight, W_U and b_U the unembedding, v a layer's vector times
the multiplier, rms(x) = sqrt(mean(x^2) + eps), h the layer's real residuals at answer positions, and F_l the blocks
above layer l::

    direct       centre( (v * g) W_U )            how v shifts the logits per unit of 1 / rms(residual), linear in v
    normed       centre( (v / rms(v) * g) W_U )   the final norm applied as if v were the whole residual
    in_context   centre( mean over h of lens(h + v) - lens(h) ),   lens(h) = cap( norm(h) W_U + b_U )
    causal       centre( mean over prompts of d/de lens(F_l(h + e v)) at e = 0 )
    effect       mean over prompts of log p(token | steered by v) - log p(token | unsteered), in nats

Where the final norm is LayerNorm, v stands for v minus its mean over d_model in the first two, and rms for sd: the norm
as an affine map about zero, norm(v) - norm(0), without its bias, which no vector changes; and `lens` is the model's own
way to logits, soft cap and all (see `unembedding`). `centre` subtracts the mean over the vocabulary, which softmax
ignores. The final norm's weight is used whether or not it was folded into W_U. `direct` and `normed` rank tokens alike
(they differ by the factor rms(v)); `normed` makes layers comparable, since vectors grow with depth.

The first three follow the vector's direct path to the logits only, and look past what the blocks above make of it;
below the last third of the depth that is most of what a vector does. `causal` and `effect` run those blocks, with v
added from the steering start on as in all steering, and ask what comes out: to first order, or at this multiplier.
`causal` is the exact derivative of the logits at the prompt's own unsteered state, final norm included (not the norm of
the response). At the last layer it is that of `lens` itself. It is linear in v; `effect` is what steering really does,
and its `linearity` tells how far the two are apart. Both read each prompt at the positions that predict the first
tokens of the answer, or at the one behind which it begins. A position's response sums over all pushed positions up to
it, and the positions of a prompt, and then the prompts, are averaged.

`in_context` reads h over each prompt's `read` span, at both answers of each pair: the letter of an A/B pair; of a
completion of several tokens the *averaged* residual, one state a prompt. Where unembedding is linear (no soft cap), the
scores need only the mean of h / rms(h), and are unembedded once a layer.

`in_context`, `causal` and `effect` can fool: whatever is pushed says something. So they come with random directions of
the vector's norm, given the same treatment, and each layer with a verdict (see `lens_controls`).

The background of `in_context` is what any vector of this size does: it shrinks the residual's own share behind the
norm, so that tokens the model would have said fall, and others rise, whatever v is. With n random directions u_j of
v's norm, each used with its negative::

    corrected    score(v) - 1/(2n) sum_j [ score(u_j) + score(-u_j) ]

`direct`, `normed` and `causal` are odd in v, so that their background is exactly zero.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.arguments import check_count
from caa_lens.contrast.messages import Asked
from caa_lens.contrast.sets import ContrastSet
from caa_lens.engine.operators import Formula
from caa_lens.engine.overflow import check_finite
from caa_lens.engine.stream_responses import NoDerivativeError, ReadPrompt
from caa_lens.interpretation.lens_controls import (
    Controlled,
    layer_table,
    percentile_range,
    ranks_of,
    with_random_directions,
)
from caa_lens.interpretation.lens_downstream import linearity, read_downstream
from caa_lens.interpretation.lens_edits import Intervened, method_acting, vectors_acting
from caa_lens.interpretation.lens_in_context import read_in_context
from caa_lens.interpretation.lens_options import DOWNSTREAM, LensOptions, check_reading
from caa_lens.interpretation.lens_prompts import prompts_to_read
from caa_lens.interpretation.lens_results import LogitLens, WordRanks
from caa_lens.interpretation.words import check_words, show_token, word_tokens
from caa_lens.models.checks import check_layers, check_model
from caa_lens.models.placement import device_behind
from caa_lens.models.unembedding import centred, normalised, unembed_linear
from caa_lens.prompts.pair_prompts import encode_pairs
from caa_lens.prompts.prompt_formats import Prompt, PromptFormat, resolve_format
from caa_lens.steering.interventions import is_fitted
from caa_lens.vectors.checks import as_vector_set, check_width


@torch.inference_mode()
def logit_lens(
    model: Any,
    vectors: Any,
    *,
    k: int = 10,
    layers: Sequence[int] | None = None,
    reading: str = "normed",
    pairs: ContrastSet | None = None,
    prompts: Sequence[Asked | Prompt] | None = None,
    place: str | None = None,
    operator: str | Formula = "add",
    positions: str = "caa",
    multiplier: float | int = 1.0,
    background: int = 0,
    controls: int | None = None,
    seed: int | None = 0,
    prompt_format: PromptFormat | str | None = None,
    progress: bool = True,
) -> LogitLens:
    """What each layer's vector says, as tokens: by itself (a projection), or by what the model makes of it.

        logit_lens(model, vectors, reading="causal")

    Args:
        vectors: `SteeringVectors` or one of them; for `effect` also a fitted method of `caa_lens.methods`, of which
            each layer acts alone.
        k: tokens to keep on each side.
        layers: those of the vectors by default.
        reading: "direct", "normed", "in_context", "causal" or "effect", see the module's formulas.
        pairs: whose answers give the real residuals of `in_context`, and whose questions are the prompts of `causal`
            and `effect`, if no prompts are given; the other readings do not look at them.
        prompts: questions or `Prompt`s of `causal` and `effect`; without them and pairs, eight bundled open-ended ones.
        place: where `causal` and `effect` read them: "answer" (the default), the positions that predict the answer that
            a `Prompt` has, or the first three tokens of the model's own greedy one; or "instruction", only the position
            behind which the answer begins.
        operator, positions: what `effect` does with vectors, and where, as in `sweep`; a fitted method knows its own
            operator, and may have the positions "original".
        multiplier: the vector is read times this; `normed` keeps its sign only. Of a fitted method its strength.
        background: number of random directions whose mean is subtracted, each with its negative; `in_context` only.
        controls: number of random directions of the same norm that `in_context`, `causal` and `effect` are compared
            with, 19 by default; 0 for none.
        seed: of the random directions, which are the same at all layers but for their length.
        prompt_format: of pairs and questions; the model's own by default.

    Raises:
        ValueError: for an unknown reading, options of another reading, `in_context` without pairs, no prompts, a prompt
            longer than the context, a vector of another width or of zeros, a layer that the model does not have, or a
            final norm that is neither RMSNorm nor LayerNorm; `NoDerivativeError` for `causal` of a model that has none.
        IndexError: for a layer without a vector.
    """
    check_model(model)
    vectors = vectors if is_fitted(vectors) else as_vector_set(vectors)
    options = LensOptions.of(
        reading=reading,
        pairs=pairs,
        prompts=prompts,
        place=place,
        multiplier=multiplier,
        background=background,
        controls=controls,
        seed=seed,
        prompt_format=prompt_format,
        operator=operator,
        positions=positions,
    )
    k = check_count("k", k)
    layers = check_layers(model, vectors.layers if layers is None else layers)
    read = _read(model, vectors, layers, options, (), with_probabilities=True, progress=progress)
    found, changes = read.found, read.probabilities
    scores = torch.stack([one.scores for one in found]).cpu()  # whole: every copy waits for the device
    probabilities = scores.softmax(-1) if changes is None else changes.cpu()
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
    if options.controls:
        frame = frame.merge(layer_table(layers, found), on="layer")
    if reading == "effect":
        frame = frame.merge(_linearities(model, read, layers, scores, progress), on="layer")
    return LogitLens(
        frame=frame, settings=options.settings(model), provenance={"vectors": vectors.provenance}, reading=reading
    )


@torch.inference_mode()
def word_ranks(
    model: Any,
    vectors: Any,
    words: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    reading: str = "normed",
    pairs: ContrastSet | None = None,
    prompts: Sequence[Asked | Prompt] | None = None,
    place: str | None = None,
    operator: str | Formula = "add",
    positions: str = "caa",
    multiplier: float | int = 1.0,
    background: int = 0,
    controls: int | None = None,
    seed: int | None = 0,
    prompt_format: PromptFormat | str | None = None,
    progress: bool = True,
) -> WordRanks:
    """Rank words among all tokens by how much each layer's vector promotes them.

    A word is looked up with a leading blank, then without one; if neither is a single token, the first token of the
    blank-led form stands for it, which other words may share.

    Args:
        words: plain words; blanks around them do not count.
        vectors, layers, reading, pairs, prompts, place, operator, positions: as in `logit_lens`.
        multiplier, background, controls, seed, prompt_format: as in `logit_lens`.

    Raises:
        ValueError: for no words, an empty one, or one that the tokenizer does not know; and as `logit_lens`.
        TypeError: for one string instead of a list, or a model without a tokenizer.
    """
    check_model(model)
    looked_up = {word: word_tokens(model.tokenizer, word) for word in check_words(words)}
    vectors = vectors if is_fitted(vectors) else as_vector_set(vectors)
    options = LensOptions.of(
        reading=reading,
        pairs=pairs,
        prompts=prompts,
        place=place,
        multiplier=multiplier,
        background=background,
        controls=controls,
        seed=seed,
        prompt_format=prompt_format,
        operator=operator,
        positions=positions,
    )
    layers = check_layers(model, vectors.layers if layers is None else layers)
    wanted = [tokens[0] for tokens in looked_up.values()]
    found = _read(model, vectors, layers, options, wanted, with_probabilities=False, progress=progress).found
    scores = torch.stack([one.scores for one in found]).cpu()
    rows: list[dict[str, Any]] = []
    for layer, of_layer, one in zip(layers, scores, found, strict=True):
        ranks = ranks_of(of_layer, torch.tensor(wanted)).tolist()
        for i, (word, tokens) in enumerate(looked_up.items()):
            rank = ranks[i]
            row = {"layer": layer, "word": word, "token": show_token(model.tokenizer, tokens[0])}
            row |= {"token_id": tokens[0], "pieces": len(tokens), "rank": rank, "score": float(of_layer[tokens[0]])}
            if options.controls:
                low, high = percentile_range(one.ranks[:, i].tolist())
                row |= {"control_low": low, "control_high": high}
                row["percentile"] = 100 * float((one.ranks[:, i] <= rank).double().mean())
            rows.append(row)
    medians = [torch.quantile(one.ranks.double(), 0.5, dim=1).tolist() for one in found] if options.controls else []
    return WordRanks(
        frame=pd.DataFrame(rows),
        settings=options.settings(model),
        provenance={"vectors": vectors.provenance},
        reading=reading,
        d_vocab=scores.shape[1],
        control_medians=tuple(tuple(row) for row in medians),
    )


class _Read(NamedTuple):
    """What was read of every layer.

    Attributes:
        found: scores and controls.
        probabilities: their mean changes, where they were asked for and a reading has any.
        pushes: the vectors times the multiplier, or what a fitted method changes of the stream on average.
        prompts: those that were run, if any.
    """

    found: list[Controlled]
    probabilities: Float[Tensor, "layer d_vocab"] | None
    pushes: Float[Tensor, "layer d_model"]
    prompts: Sequence[ReadPrompt] = ()


def _read(
    model: Any,
    vectors: Any,
    layers: Sequence[int],
    options: LensOptions,
    tokens: Sequence[int],
    *,
    with_probabilities: bool,
    progress: bool,
) -> _Read:
    """Every layer's scores and controls, in any reading."""
    if is_fitted(vectors):
        acting, directions, prompts = _method(model, vectors, layers, options)
        return _read_answers(model, directions, layers, prompts, options, acting, tokens, with_probabilities, progress)
    check_width(model, vectors)
    if zero := [layer for layer in layers if not vectors[layer].direction.any()]:
        raise ValueError(f"zero vectors promote no token over another: leave out the layers {zero}, as in layers=[...]")
    steps = options.multiplier * torch.stack([vectors[layer].direction.float() for layer in layers])
    steps = steps.to(device_behind(model))  # [layer d_model]
    check_finite(model, steps, f"the vectors times {options.multiplier:g}")
    if options.reading not in ("in_context", *DOWNSTREAM):
        scores = [lens_scores(model, step, options.reading) for step in steps]
        nothing = torch.empty(0), torch.empty(0, len(tokens), dtype=torch.long)
        return _Read([Controlled(scores=each, agreement=nothing[0], ranks=nothing[1]) for each in scores], None, steps)
    directions = with_random_directions(steps, options.controls, options.seed)
    if options.reading == "in_context":
        assert options.pairs is not None
        found = read_in_context(
            model,
            directions,
            layers,
            encode_pairs(model, options.pairs, resolve_format(model, options.prompt_format)),
            background=options.background,
            seed=options.seed,
            tokens=tokens,
            with_probabilities=with_probabilities,
        )
        return _Read(*found, steps)
    under = None
    if (options.operator, options.positions) != ("add", "caa"):
        under = vectors_acting(vectors, layers, directions, options)
    prompts = _prompts(model, vectors, options)
    return _read_answers(model, directions, layers, prompts, options, under, tokens, with_probabilities, progress)


def _read_answers(
    model: Any,
    directions: Float[Tensor, "layer direction d_model"],
    layers: Sequence[int],
    prompts: Sequence[ReadPrompt],
    options: LensOptions,
    acting: Sequence[Intervened] | None,
    tokens: Sequence[int],
    with_probabilities: bool,
    progress: bool,
) -> _Read:
    """The readings that run the model."""
    found = read_downstream(
        model,
        directions,
        layers,
        prompts,
        to_first_order=options.reading == "causal",
        acting=acting,
        tokens=tokens,
        with_probabilities=with_probabilities,
        progress=progress,
    )
    return _Read(*found, directions[:, 0], prompts)


def _method(
    model: Any, fitted: Any, layers: Sequence[int], options: LensOptions
) -> tuple[list[Intervened], Float[Tensor, "layer direction d_model"], Sequence[ReadPrompt]]:
    """What a fitted method and its controls do, what they push, and the prompts."""
    if options.reading != "effect":
        raise ValueError(
            f"a {type(fitted).__name__} is no direction that {options.reading!r} could read: use reading='effect'"
        )
    if options.operator != "add":
        raise ValueError("a fitted method knows what it does: leave operator out")
    prompts = _prompts(model, fitted, options)
    return *method_acting(model, fitted, layers, prompts, options), prompts


def _prompts(model: Any, vectors: Any, options: LensOptions) -> Sequence[ReadPrompt]:
    return prompts_to_read(
        model,
        options.prompts,
        pairs=options.pairs,
        behavior=vectors.provenance.behavior,
        place=options.place,
        prompt_format=options.prompt_format,
    )


def _linearities(
    model: Any,
    read: _Read,
    layers: Sequence[int],
    effects: Float[Tensor, "layer d_vocab"],
    progress: bool,
) -> pd.DataFrame:
    """How linear the effects are, by layer; NaN for a model that has no derivative."""
    try:
        linear, _ = read_downstream(
            model, read.pushes[:, None], layers, read.prompts, to_first_order=True, progress=progress
        )
        told = [linearity(effect, one.scores.cpu()) for effect, one in zip(effects, linear, strict=True)]
    except NoDerivativeError:
        told = [(float("nan"), float("nan"))] * len(layers)
    return pd.DataFrame(
        [(layer, cosine, ratio) for layer, (cosine, ratio) in zip(layers, told, strict=True)],
        columns=["layer", "linearity", "size_ratio"],
    )


def lens_scores(model: Any, direction: Float[Tensor, " d_model"], reading: str) -> Float[Tensor, " d_vocab"]:
    """Centred logits of one direction by `direct` or `normed`, in float32; see the module's formulas."""
    check_reading(reading)
    if reading == "in_context":
        raise ValueError("'in_context' is read at the residuals of pairs: call logit_lens(..., pairs=...)")
    if reading in DOWNSTREAM:
        raise ValueError(f"{reading!r} is read by running the model: call logit_lens(..., prompts=...)")
    direction = direction.to(device_behind(model)).float()
    scores = unembed_linear(model, normalised(model, direction) if reading == "normed" else centred(model, direction))
    return scores - scores.mean()
