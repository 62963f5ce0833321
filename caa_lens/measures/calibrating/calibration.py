"""Where to steer and how much, within a budget of what it does elsewhere: chosen on some pairs, reported on others.

    found = calibrate(model, vectors, pairs, budget=0.1)     # pairs that the vectors were not extracted from
    found.layer, found.multiplier, found.range               # None where nothing is within the budget
    found.effect, found.low, found.high                      # on questions that had no part in the choice
    found.costs_frame()                                      # on neutral prompts that had none either

1. All candidates (layers x multipliers) are scored in one sweep, on the validation part and the test part together.
2. What each costs is measured on the first tokens of a few neutral answers: mean token KL, the larger of both signs.
3. The layers with the largest effect within the budget *on the validation part* are measured again, on more prompts
   and tokens, and the largest multipliers within the budget are looked for there, each sign for itself.
4. Of their cells the one with the largest effect on the validation part is chosen. Divergences of step 2 and of step 3
   are never set against each other.
5. Its effect is measured on the test part; its divergence, repetition and perplexity on other neutral prompts.

Effects are score(+m) - score(-m), in the score's units. Where pairs are too few for two parts, all of them choose and
all report, in folds (`honest_choice`); cells of layers that lead in no step 3 then take part with their divergence of
step 2, until the best cell is one of step 3.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.arguments import as_float, as_seed
from caa_lens.contrast.messages import Asked
from caa_lens.contrast.sets import ContrastSet
from caa_lens.engine.operators import Formula
from caa_lens.measures.calibrating.affordable import Lengths, lengths_for, sizes_of
from caa_lens.measures.calibrating.calibrated import Calibration, Chosen, no_effects
from caa_lens.measures.calibrating.cell_costs import CellCosts, without
from caa_lens.measures.calibrating.neutral_cost import neutral_cost, shortened
from caa_lens.measures.calibrating.parts import magnitudes_of, parts_of
from caa_lens.measures.calibrating.within_budget import (
    Cell,
    cells_within,
    effects_at,
    effects_of,
    largest,
    leading_layers,
    measured_end,
)
from caa_lens.measures.divergence import answered
from caa_lens.measures.elsewhere.neutral import CHOOSING, REPORTING
from caa_lens.measures.elsewhere.neutral_text import neutral_questions
from caa_lens.measures.honest_choice import HonestChoice, choose_honestly
from caa_lens.measures.intervals import bootstrap_interval
from caa_lens.measures.placed_conditions import Condition
from caa_lens.measures.sweeps import sweep
from caa_lens.measures.training_pairs import TrainingPairsWarning, warn_of_training_pairs
from caa_lens.models.checks import check_layers, check_model
from caa_lens.prompts.prompt_formats import PromptFormat, resolve_format
from caa_lens.steering.interventions import Intervention, is_fitted
from caa_lens.vectors.checks import check_vector_set

MULTIPLIERS = (-4.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 4.0)
Effects = dict[int, Float[np.ndarray, "question multiplier"]]  # by layer


def calibrate(
    model: Any,
    vectors: Any,
    pairs: ContrastSet,
    budget: float | int = 0.1,
    *,
    test: float | int | ContrastSet = 0.5,
    layers: Sequence[int] | None = None,
    multipliers: Sequence[float | int] = MULTIPLIERS,
    neutral: tuple[Sequence[Asked], Sequence[Asked]] = (CHOOSING, REPORTING),
    price: float | int = 0.5,
    operator: str | Formula = "add",
    positions: str = "caa",
    prompt_format: PromptFormat | str | None = None,
    system: str | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
    seed: int | None = 0,
) -> Calibration:
    """Choose a layer, a multiplier and a range of multipliers within a budget of divergence on neutral prompts.

    Args:
        vectors: `SteeringVectors`, each added at its own layer, or a fitted method of `caa_lens.methods`.
        pairs: held out from the vectors. One part chooses, the other reports.
        budget: the most mean token KL on neutral prompts, in nats, at +m and at -m.
        test: the part that reports: a share, a number of pairs, or a set of its own, where all `pairs` choose. Of a
            share that leaves fewer than 16 pairs in either part, all pairs choose and report, in folds.
        layers: those of the vectors by default.
        multipliers: each with its negative. Nothing beyond the largest or below the smallest is proposed.
        neutral: questions to choose on and to report, which are no question of the pairs.
        price: what all else may cost, as a share of the sweep of these candidates. It decides how many neutral prompts
            and tokens are measured (see `settings`), of which some are always taken.
        operator, positions, prompt_format, system: as in `sweep`.

    Raises:
        ValueError: for a budget or price that is not above 0, no layers, a multiplier without its negative, fewer than
            8 pairs in all or in a part that was asked for, pairs that are there twice, or neutral questions that are
            questions of the pairs. A budget that nothing meets is no error: `layer` is None then.

    Warns:
        TrainingPairsWarning: of pairs that the vectors were extracted from.
    """
    check_model(model)
    fitted = is_fitted(vectors)
    if not fitted:
        check_vector_set(vectors)
    budget, price, seed = as_float("budget", budget), as_float("price", price), as_seed(seed)
    if budget <= 0 or price <= 0:
        name, value, usual = ("budget", budget, "0.1 nats") if budget <= 0 else ("price", price, "0.5 of the sweep")
        raise ValueError(f"{name} must be above 0, got {value:g}: the default is {usual}")
    magnitudes = magnitudes_of(multipliers)
    signed = sorted(s * m for m in magnitudes for s in (-1, 1))
    layers = check_layers(model, vectors.layers if layers is None else layers)
    every, n_choosing, tested = parts_of(pairs, test, seed)
    asked = neutral_questions(neutral, (every,))
    chosen_format = resolve_format(model, prompt_format)
    warn_of_training_pairs(every, vectors)

    def condition(layer: int, m: float) -> Condition:
        if fitted:
            return tuple(vectors.at([layer]).interventions(m, positions=positions))
        return (Intervention(vector=vectors[layer], multiplier=m, operator=operator, positions=positions),)

    def swept(some: ContrastSet, layers: Sequence[int], multipliers: Sequence[float]) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TrainingPairsWarning)  # said above
            return sweep(
                model,
                some,
                vectors,
                operator=operator,
                positions=positions,
                multipliers=multipliers,
                layers=layers,
                prompt_format=chosen_format,
                system=system,
                max_tokens=max_tokens,
                progress=progress,
            )

    grid = sorted([0.0, *signed])
    found = swept(every, layers, grid)
    scores = _on_grid(found.frame, found.metric, len(layers), len(grid)).double().numpy()
    effects: Effects = {
        layer: np.stack([own[grid.index(m)] - own[grid.index(-m)] for m in magnitudes], axis=1)
        for layer, own in zip(layers, scores, strict=True)
    }
    choosing = {layer: own[:n_choosing] for layer, own in effects.items()}
    testing = {layer: own[n_choosing:] for layer, own in effects.items()}

    prompts = [[chosen_format.encode(model.tokenizer, text, system=system) for text in some] for some in asked]
    again = 0.0 if tested is None else len(tested) / len(every)
    sizes = sizes_of(model, every, prompts[0], chosen_format, system, again)
    lengths = lengths_for(sizes, layers, len(signed), price)
    share = sizes.calibration(lengths, layers, len(signed)) / sizes.sweep(layers, len(signed))
    prompts = [prompts[0][: lengths.full[0]], prompts[1][: lengths.report[0]]]
    both = answered(
        model,
        [*prompts[0], *prompts[1]],
        max_new_tokens=max(lengths.full[1], lengths.report[1]),
        batch_size=len(prompts[0]) + len(prompts[1]),
        progress=progress,
    )
    costs = CellCosts(
        model,
        both[: len(prompts[0])],
        condition,
        lengths,
        [(layer, m) for layer in layers for m in signed],
        max_tokens=max_tokens,
        progress=progress,
    )
    kl = {layer: costs.both_signs(layer, full=False) for layer in layers}
    broken = {
        layer: [m for m, own in zip(magnitudes, effects[layer].T, strict=True) if not np.isfinite(own).all()]
        for layer in layers
    }
    honest: HonestChoice | None = None
    if tested is None:
        leading, cell, honest = _in_folds(choosing, magnitudes, kl, broken, costs, budget, lengths.n_leading, seed)
    else:
        leading, cell = choose(choosing, magnitudes, kl, broken, costs, budget, lengths.n_leading)

    frame = _frame(vectors.behavior, magnitudes, choosing, layers, leading, costs, budget)
    for i, row in frame[frame["swept"]].iterrows():
        if tested is not None:
            own = testing[row["layer"]][:, magnitudes.index(row["multiplier"])]
            frame.loc[i, ["effect", "low", "high"]] = _mean_with_interval(own, seed)
    chosen, of_questions = None, no_effects()
    if cell is not None:
        if honest is not None:
            numbers = (honest.effect, honest.low, honest.high)
        else:
            assert tested is not None
            if cell.multiplier in magnitudes:
                own = testing[cell.layer][:, magnitudes.index(cell.multiplier)]
            else:
                once = swept(tested, [cell.layer], [-cell.multiplier, cell.multiplier])
                minus, plus = _on_grid(once.frame, once.metric, 1, 2)[0].double().numpy()
                own = plus - minus
            numbers, of_questions = _mean_with_interval(own, seed), torch.from_numpy(own).float()
        frame["chosen"] = (frame["layer"] == cell.layer) & (frame["multiplier"] == cell.multiplier)
        frame.loc[frame["chosen"], ["effect", "low", "high"]] = numbers
        ends = [measured_end(costs.of_sign(cell.layer, sign), budget) or cell.multiplier for sign in (-1, 1)]
        chosen = Chosen(
            layer=cell.layer,
            multiplier=cell.multiplier,
            range=(-ends[0], ends[1]),
            effect=numbers[0],
            low=numbers[1],
            high=numbers[2],
            agreeing=None if honest is None else honest.agreeing,
        )
    reported = [] if chosen is None else sorted({*chosen.range, -chosen.multiplier, chosen.multiplier})
    paid = neutral_cost(
        model,
        prompts[1],
        shortened(both[len(prompts[0]) :], lengths.report),
        [(m, condition(chosen.layer, m)) for m in reported] if chosen else [],
        n_tokens=lengths.report[1],
        max_tokens=max_tokens,
        seed=seed,
        progress=progress,
    )
    report_on = every if tested is None else tested
    return Calibration(
        frame=frame,
        settings={
            **found.settings,
            "pairs": pairs.name,
            "test": report_on.name,
            "test_hash": report_on.content_hash,
            "choosing_hash": every[:n_choosing].content_hash,
            "choosing": f"{n_choosing} pairs"
            + (" in folds, which report too" if tested is None else f", reported on {len(tested)} others"),
            "neutral": _in_words(lengths, costs, len(layers) * len(signed), len(leading)),
            "budget": f"{budget:g}",
            "price": f"{price:g} of the sweep; {share:.2f} by count",
            "seed": str(seed),
        },
        provenance=found.provenance,
        metric=found.metric,
        budget=budget,
        chosen=chosen,
        costs=paid,
        cross_fitted=tested is None,
        n_choosing=n_choosing,
        layers=tuple(layers),
        multipliers=tuple(grid),
        logp_positive=_on_grid(found.frame, "logp_positive", len(layers), len(grid)),
        logp_negative=_on_grid(found.frame, "logp_negative", len(layers), len(grid)),
        question_effects=of_questions,
    )


def choose(
    effects: Effects,
    multipliers: Sequence[float],
    kl: dict[int, dict[float, float]],
    broken: dict[int, list[float]],
    costs: CellCosts,
    budget: float,
    n_leading: int,
) -> tuple[list[int], Cell | None]:
    """The leading layers, measured on more tokens, and the best of their cells by the questions that choose.

    Args:
        effects: of the questions that choose, and of no others.
        kl: on few tokens.
        broken: multipliers at which some score is not finite.
    """
    few = {layer: without(own, broken[layer]) for layer, own in kl.items()}
    leading = leading_layers(effects, multipliers, few, budget, n_leading)
    costs.narrow(leading, budget)
    full = {layer: without(costs.both_signs(layer, full=True), broken[layer]) for layer in leading}
    cells = cells_within(full, multipliers, budget, measured=True)
    return leading, largest(effects, multipliers, cells) if cells else None


def _in_folds(
    effects: Effects,
    multipliers: Sequence[float],
    kl: dict[int, dict[float, float]],
    broken: dict[int, list[float]],
    costs: CellCosts,
    budget: float,
    n_leading: int,
    seed: int,
) -> tuple[list[int], Cell | None, HonestChoice | None]:
    """The same where all questions choose and report: the best cell of all layers must be one measured on more."""
    leading, _ = choose(effects, multipliers, kl, broken, costs, budget, n_leading)
    while True:
        few = {layer: without(own, broken[layer]) for layer, own in kl.items() if layer not in leading}
        full = {layer: without(costs.both_signs(layer, full=True), broken[layer]) for layer in leading}
        cells = cells_within(full, multipliers, budget, measured=True)
        cells += cells_within(few, multipliers, budget, measured=False)
        if not cells:
            return leading, None, None
        best = largest(effects, multipliers, cells)
        if best.layer in leading:
            return leading, best, choose_honestly(effects_of(effects, multipliers, cells), seed=seed)
        leading = [*leading, best.layer]
        costs.narrow([best.layer], budget)


def _on_grid(
    frame: pd.DataFrame, column: str, n_layers: int, n_multipliers: int
) -> Float[Tensor, "layer multiplier question"]:
    """A column of a sweep's frame, whose rows are by layer, multiplier and question."""
    return torch.tensor(frame[column].to_numpy(copy=True)).reshape(n_layers, n_multipliers, -1)


def _mean_with_interval(values: Float[np.ndarray, " question"], seed: int) -> tuple[float, float, float]:
    (low,), (high,) = bootstrap_interval(values[:, None], seed=seed)
    return float(values.mean()), float(low), float(high)


def _frame(
    behavior: str,
    magnitudes: Sequence[float],
    effects: Effects,
    layers: Sequence[int],
    leading: Sequence[int],
    costs: CellCosts,
    budget: float,
) -> pd.DataFrame:
    """One row a candidate and end; what chose is in it, and the test part is not."""
    rows = []
    for layer in layers:
        full = costs.both_signs(layer, full=True) if layer in leading else {}
        end = measured_end(full, budget)
        for m in sorted({*magnitudes, *(() if end is None else (end,))}):
            known, n_tokens = (costs.full, costs.n_full) if m in full else (costs.few, costs.n_few)
            mean, p95 = max(known[layer, m], known[layer, -m])
            rows.append(
                {
                    "behavior": behavior,
                    "layer": layer,
                    "multiplier": m,
                    "swept": m in magnitudes,
                    "validation": float(effects_at(effects[layer], magnitudes, m).mean()),
                    "effect": np.nan,
                    "low": np.nan,
                    "high": np.nan,
                    "kl_mean": mean,
                    "kl_p95": p95,
                    "kl_tokens": n_tokens,
                    "within": bool(mean <= budget),
                    "chosen": False,
                }
            )
    return pd.DataFrame(rows)


def _in_words(lengths: Lengths, costs: CellCosts, n_candidates: int, n_leading: int) -> str:
    few, full, report = (f"{one[0]} x {one[1]}" for one in (lengths.few, lengths.full, lengths.report))
    return (
        f"answers x first tokens: {few} at each of {n_candidates} candidates ({costs.n_few} tokens), {full} at "
        f"{n_leading} leading layers ({costs.n_full} tokens), {report} of others to report"
    )
