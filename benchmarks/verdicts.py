"""How often `reliability` gives which verdict on planted pairs, and how often its interval and cone hold the truth.

    python benchmarks/verdicts.py             # 200 made-up sets of each kind: minutes
    python benchmarks/verdicts.py --sets 20

Sets have noise whose standard deviation falls as 1 / sqrt(dimension) over 64 dimensions, and a direction `size` times
as long; of A/B pairs also a letter five times as long as the noise. Two layers a set; a verdict counts if
either layer has it, the strongest first.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from caa_lens.measures.agreement.reliabilities import CONSISTENT, NOTHING, WEAK, reliability

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers.planted_pairs import planted

LETTER = 5.0
SHAPE = {"d_model": 64, "falling": 0.5, "n_layers": 2}


def rates(n_sets, *, n_pairs, size, letter, n_resamples=400):
    """Shares of sets by verdict; share of layers whose split-half interval holds the expected cosine."""
    strongest, held = [], []
    expected = size**2 / (size**2 + 2 / n_pairs)  # signal / (signal + noise of half of the pairs)
    for seed in range(n_sets):
        given = planted(n_pairs, size=size, letter=letter, seed=seed, **SHAPE)
        frame = reliability(given, n_resamples=n_resamples, seed=seed, progress=False).frame
        strongest.append(next(one for one in (CONSISTENT, WEAK, NOTHING) if one in set(frame["verdict"])))
        held += ((frame["low"] <= expected) & (expected <= frame["high"])).tolist()
    shares = {verdict: strongest.count(verdict) / n_sets for verdict in (NOTHING, WEAK, CONSISTENT)}
    return shares, expected, float(np.mean(held))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sets", type=int, default=200)
    n_sets = parser.parse_args().sets
    print("| pairs | kind | size | expected cosine | nothing | weak | consistent | interval holds it |")
    print("|---|---|---|---|---|---|---|---|")
    for n_pairs in (8, 20, 40):
        for letter in (None, LETTER):
            for size in (0.0, 0.25, 0.5, 0.8):
                found, expected, held = rates(n_sets, n_pairs=n_pairs, size=size, letter=letter)
                kind = "completions" if letter is None else "A/B"
                shares = " | ".join(f"{found[verdict]:.0%}" for verdict in (NOTHING, WEAK, CONSISTENT))
                print(f"| {n_pairs} | {kind} | {size} | {expected:.2f} | {shares} | {held:.0%} |", flush=True)
