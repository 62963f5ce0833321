"""Activations of pairs keep their order and their layers; what is computed of them is what a hand would compute."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.models import random_vectors
from torch.testing import assert_close

from caa_lens.contrast.sets import ContrastSet
from caa_lens.engine.activations import read_residuals
from caa_lens.engine.pair_reading import PairActivations, pair_activations
from caa_lens.interpretation.pair_geometry import pair_pca, pair_separability, vector_norms
from caa_lens.prompts.pair_prompts import encode_pairs
from caa_lens.prompts.prompt_formats import resolve_format
from caa_lens.provenance import Provenance
from caa_lens.vectors.extraction import extract
from caa_lens.vectors.steering_vectors import SteeringVectors

QUESTION = "Shall we?\n\nChoices:\n (A) Yes\n (B) No"
AB = ContrastSet.from_pairs(
    [("Well, " * n + QUESTION, *(("(A)", "(B)") if n % 2 else ("(B)", "(A)"))) for n in (1, 4, 2, 3)], name="ab"
)
COMPLETIONS = ContrastSet.from_pairs(
    [("How was it?", "It was lovely, really.", "Bad."), ("And the very long journey there?", "Fine.", "Dreadful!")],
    name="completions",
)


def made_up(values, *, layers=None, letters=None):
    values = torch.as_tensor(values, dtype=torch.float32)
    return PairActivations(
        values=values,
        norms=values.norm(dim=-1),
        layers=tuple(layers or range(values.shape[2])),
        letters=letters or (("", ""),) * len(values),
        provenance=Provenance(model="m", behavior="b", expression="b", n_pairs=len(values), token_position="letter"),
    )


def planted(shifts, *, n_pairs=40, d_model=10, layers=None, seed=0):
    """Noise whose sides are `shift` apart along a random direction, a layer each."""
    rng = np.random.default_rng(seed)
    direction = rng.standard_normal(d_model)
    direction /= np.linalg.norm(direction)
    noise = rng.standard_normal((n_pairs, 2, len(shifts), d_model))
    offsets = np.array([0.5, -0.5])[:, None, None] * np.array(shifts)[:, None] * direction
    return made_up(noise + offsets, layers=layers)


# ---- reading --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [AB, COMPLETIONS], ids=["letters", "completions"])
def test_activations_are_those_of_each_prompt_in_the_order_of_the_set(tiny_chat, pairs):
    activations = pair_activations(tiny_chat, pairs, layers=[4, 1], batch_size=3, progress=False)
    assert activations.layers == (1, 4)
    for pair, prompts in enumerate(encode_pairs(tiny_chat, pairs, resolve_format(tiny_chat, None))):
        for side, prompt in enumerate(prompts):
            alone = next(read_residuals(tiny_chat, [prompt], layers=[1, 4]))[0]
            assert_close(activations.values[pair, side], alone, atol=2e-5, rtol=1e-4)
            tokens = [
                next(read_residuals(tiny_chat, [replace(prompt, read=(i, i + 1))], layers=[1, 4]))[0].norm(dim=-1)
                for i in range(*prompt.read)
            ]
            assert_close(activations.norms[pair, side], torch.stack(tokens).mean(0), atol=1e-4, rtol=1e-4)


def test_their_mean_difference_is_the_extracted_vector(tiny_chat):
    activations = pair_activations(tiny_chat, AB, layers=[1, 4], progress=False)
    vectors = extract(tiny_chat, AB, layers=[1, 4], progress=False)
    for layer in (1, 4):
        sides = activations[layer].mean(0)
        assert_close(sides[0] - sides[1], vectors[layer].direction, atol=1e-5, rtol=1e-4)
    assert activations.provenance.dataset_hash == vectors.provenance.dataset_hash


def test_letters_are_those_of_the_answers(tiny_chat):
    ab = pair_activations(tiny_chat, AB, layers=[0], progress=False)
    assert ab.letters == (("A", "B"), ("B", "A"), ("B", "A"), ("A", "B"))
    assert pair_activations(tiny_chat, COMPLETIONS, layers=[0], progress=False).letters == (("", ""),) * 2


def test_reading_leaves_no_hooks(tiny_chat):
    pair_activations(tiny_chat, COMPLETIONS, progress=False)
    assert not any(point.fwd_hooks for point in tiny_chat.hook_dict.values())


def test_save_then_load_is_exact(tmp_path):
    activations = made_up(torch.randn(3, 2, 2, 5), layers=(3, 7), letters=(("A", "B"), ("B", "A"), ("A", "B")))
    path = activations.save(tmp_path / "a.safetensors")
    loaded = PairActivations.load(path)
    assert torch.equal(loaded.values, activations.values)
    assert torch.equal(loaded.norms, activations.norms)
    assert (loaded.layers, loaded.letters, loaded.provenance) == ((3, 7), activations.letters, activations.provenance)


def test_another_kind_of_file_is_refused(tmp_path, tiny):
    path = random_vectors(tiny).save(tmp_path / "vectors.safetensors")
    with pytest.raises(ValueError, match=r"was not written by PairActivations\.save"):
        PairActivations.load(path)
    path.write_bytes(b"not a tensor")
    with pytest.raises(ValueError, match=r"was not written by PairActivations\.save"):
        PairActivations.load(path)


def test_layers_are_asked_for_by_id():
    activations = made_up(torch.randn(3, 2, 2, 5), layers=(3, 7))
    assert torch.equal(activations[7], activations.values[:, :, 1])
    with pytest.raises(IndexError, match=r"no activations of layer 1: read were layers \[3, 7\]"):
        activations[1]


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"expected \(3, 2, 1\)"):
        made_up(torch.randn(3, 2, 2, 5), layers=(3,))


# ---- norms ----------------------------------------------------------------------------------------------------


def test_the_ratio_is_the_vectors_norm_over_the_mean_norm_of_both_sides():
    values = torch.zeros(2, 2, 2, 4)
    values[:, 0, 1, 0] = torch.tensor([3.0, 5.0])  # positive at layer 7: mean norm 4
    values[:, 1, 1, 1] = torch.tensor([1.0, 3.0])  # negative at layer 7: mean norm 2
    values[:, :, 0] = 100
    vectors = SteeringVectors(
        directions=torch.tensor([[9.0, 0, 0, 0], [0, 0.9, 1.2, 0], [7.0, 0, 0, 0]]), layers=(2, 7, 9)
    )
    result = vector_norms(vectors, made_up(values, layers=(3, 7)))
    assert list(result.frame["layer"]) == [7]  # the one that both have
    row = result.frame.iloc[0]
    assert row["vector"] == pytest.approx(1.5)
    assert (row["residual_positive"], row["residual_negative"], row["residual"]) == pytest.approx((4, 2, 3))
    assert row["ratio"] == pytest.approx(0.5)
    assert result.multiplier_for(7, 0.25) == pytest.approx(0.5)
    assert result.multiplier_for(7, 1) == pytest.approx(2)
    assert result.summary().loc[7, "multiplier for 10%"] == pytest.approx(0.2)


def test_a_multiplier_for_a_share_makes_a_step_of_that_share(tiny_chat):
    activations = pair_activations(tiny_chat, AB, layers=[1, 4], progress=False)
    vectors = random_vectors(tiny_chat, layers=[1, 3, 4], scale=3)
    result = vector_norms(vectors, activations)
    step = vectors[4] * result.multiplier_for(4, 0.3)
    assert step.norm == pytest.approx(0.3 * float(activations[4].norm(dim=-1).mean()), rel=1e-4)


def test_norms_that_cannot_be_compared_are_refused():
    activations = made_up(torch.randn(3, 2, 1, 4), layers=(5,))
    vectors = SteeringVectors(directions=torch.zeros(1, 4), layers=(5,))
    with pytest.raises(ValueError, match="layer 3 was not measured"):
        vector_norms(vectors, activations).multiplier_for(3, 0.1)
    with pytest.raises(ValueError, match="the vector of layer 5 is zero"):
        vector_norms(vectors, activations).multiplier_for(5, 0.1)
    with pytest.raises(ValueError, match="d_model=3, but the activations of m have d_model=4"):
        vector_norms(SteeringVectors(directions=torch.ones(1, 3), layers=(5,)), activations)
    with pytest.raises(ValueError, match="no layer in common"):
        vector_norms(SteeringVectors(directions=torch.ones(1, 4), layers=(6,)), activations)


# ---- principal components -------------------------------------------------------------------------------------


def test_components_are_those_of_a_singular_value_decomposition():
    activations = planted([0.0, 4.0], layers=(3, 9))
    frame = pair_pca(activations, layers=[9]).frame
    assert set(frame["layer"]) == {9}
    points = activations[9].double().flatten(0, 1)
    u, s, _ = torch.linalg.svd(points - points.mean(0), full_matrices=False)
    expected = (u * s)[:, :2].numpy()
    got = frame[["pc1", "pc2"]].to_numpy()
    np.testing.assert_allclose(got * np.sign((got * expected).sum(0)), expected, atol=1e-9)
    shares = (s**2 / (s**2).sum())[:2].tolist()
    assert frame[["explained_pc1", "explained_pc2"]].iloc[0].tolist() == pytest.approx(shares)


def test_the_positive_sides_mean_lies_on_the_positive_half_of_each_axis():
    for seed in range(4):
        frame = pair_pca(planted([1.0, 3.0], seed=seed)).frame
        means = frame[frame["side"] == "positive"].groupby("layer")[["pc1", "pc2"]].mean()
        assert (means > 0).all(axis=None)


def test_the_order_of_pairs_changes_no_coordinate():
    activations = planted([2.0])
    order = torch.randperm(len(activations), generator=torch.Generator().manual_seed(0))
    shuffled = made_up(activations.values[order])
    straight = pair_pca(activations).frame.set_index(["pair", "side"])[["pc1", "pc2"]]
    crooked = pair_pca(shuffled).frame
    crooked["pair"] = order.numpy()[crooked["pair"]]
    crooked = crooked.set_index(["pair", "side"])[["pc1", "pc2"]].loc[straight.index]
    np.testing.assert_allclose(crooked.to_numpy(), straight.to_numpy(), atol=1e-9)


def test_exchanging_the_sides_mirrors_the_picture():
    activations = planted([2.0])
    straight = pair_pca(activations).frame
    mirrored = pair_pca(made_up(activations.values.flip(1))).frame
    for side, other in (("positive", "negative"), ("negative", "positive")):
        np.testing.assert_allclose(
            straight[straight["side"] == side][["pc1", "pc2"]],
            -mirrored[mirrored["side"] == other][["pc1", "pc2"]],
            atol=1e-9,
        )


def test_rows_know_their_pair_side_and_letter():
    activations = made_up(torch.randn(3, 2, 1, 5), layers=(7,), letters=(("A", "B"), ("B", "A"), ("A", "C")))
    frame = pair_pca(activations).frame
    assert list(frame["letter"]) == ["A", "B", "B", "A", "A", "C"]
    assert list(frame["side"]) == ["positive", "negative"] * 3
    assert list(frame["pair"]) == [0, 0, 1, 1, 2, 2]


def test_one_pair_has_no_two_components():
    with pytest.raises(ValueError, match="at least two pairs, got 1"):
        pair_pca(made_up(torch.randn(1, 2, 1, 5)))


# ---- separability ---------------------------------------------------------------------------------------------


def test_emergence_is_found_where_it_was_planted():
    activations = planted([0.0, 0.0, 8.0, 9.0, 8.0], layers=(1, 2, 5, 11, 12))
    result = pair_separability(activations, progress=False)
    frame = result.frame.set_index("layer")
    assert list(frame.index) == [1, 2, 5, 11, 12]
    assert result.emergence == 5
    assert (frame.loc[[5, 11, 12], "accuracy"] > 0.98).all()
    assert (abs(frame.loc[[1, 2], "accuracy"] - 0.5) < 0.22).all()  # four standard errors of 80 guesses
    assert (frame["low"] <= frame["accuracy"]).all()
    assert (frame["accuracy"] <= frame["high"]).all()
    assert frame.loc[11, "silhouette"] > 0.4 > 0.1 > frame.loc[1, "silhouette"]


def test_noise_has_no_emergence():
    for seed in range(3):
        result = pair_separability(planted([0.0] * 4, seed=seed), progress=False)
        assert result.emergence is None
        assert "emerges at no layer" in repr(result)


def test_the_explained_share_is_the_between_sides_variance():
    points = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]], [[1.0, 2.0], [-1.0, 2.0]]])[:, :, None]  # [pair side layer d]
    result = pair_separability(made_up(points), folds=2, progress=False)
    assert result.frame["explained"].item() == pytest.approx(0.5)  # 1 along each of two axes
    many = planted([0.0], n_pairs=200)
    assert pair_separability(many, progress=False).frame["explained"].item() == pytest.approx(1 / 400, rel=1)


def test_a_letter_alone_is_no_behavior():
    """All positives are (A): whatever parts the sides may be the letter."""
    activations = replace(planted([9.0]), letters=(("A", "B"),) * 40)
    result = pair_separability(activations, progress=False)
    assert result.chance == 1
    assert result.emergence is None
    even = replace(activations, letters=(("A", "B"), ("B", "A")) * 20)
    assert pair_separability(even, progress=False).chance == 0.5


def test_layers_in_any_order_give_the_same_numbers():
    activations = planted([0.0, 3.0, 5.0], layers=(2, 4, 8))
    whole = pair_separability(activations, progress=False).frame.set_index("layer")
    part = pair_separability(activations, layers=[8, 4], progress=False).frame.set_index("layer")
    assert list(part.index) == [4, 8]
    columns = ["accuracy", "explained", "silhouette"]
    np.testing.assert_allclose(part[columns], whole.loc[[4, 8], columns])


def test_more_folds_than_pairs_are_refused():
    with pytest.raises(ValueError, match="got 5 folds for 3 pairs, expected 2 to 3"):
        pair_separability(planted([1.0], n_pairs=3), progress=False)


# ---- pictures -------------------------------------------------------------------------------------------------


def test_figures_show_the_numbers_of_the_frames():
    activations = replace(planted([0.0, 8.0], layers=(3, 9)), letters=(("A", "B"), ("B", "A")) * 20)
    components = pair_pca(activations)
    figure = components.plot()
    assert [annotation.text for annotation in figure.layout.annotations] == ["layer 3", "layer 9"]
    assert {trace.name for trace in figure.data} == {f"{s} ({x})" for s in ("positive", "negative") for x in "AB"}
    last = [trace for trace in figure.data if trace.name == "positive (B)"][-1]
    rows = components.frame.query("layer == 9 and side == 'positive' and letter == 'B'")
    assert list(last.x) == list(rows["pc1"])
    assert list(last.customdata) == list(rows["pair"])

    parted = pair_separability(activations, progress=False)
    figure = parted.plot()
    accuracy = next(trace for trace in figure.data if trace.name == "held-out accuracy")
    assert (list(accuracy.x), list(accuracy.y)) == ([3, 9], list(parted.frame["accuracy"]))
    assert any(annotation.text == "emerges at layer 9" for annotation in figure.layout.annotations)

    vectors = SteeringVectors(directions=torch.ones(2, 10), layers=(3, 9))
    sizes = vector_norms(vectors, activations)
    ratio = sizes.plot().data[-1]
    assert (list(ratio.x), list(ratio.y)) == ([3, 9], list(sizes.frame["ratio"]))


def test_names_from_data_are_escaped_in_figures():
    activations = planted([0.0, 8.0], layers=(3, 9))
    evil = Provenance(model="<script>alert(1)", behavior="<b>", token_position="<i>")
    activations = replace(activations, provenance=evil, letters=(("<a>", "B"),) * 40)
    vectors = SteeringVectors(directions=torch.ones(2, 10), layers=(3, 9), provenance=evil)
    for result in (
        pair_pca(activations),
        pair_separability(activations, progress=False),
        vector_norms(vectors, activations),
    ):
        json = result.plot().to_json()
        assert not any(tag in json for tag in ("<script>", "<b>", "<i>", "<a>"))
        assert "<script>alert(1)" not in result.plot().to_html()


# ---- the real model -------------------------------------------------------------------------------------------


def test_sentiment_parts_in_the_real_model(demo_model):
    pairs = ContrastSet.load("sentiment").sample(12, seed=0)
    activations = pair_activations(demo_model, pairs, layers=[3, 15, 21], progress=False)
    result = pair_separability(activations, folds=4, progress=False)
    assert result.frame["accuracy"].min() > 0.8  # its words part from the first layers on
    assert result.emergence == 3
    sizes = vector_norms(extract(demo_model, pairs, layers=[15, 21], progress=False), activations)
    assert list(sizes.frame["layer"]) == [15, 21]
    assert sizes.frame["ratio"].between(0.05, 0.5).all()
    frame = pair_pca(activations, layers=[15]).frame
    side = frame.groupby("side")[["pc1", "pc2"]].mean().diff().abs().max(axis=None)
    assert side > 0.2 * sizes.frame["vector"].iloc[0]
