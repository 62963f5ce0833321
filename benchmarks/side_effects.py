"""What the demo model's vectors cost elsewhere: the table of `caa_lens.side_effects` for some bundled behaviors.

python benchmarks/side_effects.py                            # sentiment and refusal, layer 14, times 2: minutes
python benchmarks/side_effects.py --behaviors formality --multiplier 1 --n-random 1
"""

import argparse
import time

import caa_lens as cl


def measured(model, behavior, *, layer, multiplier, n_random):
    """Side effects of the vector of all pairs but 20, with the other bundled behaviors' vectors and tests."""
    train, _ = cl.ContrastSet.load(behavior).split(test=20)
    vector = cl.extract(model, train, layers=[layer], progress=False)[layer]
    return cl.side_effects(model, vector, multiplier, others="bundled", n_random=n_random)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--behaviors", nargs="+", default=["sentiment", "refusal"])
    parser.add_argument("--layer", type=int, default=14)
    parser.add_argument("--multiplier", type=float, default=2.0)
    parser.add_argument("--n-random", type=int, default=3)
    parser.add_argument("--save", metavar="FOLDER", help="keep each result there")
    chosen = parser.parse_args()
    model = cl.load_model("demo")
    for behavior in chosen.behaviors:
        begun, cpu = time.perf_counter(), time.process_time()
        found = measured(model, behavior, layer=chosen.layer, multiplier=chosen.multiplier, n_random=chosen.n_random)
        if chosen.save:
            found.save(f"{chosen.save}/{behavior}.parquet")
        print(f"{found}\n{time.perf_counter() - begun:.0f} s, {time.process_time() - cpu:.0f} s of processors\n")
