"""What do sentiment vectors say, and how do they act?

    python experiments/own/what_the_vectors_say.py

Asked: (1) by how much do the vectors promote positive words over negative ones, layer by layer, in the three readings
of the logit lens; (2) at which layer do the two sides of held-out pairs become separable; (3) how large is a vector
beside the residual stream; (4) does a vector act by itself or through the layers above it?

The paper (its section 7 and appendices) shows that letter-token activations of Llama 2 7B separate by behavior
suddenly, at about a third of the depth, and that tokens expressing the behavior are similar to its vector. What was
found on the demo model stands in `docs/interpretation.md`, with this command.
"""

import pandas as pd
import torch

import caa_lens as cl
from caa_lens.engine.pair_reading import pair_activations
from caa_lens.interpretation.pair_geometry import pair_separability, vector_norms
from caa_lens.prompts.prompt_formats import default_format

MODEL = "demo"
LAYERS = (0, 5, 10, 15, 18, 21, 24, 27, 29)  # tabled; vectors are extracted at every layer
POSITIVE = ("beautiful", "delight", "wonderful", "joy", "happy", "excellent", "love")
NEGATIVE = ("ugly", "worse", "terrible", "sad", "failure", "awful", "hate")
N_PROBE_PAIRS = 60
ACT_LAYERS = (15, 21, 26)


def show(title: str, frame: pd.DataFrame, digits: int = 2) -> None:
    print(f"\n### {title}\n")
    columns = list(frame.columns)
    print("| " + " | ".join(map(str, columns)) + " |\n|" + "---|" * len(columns))
    for row in frame.itertuples(index=False):
        print("| " + " | ".join(f"{cell:.{digits}f}" if isinstance(cell, float) else str(cell) for cell in row) + " |")


def main() -> None:
    model = cl.load_model(MODEL)
    train, test = cl.ContrastSet.load("sentiment").split(test=20, seed=0)
    vectors = cl.extract(model, train)

    margins = pd.DataFrame({"layer": LAYERS})
    for reading in ("direct", "normed", "in_context"):
        ranks = cl.word_ranks(
            model,
            vectors,
            [*POSITIVE, *NEGATIVE],
            layers=LAYERS,
            reading=reading,
            pairs=test if reading == "in_context" else None,
        )
        margins[reading] = ranks.margin(POSITIVE, NEGATIVE)["margin"].to_numpy()
    show("Mean score of positive minus negative words, in logits", margins)

    activations = pair_activations(model, train.sample(N_PROBE_PAIRS, seed=0))
    found = pair_separability(activations)
    size = vector_norms(vectors, activations)
    print(f"\n{found!r}\n{size!r}")
    table = found.frame.merge(size.frame, on="layer", suffixes=("", "_norms"))
    table = table[table["layer"].isin(LAYERS)]
    show("PairSeparability and size", table[[c for c in table.columns if table[c].dtype != object]], 3)

    for behavior in ("refusal", "sycophancy"):  # A/B sets: read at the letter
        letters = pair_activations(model, cl.ContrastSet.load(behavior).sample(N_PROBE_PAIRS, seed=0))
        apart = pair_separability(letters)
        best = apart.frame.loc[apart.frame["accuracy"].idxmax()]
        emerges = f"emerges at layer {apart.emergence}" if apart.emergence is not None else "never emerges"
        accuracy = f"best accuracy, of these pairs, {best['accuracy']:.2f} at layer {best['layer']:.0f}"
        print(f"\n{behavior}: {emerges}; {accuracy}")

    questions = [(f"{p.question} In one word:", "Good", "Bad") for p in test][:10]
    fmt = default_format(model)
    rows = []
    for layer in ACT_LAYERS:
        asked = [(fmt.encode(model.tokenizer, q), good, bad) for q, good, bad in questions]
        result = cl.interpretation.attribute_logits(model, asked, vectors[layer], multiplier=2.0, progress=False)
        kinds = result.by_kind()
        rows.append({"layer": layer, **{k: float(v) for k, v in kinds.items()}, "total": result.total})
        rows[-1]["explained"] = result.explained
    show("Change of logit('Good') - logit('Bad') at multiplier 2, by what made it", pd.DataFrame(rows), 3)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
