"""What a calibration costs beside its sweep, and how near its choice comes to the best cell of a dense grid.

    python benchmarks/calibration.py                                  # price: refusal (A/B) and sentiment, all layers
    python benchmarks/calibration.py --sets sycophancy --pairs 32     # one set, fewer pairs
    python benchmarks/calibration.py --table --sets refusal           # and the choice beside a dense grid
    python benchmarks/calibration.py --table --every 3                # every third layer: quicker

Half of the pairs choose, half report. Price: CPU time of the whole calibration over that of the sweep inside it, in one
process. The grid: the same layers x multipliers in steps of the root of two; divergences of all cells on 6 answers of
16 tokens, and the cells within the budget scored on the test questions. Its best cell is the best *of these questions*,
which flatters it; the choice has not seen them.
"""

import argparse
from unittest import mock

import numpy as np
import torch
from timing import cpu_seconds, print_table

import caa_lens as cl
from caa_lens.measures import answered, bootstrap_interval, score_answers, token_kl
from caa_lens.measures.calibrating import calibration
from caa_lens.measures.elsewhere.neutral import CHOOSING
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.steering.interventions import Intervention

DENSE = [0.5 * 2 ** (i / 2) for i in range(7)]  # 0.5 to 4


def calibrated(model, vectors, held, budget, layers):
    """The calibration, its CPU seconds, and those of the sweep inside it."""
    times, kept = [], []

    def timed(*args, **kwargs):
        times.append(cpu_seconds(lambda: kept.append(cl.measures.sweep(*args, **kwargs))))
        return kept[-1]

    found = []
    with mock.patch.object(calibration, "sweep", timed):
        whole = cpu_seconds(
            lambda: found.append(cl.calibrate(model, vectors, held, budget, layers=layers, progress=False))
        )
    return found[0], whole, times[0]


def conditions_of(vectors, cells):
    """+m and -m of each cell."""
    return [(Intervention(vector=vectors[layer], multiplier=s * m),) for layer, m in cells for s in (1, -1)]


def best_of_grid(model, vectors, test, budget, layers, also):
    """The grid's best cell within the budget: its effects by question, those of the cell `also`, and both KLs."""
    prompts = answered(
        model, [Prompt.of(model, text) for text in CHOOSING[:6]], max_new_tokens=16, batch_size=6, progress=False
    )
    cells = [*((layer, m) for layer in layers for m in DENSE), also]
    kl = torch.cat(token_kl(model, prompts, conditions_of(vectors, cells), progress=False), dim=1).mean(1)
    kl = kl.view(-1, 2).amax(1).tolist()
    within = [i for i, one in enumerate(kl[:-1]) if one <= budget] + [len(cells) - 1]
    scores = score_answers(model, test, conditions_of(vectors, [cells[i] for i in within]), progress=False).values
    effects = (scores[:, ::2] - scores[:, 1::2]).double().numpy()
    best = int(effects[:, :-1].mean(0).argmax())
    return cells[within[best]], effects[:, best], kl[within[best]], effects[:, -1], kl[-1]


def with_interval(values):
    """Mean and 95 % interval."""
    (low,), (high,) = bootstrap_interval(values[:, None])
    return f"{values.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=["refusal", "sentiment"])
    parser.add_argument("--pairs", type=int, default=40, help="held out from the vectors")
    parser.add_argument("--every", type=int, default=1, help="every nth layer")
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = cl.load_model("demo", device="cpu")
    layers = list(range(0, model.cfg.n_layers, options.every))
    prices, choices = [], []
    for name in options.sets:
        train, held = cl.ContrastSet.load(name).split(test=options.pairs, seed=0)
        vectors = cl.extract(model, train.sample(40), progress=False)
        found, whole, swept = calibrated(model, vectors, held, options.budget, layers)
        print(f"\n{found!r}\n", flush=True)
        prices.append([name, len(held), len(layers), swept, whole, whole / swept, found.settings["neutral"]])
        print(f"{name}: {whole / swept:.2f} of the sweep", flush=True)
        if options.table and found.chosen:
            _, test = held.split(test=0.5, seed=0)
            assert test.content_hash == found.settings["test_hash"]
            also = (found.layer, found.multiplier)
            cell, best, best_kl, own, own_kl = best_of_grid(model, vectors, test, options.budget, layers, also)
            np.testing.assert_allclose(own.mean(), found.effect, atol=2e-3)
            choices.append(
                [
                    name,
                    found.verdict,
                    f"{also[0]}, ±{also[1]:.3g}, {own_kl:.3f}",
                    with_interval(own),
                    f"{cell[0]}, ±{cell[1]:.3g}, {best_kl:.3f}",
                    with_interval(best),
                    f"{own.mean() / best.mean():.0%}",
                    with_interval(own - best),
                ]
            )
            print(choices[-1], flush=True)
    print_table(
        "Price",
        ["set", "pairs", "layers", "sweep, CPU s", "calibration, CPU s", "ratio", "neutral answers"],
        prices,
    )
    if choices:
        chosen, grid = "layer, multiplier, KL", "grid: layer, multiplier, KL"
        columns = ["set", "verdict", chosen, "effect", grid, "effect", "share", "difference"]
        print_table(f"Choice and best cell of a grid of {len(layers)} x {len(DENSE)}", columns, choices)


if __name__ == "__main__":
    main()
