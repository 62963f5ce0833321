"""From a contrast set and a model to steering vectors.

The vector of layer l is the mean over pairs of `resid_post[l]` on the positive answer minus on the negative answer,
read at the answer letter (A/B pairs) or averaged over the completion's tokens. Source: paper section 3.

The mean is a streaming sum, so memory does not grow with the number of pairs. Any other estimator is a plain function
of both sides' activations at one layer, `(positive, negative) -> direction`, each `[pair d_model]` in float32, pairs
in the order of the set. For those, the activations of all pairs are kept in memory: pairs x layers x d_model x 8 bytes.
"""

import importlib.metadata
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from caa_lens.arguments import check_count, describe
from caa_lens.contrast.checking.set_check import warn_of_findings
from caa_lens.contrast.sets import ContrastSet, check_contrast_set
from caa_lens.engine.activations import read_pairs
from caa_lens.extras import needed_for
from caa_lens.models.checks import check_layers, check_model
from caa_lens.models.placement import dtype_name, dtype_of
from caa_lens.prompts.pair_prompts import encode_pairs
from caa_lens.prompts.prompt_formats import PromptFormat, resolve_format
from caa_lens.provenance import Provenance, layer_ranges
from caa_lens.stops import kept_if_stopped
from caa_lens.vectors.steering_vectors import SteeringVectors


class ZeroVectorWarning(UserWarning):
    """Pairs cancel: a vector is zero, or what rounding left of it."""


Estimator = Callable[[Float[Tensor, "pair d_model"], Float[Tensor, "pair d_model"]], Float[Tensor, " d_model"]]


def mean_difference(
    positive: Float[Tensor, "pair d_model"], negative: Float[Tensor, "pair d_model"]
) -> Float[Tensor, " d_model"]:
    """mean(positive) - mean(negative): the paper's estimator."""
    return positive.mean(0) - negative.mean(0)


def pca_of_differences(
    positive: Float[Tensor, "pair d_model"], negative: Float[Tensor, "pair d_model"]
) -> Float[Tensor, " d_model"]:
    """First principal axis of the pair differences about zero, with the sign and the length of their mean along it.

    The differences are not centred: centring would remove the very shift that all pairs share. The sign is that of
    the mean difference, since an axis has none of its own.
    """
    differences = positive - negative
    axis = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    return (differences.mean(0) @ axis) * axis


def logistic_probe(
    positive: Float[Tensor, "pair d_model"], negative: Float[Tensor, "pair d_model"]
) -> Float[Tensor, " d_model"]:
    """Weights of a logistic regression that tells the sides apart, scaled to the mean difference's norm.

    The regression is L2-regularised; features are standardised for the fit, and the weights taken back to the
    stream's own units.
    """
    with needed_for("logistic_probe"):
        from sklearn.linear_model import LogisticRegression  # scikit-learn takes a second to import

    features = torch.cat([positive, negative]).double().cpu().numpy()
    labels = np.array([1] * len(positive) + [0] * len(negative))
    scale = features.std(axis=0) + 1e-8
    probe = LogisticRegression(C=1.0, max_iter=2000).fit((features - features.mean(axis=0)) / scale, labels)
    weights = torch.tensor(probe.coef_[0] / scale, dtype=positive.dtype, device=positive.device)
    norm = weights.norm()
    return weights * (mean_difference(positive, negative).norm() / norm) if norm > 0 else weights


def extract(
    model: Any,
    pairs: ContrastSet,
    *,
    layers: Sequence[int] | None = None,
    estimator: str | Estimator = "mean_difference",
    prompt_format: PromptFormat | str | None = None,
    system: str | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> SteeringVectors:
    """Steering vectors of a contrast set, all layers in one pass.

    Args:
        model: a `HookedTransformer` with its tokenizer.
        pairs: what to contrast; a warning is given if its answer letters are unbalanced.
        layers: 0-based blocks; all by default.
        estimator: how a layer's activations become a direction: "mean_difference" (the paper's),
            "pca_of_differences", "logistic_probe", or "mean", "pca", "probe" for short; or a function of yours, which
            gives a tensor `[d_model]` (an array or a list of numbers becomes one).
        prompt_format: a format or its name; by default the model's own, see `prompts.default_format`.
        system: a system prompt for every question; the paper extracts without.
        batch_size: pairs at a time.

    Returns:
        Vectors in float32 on the CPU, with their provenance.

    Raises:
        ValueError: for an empty set, a layer out of range, a pair longer than the context, or activations that are not
            finite (half precision can overflow: load the model in bfloat16 or float32); an estimator's direction that
            has another shape, or is not finite; an estimator's name that is unknown.
        TypeError: for an estimator that returns no numbers.

    Warns:
        ContrastCheckWarning: if `pairs.check()` finds something that vectors would show.
        ZeroVectorWarning: if the pairs cancel, so that a layer's vector is zero or no more than rounding.
        SpecialTokenWarning, TemplateInQuestionWarning, StrippedQuestionWarning: once for all pairs, see
            `prompts.warn_of_words`.
    """
    check_model(model)
    check_contrast_set(pairs)
    batch_size = check_count("batch_size", batch_size)
    estimate = check_estimator(estimator)
    pairs.warn_if_unbalanced(stacklevel=3)
    warn_of_findings(pairs, stacklevel=3)
    layers = check_layers(model, layers)
    prompt_format = resolve_format(model, prompt_format)
    prompts = encode_pairs(model, pairs, prompt_format, system=system)
    batches = read_pairs(model, prompts, layers=layers, batch_size=batch_size)
    bar = tqdm(total=len(prompts), desc=f"extract {pairs.behavior}", unit="pair", disable=not progress)
    with bar, torch.no_grad(), kept_if_stopped():
        if estimate is mean_difference:
            directions, noise = _streaming_mean_difference(batches, len(prompts), bar)
        else:
            kept = _keep_all(batches, bar)
            _check_finite(kept, model)  # before an estimator fails on it in words of its own
            noise = _rounding(kept).mean(0) if estimate in ESTIMATORS.values() else torch.zeros(len(layers))
            rows = [_direction(estimate, kept[:, 0, i], kept[:, 1, i], layer) for i, layer in enumerate(layers)]
            directions = torch.stack(rows)
    _check_finite(directions, model)
    _warn_of_zero(directions, noise, layers, pairs)
    return SteeringVectors(
        directions=directions.float().cpu(),
        layers=layers,
        provenance=Provenance(
            model=str(model.cfg.model_name),
            behavior=pairs.behavior,
            method=getattr(estimate, "__name__", type(estimate).__name__),
            prompt_format=prompt_format.name,
            token_position="answer letter" if pairs.kind == "ab" else "mean over the completion",
            n_pairs=len(pairs),
            dataset_hash=pairs.content_hash,
            expression=pairs.behavior,
            details={
                **pairs.provenance_details,
                "model_dtype": dtype_name(model),
                **({"system": system} if system else {}),
                "caa_lens": importlib.metadata.version("caa-lens"),
                "transformer_lens": importlib.metadata.version("transformer-lens"),
                "torch": torch.__version__,
            },
        ),
    )


def check_estimator(estimator: str | Estimator) -> Estimator:
    """The function, also of its name. Raises `TypeError` or `ValueError` for anything else."""
    if isinstance(estimator, str):
        name = SHORT_NAMES.get(estimator, estimator)
        if name not in ESTIMATORS:
            short = ", ".join(SHORT_NAMES)
            raise ValueError(
                f"unknown estimator {estimator!r}: expected {', '.join(ESTIMATORS)} ({short} for short), or a function"
            )
        return ESTIMATORS[name]
    if not callable(estimator):
        raise TypeError(
            f"estimator must be one of {', '.join(ESTIMATORS)}, or a function of yours, got {describe(estimator)}"
        )
    return estimator


def _streaming_mean_difference(
    batches: Any, n_pairs: int, bar: Any
) -> tuple[Float[Tensor, "layer d_model"], Float[Tensor, " layer"]]:
    """The mean difference, and what of it may be rounding."""
    total: Tensor | None = None
    noise: Tensor | None = None
    for sides, _ in batches:
        # float64 where the device has it (MPS has not): sums of thousands of pairs lose nothing.
        wide = torch.float32 if sides.device.type == "mps" else torch.float64
        difference = sides[:, 0].to(wide) - sides[:, 1].to(wide)  # [pair layer d_model]
        total = difference.sum(0) if total is None else total + difference.sum(0)
        noise = _rounding(sides).sum(0) if noise is None else noise + _rounding(sides).sum(0)
        bar.update(len(sides))
    assert total is not None
    assert noise is not None
    return total / n_pairs, noise / n_pairs


def _keep_all(batches: Any, bar: Any) -> Float[Tensor, "pair side layer d_model"]:
    """Every pair's activations on the CPU, in the order of the set: batches come sorted by length."""
    kept: list[Tensor] = []
    order: list[int] = []
    for sides, indices in batches:
        kept.append(sides.cpu())
        order.extend(indices)
        bar.update(len(indices))
    return torch.cat(kept)[torch.tensor(order).argsort()]


def _direction(
    estimator: Estimator, positive: Float[Tensor, "pair d_model"], negative: Float[Tensor, "pair d_model"], layer: int
) -> Float[Tensor, " d_model"]:
    """What an estimator makes of one layer, in float32; of numpy, or a list of numbers, too."""
    name = getattr(estimator, "__name__", type(estimator).__name__)
    given = estimator(positive, negative)
    remedy = "try it on pair_activations(model, pairs)[layer], positive [:, 0] and negative [:, 1]"
    try:
        if given is None or isinstance(given, str):
            raise TypeError
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name} returned {describe(given)} at layer {layer}, expected a tensor [d_model]: {remedy}"
        ) from None
    if tuple(found.shape) != (positive.shape[1],):
        raise ValueError(
            f"{name} returned shape {tuple(found.shape)} at layer {layer}, expected ({positive.shape[1]},), one "
            f"direction: {remedy}"
        )
    if found.is_complex() or found.dtype == torch.bool:
        raise TypeError(f"{name} returned {found.dtype} at layer {layer}, expected real numbers: {remedy}")
    found = found.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(found).all()):
        raise ValueError(f"{name} returned NaN or infinite numbers at layer {layer}: {remedy}")
    return found


def _check_finite(values: Tensor, model: Any) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            f"activations of {model.cfg.model_name} are not finite in {dtype_of(model)}: "
            "load the model in bfloat16 or float32"
        )


ESTIMATORS: dict[str, Estimator] = {
    "mean_difference": mean_difference,
    "pca_of_differences": pca_of_differences,
    "logistic_probe": logistic_probe,
}
SHORT_NAMES = {"mean": "mean_difference", "pca": "pca_of_differences", "probe": "logistic_probe"}


def _rounding(sides: Float[Tensor, "pair side layer d_model"]) -> Float[Tensor, "pair layer"]:
    """What float32 may leave where the differences of pairs cancel, or both sides of a pair are alike."""
    return 1e-4 * (sides[:, 0] - sides[:, 1]).norm(dim=-1) + 1e-6 * sides.norm(dim=-1).mean(1)


def _warn_of_zero(
    directions: Float[Tensor, "layer d_model"],
    noise: Float[Tensor, " layer"],
    layers: Sequence[int],
    pairs: ContrastSet,
) -> None:
    small = directions.norm(dim=-1) <= noise.to(directions.device)
    if not bool(small.any()):
        return
    zero = [layer for layer, is_small in zip(layers, small.tolist(), strict=True) if is_small]
    sides = {(pair.question, pair.positive, pair.negative) for pair in pairs}
    exchanged = sum((question, negative, positive) in sides for question, positive, negative in sides)
    cause = f"{exchanged} pairs are also there with their answers exchanged" if exchanged else "the pairs cancel"
    warnings.warn(
        f"the vectors of {pairs.behavior!r} are zero, or rounding, at layers {layer_ranges(zero)}: {cause}. Nothing "
        "can be steered with them or read from them: look for pairs that stand twice, or answers of the same tokens",
        ZeroVectorWarning,
        stacklevel=3,
    )
