"""How often the 95 % interval of the chosen cell holds the truth, where there is nothing to find and where there is.

    python benchmarks/honest_choice.py                 # 1,000 made-up sweeps of each kind: minutes
    python benchmarks/honest_choice.py --sweeps 100

Sweeps are made of numbers: effects of questions in neighbouring layers, correlated as in real sweeps (0.8 from layer to
layer), with mean 0 everywhere or with one good layer. "As now" chooses the layer with the largest mean and takes its
bootstrap interval on the same questions; "honest" is `measures.honest_choice`.
"""

import argparse

import numpy as np

from caa_lens.measures.honest_choice import choose_honestly
from caa_lens.measures.intervals import bootstrap_interval


def made_up_effects(n_questions, n_layers, effect, rng, correlation=0.8):
    """Effects `[question layer]` of standard deviation 1, with mean `effect` at the middle layer and half beside it."""
    noise = rng.standard_normal((n_questions, n_layers))
    for layer in range(1, n_layers):
        noise[:, layer] = correlation * noise[:, layer - 1] + np.sqrt(1 - correlation**2) * noise[:, layer]
    return noise + true_means(n_layers, effect)


def true_means(n_layers, effect):
    """Of every layer."""
    means = np.zeros(n_layers)
    middle = n_layers // 2
    means[middle - 1 : middle + 2] = effect / 2
    means[middle] = effect
    return means


def coverage(n_sweeps, *, n_questions=30, n_layers=24, effect=0.0, n_resamples=1000, n_draws=400, seed=0, **how):
    """How often both intervals hold the true effect of what was chosen, and by how much each overstates it.

    For the honest choice that is the mean true effect of the layers that its parts chose.

    Args:
        how: more of `choose_honestly`.

    Returns (as now, honest), each a pair: share of sweeps held, mean error of the estimate.
    """
    rng, means = np.random.default_rng(seed), true_means(n_layers, effect)
    held, off = np.zeros((n_sweeps, 2)), np.zeros((n_sweeps, 2))
    for i in range(n_sweeps):
        effects = made_up_effects(n_questions, n_layers, effect, rng)
        cell = int(effects.mean(0).argmax())
        (low,), (high,) = bootstrap_interval(effects[:, [cell]], n_resamples=n_resamples, seed=i)
        held[i, 0], off[i, 0] = low <= means[cell] <= high, effects[:, cell].mean() - means[cell]
        honest = choose_honestly(effects, n_draws=n_draws, seed=i, **how)
        true = means[list(honest.choices)].mean()
        held[i, 1], off[i, 1] = honest.low <= true <= honest.high, honest.effect - true
    return tuple(zip(held.mean(0).tolist(), off.mean(0).tolist(), strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sweeps", type=int, default=1000)
    n_sweeps = parser.parse_args().sweeps
    print("| effect | questions | as now: held | overstated | honest: held | overstated |\n|---|---|---|---|---|---|")
    for effect in (0.0, 0.3, 0.8):
        for n_questions in (20, 40):
            (now, now_off), (honest, honest_off) = coverage(n_sweeps, n_questions=n_questions, effect=effect)
            print(f"| {effect} | {n_questions} | {now:.1%} | {now_off:.3f} | {honest:.1%} | {honest_off:.3f} |")
