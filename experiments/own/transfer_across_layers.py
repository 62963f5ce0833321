"""Does a layer's vector work at other layers?

    python experiments/own/transfer_across_layers.py

Asked: the effect of layer i's sentiment vector added at layer j, as it is and rescaled to layer j's own norm; how far a
vector carries; whether the cosine of two layers' vectors predicts it. The paper (Figure 8) adds the layer-13 vector of
Llama 2 7B at all other layers: it works at many, at some earlier ones even better, and drops steeply around 17. What
was found on the demo model stands in `docs/interpretation.md`, with this command.
"""

from pathlib import Path

import caa_lens as cl

MODEL = "demo"
LAYERS = tuple(range(2, 30, 3))
N_TEST = 10
OUT = Path("runs/transfer")


def main() -> None:
    model = cl.load_model(MODEL)
    train, test = cl.ContrastSet.load("sentiment").split(test=20, seed=0)
    vectors = cl.extract(model, train, layers=LAYERS)
    OUT.mkdir(parents=True, exist_ok=True)
    for size in ("keep", "target"):
        result = cl.transfer_layers(model, test.sample(N_TEST, seed=0), vectors, size=size)
        print(f"\n{result!r}\ncorrelation of cosine with effect: {result.cosine_correlation():.2f}")
        print(result.table().round(2).to_string())
        print(result.best_targets().merge(result.reach(), on="source").round(3).to_string(index=False))
        result.plot().write_html(OUT / f"{size}.html")
    print(f"\nfigures in {OUT}")


if __name__ == "__main__":
    main()
