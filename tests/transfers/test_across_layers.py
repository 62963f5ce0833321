"""Transfer across layers: laws, and the sweep as its diagonal."""

import numpy as np
import pandas as pd
import pytest
from helpers.models import random_vectors

from caa_lens.contrast.sets import ContrastSet
from caa_lens.engine.pair_reading import pair_activations
from caa_lens.measures.answers import score_answers
from caa_lens.measures.intervals import bootstrap_interval
from caa_lens.measures.sweeps import sweep
from caa_lens.provenance import Provenance
from caa_lens.transfers import across_layers
from caa_lens.transfers.across_layers import LayerTransfer, transfer_layers

PAIRS = ContrastSet.from_pairs(
    [
        (f"Is number {n} good?\n\nChoices:\n (A) Yes\n (B) No", *(("(A)", "(B)") if n % 2 else ("(B)", "(A)")))
        for n in range(6)
    ],
    name="numbers",
)


def made_up(matrix: np.ndarray) -> LayerTransfer:
    """A result with the given effects, equal for two questions."""
    n = len(matrix)
    rows = [
        {
            "behavior": "b",
            "source": i,
            "target": j,
            "norm": 1.0,
            "question": q,
            "score": 0.0,
            "effect": matrix[i, j],
            "cosine": 1 - abs(i - j) / n,
        }
        for i in range(n)
        for j in range(n)
        for q in (0, 1)
    ]
    return LayerTransfer(
        frame=pd.DataFrame(rows),
        provenance={"vectors": Provenance(behavior="b")},
        metric="margin",
        unsteered=0.0,
    )


@pytest.mark.parametrize("multiplier", [1.0, -2.0])
def test_the_diagonal_is_the_sweep(tiny_chat, multiplier):
    vectors = random_vectors(tiny_chat, layers=(0, 1, 3, 4))
    result = transfer_layers(tiny_chat, PAIRS, vectors, multiplier=multiplier, progress=False)
    swept = sweep(tiny_chat, PAIRS, vectors, multipliers=[0, multiplier], progress=False).frame
    for layer in vectors.layers:
        of_layer = swept[swept["layer"] == layer].pivot(index="question", columns="multiplier", values="p_matching")
        cell = result.frame.query("source == @layer and target == @layer").sort_values("question")
        np.testing.assert_allclose(cell["score"], of_layer[multiplier], atol=2e-6)
        np.testing.assert_allclose(cell["effect"], (of_layer[multiplier] - of_layer[0.0]) / multiplier, atol=4e-6)


def test_every_cell_is_its_sources_vector_at_its_target(tiny_chat):
    vectors = random_vectors(tiny_chat, layers=(1, 3))
    result = transfer_layers(tiny_chat, PAIRS, vectors, targets=[0, 3, 4], progress=False)
    assert result.table().shape == (2, 3)
    for source in (1, 3):
        for target in (0, 3, 4):
            moved = type(vectors).from_vectors([vectors[source].at_layer(target)])
            expected = sweep(tiny_chat, PAIRS, moved, multipliers=[1], progress=False).frame["p_matching"]
            cell = result.frame.query("source == @source and target == @target").sort_values("question")["score"]
            np.testing.assert_allclose(cell, expected, atol=2e-6)


def test_in_pieces_or_at_once_and_in_any_order_the_matrix_is_the_same(tiny_chat):
    vectors = random_vectors(tiny_chat)
    whole = transfer_layers(tiny_chat, PAIRS, vectors, progress=False).table()
    pieces = transfer_layers(tiny_chat, PAIRS, vectors, max_tokens=17, progress=False).table()
    turned = transfer_layers(tiny_chat, PAIRS[::-1], vectors, progress=False).table()
    np.testing.assert_allclose(pieces, whole, atol=2e-5)
    np.testing.assert_allclose(turned, whole, atol=2e-5)


def test_vectors_can_be_given_the_targets_own_size(tiny_chat):
    vectors = random_vectors(tiny_chat)
    result = transfer_layers(tiny_chat, PAIRS, vectors, size="target", progress=False)
    moved = vectors[1].normalized(to=vectors[4].norm).at_layer(4)
    expected = sweep(tiny_chat, PAIRS, type(vectors).from_vectors([moved]), multipliers=[1], progress=False).frame
    cell = result.frame.query("source == 1 and target == 4").sort_values("question")["score"]
    np.testing.assert_allclose(cell, expected["p_matching"], atol=2e-6)
    assert result.settings["size"] == "target"


def test_the_best_target_and_the_reach_are_read_off_the_matrix():
    matrix = np.array([[1.0, 2.0, 0.4, 0.1], [0.9, 1.0, 0.6, 0.5], [0.0, 0.0, 1.0, 0.9], [0.0, 0.0, 0.0, -1.0]])
    result = made_up(matrix)
    best = result.best_targets().set_index("source")
    assert list(best["target"]) == [1, 1, 2, 0]
    assert list(best["own_effect"]) == [1.0, 1.0, 1.0, -1.0]
    reach = result.reach().set_index("source")
    assert reach.loc[0, "up"] == 2
    assert np.isnan(reach.loc[0, "down"])
    assert reach.loc[1, "up"] == 2
    assert np.isnan(reach.loc[1, "down"])
    assert reach.loc[2, "down"] == 1
    assert reach.loc[3].isna().all()  # a vector that works against itself has no reach


def test_cosine_predicts_an_effect_that_falls_with_distance():
    distance = abs(np.subtract.outer(np.arange(5), np.arange(5)))
    assert made_up(2.0 - distance).cosine_correlation() == pytest.approx(1.0)
    assert made_up(2.0 + distance).cosine_correlation() == pytest.approx(-1.0)


def test_figures_show_the_matrix_with_own_layers_framed():
    matrix = np.arange(9.0).reshape(3, 3)
    result = made_up(matrix)
    figure = result.plot()
    np.testing.assert_allclose(figure.data[0].z, matrix)
    assert len(figure.layout.shapes) == 3
    assert len(result.plot_cosine().data[0].x) == 6


@pytest.mark.parametrize("size", ["keep", "target", 0.1])
@pytest.mark.parametrize("per", ["multiplier", "norm"])
def test_multiplier_0_gives_zero_everywhere(tiny_chat, size, per):
    result = transfer_layers(
        tiny_chat, PAIRS, random_vectors(tiny_chat), multiplier=0, size=size, per=per, progress=False
    )
    assert len(result.frame) == 5 * 5 * len(PAIRS)
    assert (result.frame["effect"] == 0).all()


def test_a_share_of_the_residual_norm_is_the_same_everywhere_at_a_target(tiny_chat):
    vectors = random_vectors(tiny_chat)
    result = transfer_layers(tiny_chat, PAIRS, vectors, size=0.25, progress=False)
    norms = result.frame.groupby(["source", "target"])["norm"].first().unstack()
    read = pair_activations(tiny_chat, PAIRS, progress=False)
    for target in vectors.layers:
        expected = 0.25 * read[target].norm(dim=-1).mean().item()
        np.testing.assert_allclose(norms[target], expected, rtol=1e-5)


def test_effects_per_norm_are_effects_over_the_added_norm(tiny_chat):
    vectors = random_vectors(tiny_chat)
    plain = transfer_layers(tiny_chat, PAIRS, vectors, multiplier=2, progress=False).frame
    per_norm = transfer_layers(tiny_chat, PAIRS, vectors, multiplier=2, per="norm", progress=False).frame
    norm = plain["source"].map({vector.layer: vector.norm for vector in vectors})
    np.testing.assert_allclose(per_norm["norm"], norm, rtol=1e-6)
    np.testing.assert_allclose(per_norm["effect"], plain["effect"] / norm, rtol=1e-6)


def test_the_margin_of_letters_is_their_log_odds(tiny_chat):
    vectors = random_vectors(tiny_chat, layers=(1, 3))
    p = transfer_layers(tiny_chat, PAIRS, vectors, progress=False)
    margin = transfer_layers(tiny_chat, PAIRS, vectors, measure="margin", progress=False)
    np.testing.assert_allclose(margin.frame["score"], np.log(p.frame["score"] / (1 - p.frame["score"])), atol=1e-5)
    assert (p.metric, margin.metric) == ("p_matching", "margin")


def test_decay_is_the_mean_along_the_diagonals():
    matrix = np.array([[1.0, 2.0, 0.4], [0.9, 1.0, 0.6], [0.0, 0.3, 1.0]])
    decay = made_up(matrix).decay().set_index("distance")
    for distance in range(-2, 3):
        assert decay.loc[distance, "mean"] == pytest.approx(np.diagonal(matrix, distance).mean())
        assert decay.loc[distance, "n_sources"] == 3 - abs(distance)
    figure = made_up(matrix).plot_decay()
    assert [trace.name for trace in figure.data if trace.showlegend is None] == ["mean of all source layers"]
    np.testing.assert_allclose(figure.data[-1].y, decay["mean"])


def test_small_matrices_have_their_numbers_written_in():
    assert made_up(np.ones((3, 3))).plot().data[0].texttemplate == "%{z:.2f}"
    assert made_up(np.ones((13, 13))).plot().data[0].texttemplate is None


def test_bad_requests_are_refused(tiny_chat):
    vectors = random_vectors(tiny_chat, layers=(1, 3))
    with pytest.raises(ValueError, match="unknown size 'half': expected one of keep, target, or a share"):
        transfer_layers(tiny_chat, PAIRS, vectors, size="half")
    with pytest.raises(ValueError, match=r"unknown size -0\.1"):
        transfer_layers(tiny_chat, PAIRS, vectors, size=-0.1)
    with pytest.raises(ValueError, match="per 'layer' are not understood"):
        transfer_layers(tiny_chat, PAIRS, vectors, per="layer")
    with pytest.raises(ValueError, match="measure 'accuracy' is not to be had"):
        transfer_layers(tiny_chat, PAIRS, vectors, measure="accuracy", progress=False)
    with pytest.raises(ValueError, match="layer 9 is out of range"):
        transfer_layers(tiny_chat, PAIRS, vectors, targets=[9])
    with pytest.raises(ValueError, match="needs a vector of layer 2, whose norm is taken"):
        transfer_layers(tiny_chat, PAIRS, vectors, targets=[2], size="target")


def test_prompt_format_and_system_prompt_reach_the_scores_and_the_residual_norm(tiny_chat):
    vectors = random_vectors(tiny_chat, layers=(1, 3))
    how = {"prompt_format": "llama2-base", "system": "Be brief."}
    result = transfer_layers(tiny_chat, PAIRS, vectors, size=0.5, **how, progress=False)
    read = pair_activations(tiny_chat, PAIRS, layers=[3], **how, progress=False)
    norm = 0.5 * read.norms.mean().item()
    cell = result.frame.query("source == 1 and target == 3").sort_values("question")
    assert cell["norm"].to_numpy() == pytest.approx(norm, rel=1e-5)
    moved = type(vectors).from_vectors([vectors[1].normalized(to=norm).at_layer(3)])
    expected = sweep(tiny_chat, PAIRS, moved, multipliers=[0, 1], **how, progress=False)
    scores = expected.frame.query("multiplier == 1")["p_matching"]
    np.testing.assert_allclose(cell["score"], scores, atol=2e-6)
    assert result.unsteered == pytest.approx(expected.unsteered, abs=2e-6)
    swept = {name: said for name, said in expected.settings.items() if name not in ("operator", "positions")}
    assert result.settings == {**swept, "multiplier": "1", "size": "0.5", "per": "multiplier"}
    assert (result.metric, result.provenance) == ("p_matching", {"vectors": vectors.provenance})
    assert set(result.frame["behavior"]) == {"random"}


def test_the_summary_has_each_cells_interval_and_cosine(tiny_chat):
    vectors = random_vectors(tiny_chat, layers=(0, 2))
    result = transfer_layers(tiny_chat, PAIRS, vectors, targets=[2, 0, 1], progress=False)
    summary = result.summary()
    assert list(summary) == ["source", "target", "mean", "low", "high", "cosine"]
    assert summary[["source", "target"]].to_numpy().tolist() == [[s, t] for s in (0, 2) for t in (0, 1, 2)]
    cell = result.frame.query("source == 2 and target == 0").sort_values("question")["effect"].to_numpy()
    (low,), (high,) = bootstrap_interval(cell[:, None])
    row = summary.query("source == 2 and target == 0").iloc[0]
    assert row[["mean", "low", "high"]].tolist() == pytest.approx([cell.mean(), low, high])
    assert row["cosine"] == pytest.approx(vectors[2].cosine(vectors[0]), abs=1e-6)
    assert np.isnan(summary.query("target == 1")["cosine"]).all()  # there is no vector of layer 1
    few = result.summary(n_resamples=10, seed=1)
    assert not np.allclose(few["low"], summary["low"])


def test_decay_counts_sources_of_a_matrix_that_is_not_square(tiny_chat):
    result = transfer_layers(tiny_chat, PAIRS, random_vectors(tiny_chat, layers=(0, 2)), targets=[1, 2], progress=False)
    decay = result.decay().set_index("distance")
    assert decay["n_sources"].to_dict() == {-1: 1, 0: 1, 1: 1, 2: 1}
    best = result.best_targets().set_index("source")
    assert np.isnan(best.loc[0, "own_effect"])  # not added at its own layer
    assert result.reach()["source"].tolist() == [2]


def test_the_budget_reaches_the_scores(tiny_chat, monkeypatch):
    budgets = []

    def recorded(*given, max_tokens, **how):
        budgets.append(max_tokens)
        return score_answers(*given, max_tokens=max_tokens, **how)

    monkeypatch.setattr(across_layers, "score_answers", recorded)
    transfer_layers(tiny_chat, PAIRS, random_vectors(tiny_chat, layers=[2]), max_tokens=17, progress=False)
    assert budgets == [17]
