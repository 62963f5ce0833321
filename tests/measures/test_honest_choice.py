"""The chosen cell's interval: too seldom right on the questions that chose it, right on those that did not."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from benchmarks.honest_choice import coverage, made_up_effects
from caa_lens.measures.honest_choice import choose_honestly
from caa_lens.measures.intervals import bootstrap_interval
from caa_lens.measures.sweeps import Sweep
from caa_lens.provenance import Provenance


def test_on_random_sweeps_the_honest_interval_holds_0_and_todays_does_not(capsys):
    (now, now_off), (honest, honest_off) = coverage(150, n_resamples=300, n_draws=200)
    with capsys.disabled():
        print(f"\nthe 95 % interval of the chosen layer holds 0: {now:.1%} as now, {honest:.1%} honestly")
    assert honest >= 0.90  # 0.93 and more are meant; of 150 sweeps 0.90 is 2.5 standard errors below 0.945
    assert now < 0.85
    assert now_off > 0.2
    assert abs(honest_off) < 0.06


def test_the_choice_as_now_is_that_of_a_sweep():
    effects = made_up_effects(20, 6, 0.0, np.random.default_rng(3))
    rows = [
        {"behavior": "b", "layer": layer, "multiplier": m, "question": question, "margin": m * effect / 2}
        for question, own in enumerate(effects)
        for layer, effect in enumerate(own)
        for m in (-1.0, 1.0)
    ]
    made = Sweep(frame=pd.DataFrame(rows), metric="margin", provenance={"vectors": Provenance(behavior="b")})
    cell = int(effects.mean(0).argmax())
    assert made.best_layer == cell
    (low,), (high,) = bootstrap_interval(effects[:, [cell]], seed=0)
    row = made.effect().set_index("layer").loc[cell]
    np.testing.assert_allclose(
        row[["effect", "low", "high"]].astype(float), [effects[:, cell].mean(), low, high], atol=0.05
    )


def test_each_fold_reports_on_what_the_others_chose():
    effects = np.random.default_rng(0).standard_normal((9, 5))
    found = choose_honestly(effects, n_folds=3, n_times=2, seed=7)
    draws, reports, choices = np.random.default_rng(7), [], []
    for _ in range(2):
        fold_of = draws.permutation(9) % 3
        for fold in range(3):
            choices.append(effects[fold_of != fold].mean(0).argmax())
            reports += list(effects[fold_of == fold, choices[-1]])
    assert found.choices == tuple(choices)
    assert found.effect == pytest.approx(np.mean(reports), rel=1e-12)


@pytest.mark.parametrize(("best", "wider"), [(0.0, "luck"), (9.0, "chance")])
def test_the_interval_is_the_wider_of_luck_and_chance(best, wider):
    effects = np.random.default_rng(5).standard_normal((12, 4))
    effects[:, 2] = best + (3 if best else 1) * effects[:, 2]
    found = choose_honestly(effects, n_folds=3, n_times=2, n_draws=50, seed=7)
    rng = np.random.default_rng(7)
    dealt = [rng.permutation(12) % 3 for _ in range(2)]

    def reports(given):
        own = np.zeros((2, 12))
        for time, fold_of in enumerate(dealt):
            for fold in range(3):
                own[time, fold_of == fold] = given[fold_of == fold, given[fold_of != fold].mean(0).argmax()]
        return own.mean(0)

    centred = effects - effects.mean(0)
    lucky = [abs(reports(sign[:, None] * centred).mean()) for sign in rng.choice([-1.0, 1.0], size=(50, 12))]
    reach = {
        "luck": np.quantile(lucky, 0.95) * np.sqrt(12 / 11) * 2.200985160 / 1.959963985,
        "chance": 2.200985160 * scipy.stats.sem(reports(effects)),
    }
    assert max(reach, key=reach.get) == wider
    assert (found.high - found.low) / 2 == pytest.approx(reach[wider], rel=1e-7)


def test_a_cell_that_is_by_far_the_best_is_chosen_by_every_half():
    effects = made_up_effects(30, 12, 0.0, np.random.default_rng(0))
    effects[:, 4] += 5
    found = choose_honestly(effects)
    assert (found.cell, found.agreeing) == (4, 1.0)
    assert found.effect == pytest.approx(effects[:, 4].mean(), rel=1e-12)
    assert found.low < 5 < found.high
    assert found.low > 4


def test_too_few_questions_and_numbers_that_are_none_are_told_of():
    with pytest.raises(ValueError, match="got 7 questions and 3 cells: of fewer than 8"):
        choose_honestly(np.zeros((7, 3)))
    with pytest.raises(ValueError, match="some effects are NaN or infinite"):
        choose_honestly(np.full((9, 3), np.nan))
