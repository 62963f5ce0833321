"""What the paper's experiments on texts and on the vectors themselves say of made-up numbers."""

from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from helpers.made_up_scores import (
    random_activations,
    section_of,
    tables_of,
)
from helpers.stand_in_context import CONFIG

from caa_lens.interpretation.pair_geometry import PairPCA, PairSeparability, pair_pca
from caa_lens.measures.intervals import bootstrap_interval
from caa_lens.provenance import Provenance
from experiments.paper import figure_5_open_ended as open_ended
from experiments.paper import figure_7_cross_layer_cosines as cross_layer_cosines
from experiments.paper import tables_4_10_13_finetuning as finetuning
from experiments.running.units import Unit


def test_text_is_told_by_its_mean_measures_at_the_ends_and_unsteered():
    parts = {}
    for behavior, shift in (("z", 0.0), ("a", 0.25)):
        for m in reversed(open_ended.MULTIPLIERS):
            rows = pd.DataFrame({"prompt": [0, 1, 2], "question": ["q0", "q1", "q2"], "layer": 2})
            rows["answer"] = [f"{behavior}{prompt}{m:g}" for prompt in range(3)]
            rows["sentiment"] = np.array([0.0, 0.1, 0.5]) + shift + m / 8
            rows["repetition"] = np.array([0.0, 0.3, 0.6]) + shift / 2
            rows["distinct_2"], rows["n_tokens"] = 0.5, [3, 4, 8]
            rows["mean_logp"] = [np.nan] * 3 if m == 2.0 else [-1.0, -2.0, -4.5]
            parts[Unit.of(behavior=behavior, multiplier=m)] = rows
    section = section_of("open_ended", parts, CONFIG)
    assert section.text.startswith("Greedy answers with the layer-2 vector.")
    assert section.found == [
        "z: sentiment -0.05 at -2, +0.20 unsteered, +0.45 at +2; mean log-probability -2.50, -2.50, nothing to count; "
        "repeated 4-grams 30%, 30%, 30%.",
        "a: sentiment +0.20 at -2, +0.45 unsteered, +0.70 at +2; mean log-probability -2.50, -2.50, nothing to count; "
        "repeated 4-grams 42%, 42%, 42%.",
    ]
    assert [name for name, _ in section.texts] == ["z: q0", "z: q1", "a: q0", "a: q1"]
    assert section.texts[3][1] == [
        (f"{m:+g}" if m else "unsteered", f"a1{m:g}") for m in (-2.0, -1.5, -1.0, 0.0, 1.0, 1.5, 2.0)
    ]
    (table,) = tables_of(section).values()
    assert table["n_tokens"].tolist() == [5.0] * 14
    assert list(table) == ["behavior", "multiplier", *open_ended.MEASURES]
    assert len(section.figures) == 3


def test_separation_is_told_by_layer_and_depth():
    about = Provenance(model="chat", behavior="refusal")
    parts = pd.DataFrame({"layer": [0, 1, 2], "accuracy": [0.5, 0.9, 0.8], "low": [0.4, 0.7, 0.6]})
    parts = parts.assign(high=[0.6, 1.0, 0.9], explained=0.1, silhouette=0.2)
    frames = {}
    for behavior, emergence in (("z", 1), ("a", None)):
        drawn = pair_pca(random_activations((0, 1, 2)), layers=(0, 1)).frame
        drawn.attrs |= {"n_layers": 5, "activations": asdict(about)}
        told = parts.copy()
        told.attrs |= {"n_layers": 5, "activations": asdict(about), "emergence": emergence, "chance": 0.55}
        frames |= {Unit.of(behavior=behavior, what="pca"): drawn, Unit.of(behavior=behavior, what="separability"): told}
    section = section_of("contrast_pca", frames, CONFIG)
    best = "held-out accuracy is largest at layer 1, 0.90, which was chosen on these pairs; chance 0.55."
    assert section.found == [
        f"z: the sides become separable at layer 1 (25% of the depth); {best}",
        f"a: the sides become separable at no layer; {best}",
    ]
    assert [figure.to_json() for figure in section.figures[:2]] == [
        PairPCA(frame=drawn, provenance={"activations": about}).plot().to_json(),
        PairSeparability(frame=parts, emergence=1, chance=0.55, provenance={"activations": about}).plot().to_json(),
    ]
    (table,) = tables_of(section).values()
    assert table.to_dict("records") == [
        {"behavior": name, "emerges at": at, "layer": 1, "accuracy": 0.9, "low": 0.7, "high": 1.0}
        for name, at in (("z", 1), ("a", ""))
    ]


def test_decay_is_told_by_half_at_the_largest_distance():
    frames = {}
    for behavior, slow in (("z", (0.1, 0.01)), ("a", (0.01, 0.1))):
        cosines = pd.DataFrame([(a, b) for a in range(8) for b in range(8)], columns=["layer", "other_layer"])
        rate = np.where(cosines[["layer", "other_layer"]].min(axis=1) >= 4, slow[1], slow[0])
        cosines["cosine"] = 1 - (cosines["other_layer"] - cosines["layer"]).abs() * rate
        cosines.attrs["vectors"] = asdict(Provenance(behavior=behavior))
        frames[Unit.of(behavior=behavior)] = cosines
    section = section_of("cross_layer_cosines", frames, CONFIG)
    assert section.found == [
        "z: similarity decays more slowly in the second half (mean cosine of layers 3 apart: 0.70 in the first half, "
        "0.97 in the second).",
        "a: similarity does not decay more slowly in the second half (mean cosine of layers 3 apart: 0.97 in the "
        "first half, 0.70 in the second).",
    ]
    (table,) = tables_of(section).values()
    assert table["behavior"].tolist() == ["z", "z", "a", "a"]
    assert table["half"].tolist() == ["first", "second"] * 2
    np.testing.assert_allclose(table["1 apart"], [0.9, 0.99, 0.99, 0.9])
    assert len(section.figures) == 2


@pytest.mark.parametrize("n_layers", [8, 9])
def test_layers_of_different_halves_are_no_part_of_the_decay(n_layers):
    cosines = pd.DataFrame([(a, b) for a in range(n_layers) for b in range(n_layers)], columns=["layer", "other_layer"])
    first = cosines < n_layers / 2
    cosines["cosine"] = np.where(first.all(axis=1), 0.25, np.where(~first.any(axis=1), 0.75, np.nan))
    cosines["cosine"] = cosines["cosine"].fillna(-99)
    table = cross_layer_cosines.decay(cosines).set_index("half")
    assert table.loc["first", ["1 apart", "3 apart"]].tolist() == [0.25, 0.25]
    assert table.loc["second", ["1 apart", "3 apart"]].tolist() == [0.75, 0.75]


def test_similar_tokens_are_told_by_side_and_shown_on_one_scale():
    cosines = {"matching": [[0.1, 0.3], [0.5, 0.5], [0.2, 0.0]], "not matching": [[0.0, 0.1], [0.6, 0.8], [0.0, 0.0]]}
    rows = [
        {"text": text, "side": side, "position": position, "cosine": value, "in_answer": position > 0, "layer": 2}
        for side, texts in cosines.items()
        for text, values in enumerate(texts)
        for position, value in enumerate([9.0, *values])
    ]
    own = pd.DataFrame(
        {
            "text": [0, 0, 0, 1, 1],
            "side": "own",
            "position": [0, 1, 2, 0, 1],
            "cosine": [0.99, -0.45678, 0.2, 0.9, 0.1],
            "piece": list("abcde"),
            "in_answer": [False, False, True, False, True],
            "layer": 2,
        }
    )
    frames = {Unit.of(behavior="b", texts="answers"): own, Unit.of(behavior="b", texts="pairs"): pd.DataFrame(rows)}
    section = section_of("token_similarities", frames, CONFIG)
    assert section.text.startswith("Cosine of each token's residual stream after layer 2 ")
    apart = np.array([0.15, -0.2, 0.1])
    (low,), (high,) = bootstrap_interval(apart[:, None], seed=3)
    assert section.found == [
        f"b: tokens of matching answers have a cosine {apart.mean():+.3f} [{low:.3f}, {high:.3f}] above those of the "
        "other answer; larger in 67% of 3 pairs."
    ]
    (table,) = tables_of(section).values()
    (row,) = table.to_dict("records")
    assert row.pop("pairs where matching is larger") == "67% of 3"
    assert row.pop("behavior") == "b"
    expected = {
        "matching": 0.8 / 3,
        "not matching": 0.25,
        "difference": apart.mean(),
        "95 % low": low,
        "95 % high": high,
    }
    assert row == pytest.approx(expected)
    assert [(each.caption, list(each.tokens), each.bound) for each in section.tokens] == [
        ("b, prompt 1", [("b", -0.4568), ("c", 0.2)], pytest.approx(0.45678)),
        ("b, prompt 2", [("e", 0.1)], pytest.approx(0.45678)),
    ]


def test_words_are_shown_side_by_side_from_the_last_layer_down():
    rows = [
        {"layer": layer, "side": side, "token": f"{side[0]}{layer}{i}"}
        for layer in range(14)
        for side in ("promoted", "suppressed")
        for i in range(2)
    ]
    unit = Unit.of(behavior="b", reading="in_context")
    ((caption, table),) = section_of("vector_words", {unit: pd.DataFrame(rows)}, CONFIG).tables
    assert caption == "b, in context"
    assert table["layer"].tolist() == [1, 3, 5, 7, 9, 11, 13]
    assert table.iloc[0].to_dict() == {"layer": 1, "promoted": "p10  p11", "suppressed": "s10  s11"}
    ((_, few),) = section_of("vector_words", {unit: pd.DataFrame(rows[:12])}, CONFIG).tables
    assert few["layer"].tolist() == [0, 1, 2]


def test_taught_text_is_told_by_side():
    parts = {}
    for behavior, shift in (("z", 0.0), ("a", 0.5)):
        for side, sign in (("positive", 1), ("negative", -1)):
            for m in finetuning.MULTIPLIERS:
                rows = pd.DataFrame({"prompt": [0, 1], "question": ["q0", "q1"], "layer": 2, "answer": f"{side}{m:g}"})
                rows["sentiment"] = np.array([0.0, 0.2]) * sign + shift / 10 + m / 10
                rows["repetition"] = rows["distinct_2"] = rows["mean_logp"] = 0.5
                rows["n_tokens"] = [3, 5]
                parts[Unit.of(behavior=behavior, finetune=side, multiplier=m)] = rows
    section = section_of("finetuned_text", parts, CONFIG)
    assert section.found == [
        "z: sentiment of the text taught the positive letters +0.10, steered +0.00 at -1 and +0.20 at +1; taught the "
        "negative letters -0.10, steered -0.20 at -1 and +0.00 at +1.",
        "a: sentiment of the text taught the positive letters +0.15, steered +0.05 at -1 and +0.25 at +1; taught the "
        "negative letters -0.05, steered -0.15 at -1 and +0.05 at +1.",
    ]
    assert "the original model's layer-2 vector" in section.text
    assert [name for name, _ in section.texts] == ["z: q0", "a: q0"]
    assert section.texts[1][1] == [
        (f"taught {side}, {m:+g}", f"{side}{m:g}") for side in ("positive", "negative") for m in finetuning.MULTIPLIERS
    ]
    (table,) = tables_of(section).values()
    assert table["n"].tolist() == [2] * 12
    assert table["n_tokens"].tolist() == [4.0] * 12
