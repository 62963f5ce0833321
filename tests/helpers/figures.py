"""Every figure of the library, by the function that draws it: made-up numbers, and names that are hard to place."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from caa_lens.plots import (
    agreement,
    attribution,
    calibration,
    comparison,
    findings,
    geometry,
    lens,
    measures,
    transfers,
    unwanted,
)

OF, MODEL = "myopic-reward", "Llama-2-7b-chat-hf"
OF_MODEL = f"{OF} of {MODEL}"
LAYERS = list(range(30))
RNG = np.random.default_rng(0)
TOKENS = ["positive", " wonderful", "ingly", "<b>", "⏎", " unbelievably", "ment", " a", "Ġgreat", "！", "schön", " yes"]


def with_ends(frame: pd.DataFrame, column: str, half: float = 0.1) -> pd.DataFrame:
    return frame.assign(low=frame[column] - half, high=frame[column] + half)


def token(i: int) -> str:
    return TOKENS[i % len(TOKENS)]


def agreed() -> pd.DataFrame:
    frame = pd.DataFrame({"layer": LAYERS, "split_half": np.linspace(-0.1, 0.95, 30)})
    frame["verdict"] = ["nothing to steer with"] * 5 + ["weak"] * 8 + ["consistent"] * 17
    frame["because"] = "cosine 0.9"
    return with_ends(frame.assign(agreement=0.2, against=0.1, d_prime=np.linspace(0, 3, 30)), "split_half")


def pairs() -> pd.DataFrame:
    return pd.DataFrame({"pair": range(60), "cosine": np.linspace(-0.2, 0.6, 60), "influence": 2.0})


def slopes() -> pd.DataFrame:
    return with_ends(pd.DataFrame({"question": range(60), "slope": np.linspace(-0.3, 0.9, 60)}), "slope")


def learning() -> pd.DataFrame:
    n = [2, 4, 8, 16, 32, 64, 128, 256]
    return with_ends(pd.DataFrame({"n_pairs": n, "cosine": [0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97]}), "cosine", 0.03)


def contributions() -> pd.DataFrame:
    names = ["vector", *(f"{layer} {kind}" for layer in range(14, 30) for kind in ("attn", "mlp")), "norm scale"]
    kinds = ["vector", *["attn", "mlp"] * 16, "norm scale"]
    frame = pd.DataFrame({"component": names, "kind": kinds, "mean": RNG.normal(size=len(names))})
    return with_ends(frame.assign(layer=14), "mean")


def similar() -> pd.DataFrame:
    cells = [(pos, token(pos), layer) for layer in LAYERS for pos in range(45)]
    frame = pd.DataFrame(cells, columns=["position", "token", "layer"])
    return frame.assign(cosine=RNG.uniform(-0.4, 0.4, len(frame)), dot=RNG.normal(size=len(frame)))


def candidates() -> pd.DataFrame:
    frame = pd.DataFrame([(layer, m) for layer in LAYERS for m in (0.5, 1.0, 2.0)], columns=["layer", "multiplier"])
    frame["kl_mean"] = frame["multiplier"] ** 2 * RNG.uniform(0.001, 0.2, len(frame))
    frame["validation"] = frame["effect"] = RNG.normal(size=len(frame))
    frame["within"] = frame["kl_mean"] < 0.1
    frame["chosen"] = [i == 40 for i in range(len(frame))]
    return with_ends(frame.assign(swept=True, kl_tokens=500), "effect")


def methods() -> pd.DataFrame:
    names = ["CAA", "ActAdd", "linear activation transport", "SADI", "in words", "activation scaling", "BiPO"]
    names += ["InferAligner", "instruction", "random", "nothing"]
    rows = [
        (name, m, m / 5 + i / 20, abs(m) ** 2 / 50 + 0.001)
        for i, name in enumerate(names)
        for m in (-2.0, -1.0, 1.0, 2.0)
    ]
    return with_ends(pd.DataFrame(rows, columns=["method", "strength", "mean", "kl_mean"]), "mean")


def found() -> pd.DataFrame:
    names = ["duplicates", "length", "words", "letters in order", "answers begin inside a token"]
    return pd.DataFrame({"finding": names, "count": [3, 20, 44, 8, 1], "message": "many of them are"})


def square(names: list, row: str, column: str) -> pd.DataFrame:
    cells = [(a, b, 1.0 if a == b else float(RNG.uniform(-1, 1))) for a in names for b in names]
    return pd.DataFrame(cells, columns=[row, column, "cosine"])


def behaviors() -> list[str]:
    return ["sycophancy", "corrigible-neutral-HHH", "refusal", "sentiment", "myopic-reward"]


def norms() -> pd.DataFrame:
    grown = np.exp(np.linspace(0, 4, 30))
    frame = pd.DataFrame({"layer": LAYERS, "vector": grown / 5, "residual_positive": grown * 3})
    return frame.assign(residual_negative=grown * 3.1, ratio=frame["vector"] / frame["residual_positive"])


def components(layers: list[int]) -> pd.DataFrame:
    cells = [
        (layer, pair, side, letter, *RNG.normal(size=2), 0.35, 0.1)
        for layer in layers
        for pair, letter in enumerate("AB" * 10)
        for side in ("positive", "negative")
    ]
    columns = ["layer", "pair", "side", "letter", "pc1", "pc2", "explained_pc1", "explained_pc2"]
    return pd.DataFrame(cells, columns=columns)


def separable() -> pd.DataFrame:
    frame = pd.DataFrame({"layer": LAYERS, "accuracy": np.linspace(0.5, 1, 30), "explained": 0.1, "silhouette": 0.2})
    return with_ends(frame, "accuracy", 0.05)


def read_tokens(k: int) -> pd.DataFrame:
    cells = [
        (layer, side, rank, token(layer * 7 + rank), (1 if side == "promoted" else -1) * 9 / rank)
        for layer in LAYERS
        for side in ("promoted", "suppressed")
        for rank in range(1, k + 1)
    ]
    frame = pd.DataFrame(cells, columns=["layer", "side", "rank", "token", "score"])
    return frame.assign(probability=0.1, verdict=["readable" if layer > 8 else "weak" for layer in frame["layer"]])


def ranked() -> pd.DataFrame:
    words = [" wonderful", " awful", " unbelievably", " good", " bad", " delight", " misery", " hope", " hopelessness"]
    cells = [
        (layer, word, word, 1 + i % 2, 1 + (layer * 997 * (i + 1)) % 49000)
        for i, word in enumerate(words)
        for layer in LAYERS
    ]
    return pd.DataFrame(cells, columns=["layer", "word", "token", "pieces", "rank"]).assign(score=1.0)


def streamed(positions: int) -> pd.DataFrame:
    cells = [
        (steered, layer, 20 + pos, token(pos), token(layer + pos), RNG.uniform(), " wonderful", " awful")
        for steered in (False, True)
        for layer in LAYERS
        for pos in range(positions)
    ]
    names = ["steered", "layer", "position", "token_in", "top_token", "probability"]
    return pd.DataFrame(cells, columns=[*names, "unsteered_answer", "steered_answer"])


def swept() -> pd.DataFrame:
    cells = [(layer, m, layer * m / 30) for layer in LAYERS for m in (-2.0, -1.5, -1.0, 0.0, 1.0, 1.5, 2.0)]
    return with_ends(pd.DataFrame(cells, columns=["layer", "multiplier", "mean"]), "mean")


def moved(names: list) -> tuple[pd.DataFrame, pd.DataFrame]:
    cells = with_ends(square(names, "source", "target").assign(mean=RNG.normal(size=len(names) ** 2)), "mean")
    return cells, cells.pivot(index="source", columns="target", values="mean").loc[names, names]


def decayed() -> pd.DataFrame:
    distance = list(range(-29, 30))
    return with_ends(pd.DataFrame({"distance": distance, "mean": [1 / (1 + abs(d)) for d in distance]}), "mean")


def foreign() -> pd.DataFrame:
    cells = [
        (origin, layer, m, layer * m / 30) for origin in ("own", "foreign") for layer in LAYERS for m in (-1.0, 1.0)
    ]
    return with_ends(pd.DataFrame(cells, columns=["vectors", "layer", "multiplier", "mean"]), "mean")


def changed() -> pd.DataFrame:
    named = [("KL", "neutral questions"), ("share right", "easy questions"), ("refused", "harmless requests")]
    named += [("log-probability margin", "corrigible-neutral-HHH"), ("perplexity", "neutral questions")]
    frame = pd.DataFrame(named, columns=["measure", "of"]).assign(change=[0.1, -0.2, 0.0, 0.4, 12.0])
    frame = frame.assign(unsteered=1.0, steered=1.1, random=0.02, random_low=-0.1, random_high=0.15, n=24)
    return with_ends(frame, "change")


LEVELS = dict.fromkeys(behaviors(), 0.5)

FIGURES: dict[str, Callable[[], go.Figure]] = {
    "agreement_curves": lambda: agreement.agreement_curves(agreed(), of=OF_MODEL, n_pairs=60),
    "sorted_pairs": lambda: agreement.sorted_pairs(pairs(), of=OF_MODEL, layer=13),
    "learning_curves": lambda: agreement.learning_curves(learning(), of=OF_MODEL, layer=13, n_pairs=60),
    "sorted_slopes": lambda: agreement.sorted_slopes(
        slopes(), behavior=OF, layer=13, unit="log-probability margin (nats per token)", steepest=True, model=MODEL
    ),
    "contribution_bars": lambda: attribution.contribution_bars(
        contributions(),
        behavior=OF,
        layer=14,
        multiplier=-1.5,
        n_questions=24,
        total=1.25,
        interval=(1.0, 1.5),
        direct_share=0.31,
        summed=1.2,
        model=MODEL,
    ),
    "similarity_heatmap": lambda: attribution.similarity_heatmap(similar(), "dot", behavior=OF, reach=2.0, model=MODEL),
    "effect_within_budget": lambda: calibration.effect_within_budget(
        candidates(),
        budget=0.1,
        behavior=OF,
        label="log-probability margin (nats per token)",
        cross_fitted=False,
        model=MODEL,
    ),
    "effect_against_cost": lambda: comparison.effect_against_cost(
        methods(),
        behavior=OF,
        label="log-probability margin (nats per token)",
        n_questions=24,
        n_neutral=24,
        points=("nothing", "in words"),
        model=MODEL,
    ),
    "finding_bars": lambda: findings.finding_bars(found(), of=OF, n_pairs=60),
    "cosine_heatmap": lambda: geometry.cosine_heatmap(
        square(LAYERS, "layer", "other_layer"), of=OF_MODEL, sets=(MODEL, f"{MODEL}-finetuned")
    ),
    "behavior_heatmap": lambda: geometry.behavior_heatmap(
        square(behaviors(), "behavior", "other_behavior").assign(layer=13), models=[MODEL]
    ),
    "cosine_curve": lambda: geometry.cosine_curve(
        pd.DataFrame({"layer": LAYERS, "cosine": np.linspace(0, 1, 30)}), of=OF_MODEL, by_chance=0.08
    ),
    "vector_curves": lambda: geometry.vector_curves(
        pd.DataFrame({"layer": LAYERS, "norm": range(1, 31), "cosine_before": [np.nan, *np.linspace(0.2, 1, 29)]}),
        of=OF,
        model=MODEL,
    ),
    "norm_curves": lambda: geometry.norm_curves(norms(), of=OF_MODEL, n_pairs=60, read_at="last token of the answer"),
    "pca_panels": lambda: geometry.pca_panels(
        components([3, 9, 15, 21]), of=OF_MODEL, n_pairs=20, read_at="last token of the answer"
    ),
    "pca_panels of many layers": lambda: geometry.pca_panels(
        components(list(range(9))), of=OF_MODEL, n_pairs=20, read_at="last token of the answer"
    ),
    "separability_curves": lambda: geometry.separability_curves(
        separable(), of=OF_MODEL, n_pairs=60, emergence=13, chance=0.5
    ),
    "token_heatmaps": lambda: lens.token_heatmaps(read_tokens(6), 6, vectors=OF, reading="causal", model=MODEL),
    "token_heatmaps of many tokens": lambda: lens.token_heatmaps(
        read_tokens(12), 12, vectors=OF, reading="normed", model=MODEL
    ),
    "rank_curves": lambda: lens.rank_curves(
        ranked(),
        vectors=OF,
        reading="in_context",
        d_vocab=49152,
        controls=pd.DataFrame({"layer": LAYERS, "control_low": 4000.0, "control_high": 30000.0}),
        model=MODEL,
    ),
    "residual_heatmaps": lambda: lens.residual_heatmaps(
        streamed(6),
        settles_at={"unsteered": 21, "steered": None},
        steered_layers=[13],
        steer_start=23,
        model=MODEL,
    ),
    "residual_heatmaps of many positions": lambda: lens.residual_heatmaps(
        streamed(14), settles_at={"unsteered": 21, "steered": 24}, steered_layers=[13], steer_start=23, model=MODEL
    ),
    "sweep_heatmap": lambda: measures.sweep_heatmap(
        swept(),
        behavior=OF,
        test="corrigible-neutral-HHH",
        label="log-probability margin (nats per token)",
        unsteered=0.4,
        n_questions=50,
        model=MODEL,
    ),
    "dose_response": lambda: measures.dose_response(
        swept(), 13, behavior=OF, label="log-probability margin (nats per token)", n_questions=50, model=MODEL
    ),
    "score_histogram": lambda: measures.score_histogram(
        pd.DataFrame({"score": [*RNG.uniform(0, 10, 50), np.nan]}), behavior=OF, judge="gpt-4o-mini-2024-07-18"
    ),
    "layer_heatmap": lambda: transfers.layer_heatmap(
        *moved(LAYERS), behavior=OF, label="log-probability margin", unit="multiplier", unsteered=0.4, model=MODEL
    ),
    "decay_curves": lambda: transfers.decay_curves(
        moved(LAYERS)[0], decayed(), behavior=OF, unit="multiplier", unsteered=0.4, model=MODEL
    ),
    "layers_by_cosine": lambda: transfers.layers_by_cosine(
        moved(LAYERS)[0], behavior=OF, unit="multiplier", correlation=0.4, model=MODEL
    ),
    "grid_heatmap": lambda: transfers.grid_heatmap(*moved(behaviors()), layer=13, unsteered=LEVELS, model=MODEL),
    "grid_by_cosine": lambda: transfers.grid_by_cosine(moved(behaviors())[0], layer=13, model=MODEL),
    "model_effects": lambda: transfers.model_effects(
        foreign(),
        behavior=OF,
        own=MODEL,
        foreign="Llama-2-7b-hf",
        label="log-probability margin (nats per token)",
        unsteered=0.4,
    ),
    "map_quality": lambda: transfers.map_quality(
        pd.DataFrame({"layer": LAYERS, "source_layer": LAYERS, "r2": 0.5, "r2_weighted": 0.9, "n_held_out": 20}),
        source="Llama-2-7b-hf",
        target=MODEL,
    ),
    "token_heatmaps of one layer": lambda: lens.token_heatmaps(
        read_tokens(12)[lambda frame: frame["layer"] == 3], 12, vectors=OF, reading="in_context", model=MODEL
    ),
    "residual_heatmaps of one run": lambda: lens.residual_heatmaps(
        streamed(3)[lambda frame: ~frame["steered"]], settles_at={"unsteered": 21}, model=MODEL
    ),
    "similarity_heatmap of two tokens": lambda: attribution.similarity_heatmap(
        similar()[lambda frame: frame["position"] < 2], "cosine", behavior=OF, reach=0.4, model=MODEL
    ),
    "sweep_heatmap of one layer": lambda: measures.sweep_heatmap(
        swept()[lambda frame: frame["layer"] == 3],
        behavior=OF,
        test="",
        label="p(matching)",
        unsteered=np.nan,
        n_questions=1,
        model=MODEL,
    ),
    "behavior_heatmap of two": lambda: geometry.behavior_heatmap(
        square(behaviors()[:2], "behavior", "other_behavior").assign(layer=13), models=[MODEL]
    ),
    "finding_bars of nothing": lambda: findings.finding_bars(found()[:0], of=OF, n_pairs=60),
    "changes_forest of one measure": lambda: unwanted.changes_forest(
        changed()[:1], of=f"1.5 × {OF}[13]", n_random=1, model=MODEL
    ),
    "changes_forest": lambda: unwanted.changes_forest(changed(), of=f"1.5 × {OF}[13]", n_random=5, model=MODEL),
}
"""Some functions are there more than once, in several of their forms: what stands before " of " is the function."""
