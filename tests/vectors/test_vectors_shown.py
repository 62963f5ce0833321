"""What a set of vectors shows of itself: its layers' norms and neighbours, as numbers, as a table, as a figure."""

import math

import pytest
import torch

from caa_lens.provenance import Provenance
from caa_lens.vectors.steering_vectors import SteeringVectors


def made(rows, layers=(3, 4, 9)) -> SteeringVectors:
    about = Provenance(model="owner/tiny", behavior="<b>", expression="<b>", method="mean difference", n_pairs=7)
    return SteeringVectors(directions=torch.tensor(rows), layers=layers, provenance=about)


def test_each_layer_has_its_norm_and_its_cosine_with_the_one_before():
    vectors = made([[3.0, 4.0], [0.0, 2.0], [5.0, 0.0]])
    frame = vectors.by_layer()
    assert list(frame["layer"]) == [3, 4, 9]
    assert list(frame["norm"]) == pytest.approx([5, 2, 5])
    slow = [float(vectors[a].cosine(vectors[b].at_layer(a))) for a, b in ((3, 4), (4, 9))]
    assert math.isnan(frame["cosine_before"][0])
    assert list(frame["cosine_before"][1:]) == pytest.approx(slow)
    assert slow == pytest.approx([0.8, 0.0])


def test_beside_a_vector_of_zeros_there_is_no_cosine():
    frame = made([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]).by_layer()
    assert frame["cosine_before"].isna().tolist() == [True, True, False]


def test_in_jupyter_a_set_is_a_small_table_with_what_it_is_and_nothing_of_it_is_markup():
    shown = made([[3.0, 4.0], [0.0, 2.0], [5.0, 0.0]])._repr_html_()
    assert "&lt;b&gt;, tiny, mean difference, 7 pairs, d_model 2" in shown
    assert "<b>" not in shown
    assert shown.count("<tr>") == 4


def test_a_set_of_many_layers_scrolls():
    many = made(torch.ones(30, 2).tolist(), tuple(range(30)))._repr_html_()
    assert "overflow: auto" in many
    assert many.count("<tr>") == 31


def test_the_figure_has_both_numbers_of_every_layer():
    vectors = made([[3.0, 4.0], [0.0, 2.0], [5.0, 0.0]])
    norm, cosine = vectors.plot().data
    assert list(norm.y) == pytest.approx([5, 2, 5])
    assert list(cosine.y)[1:] == pytest.approx([0.8, 0.0])


def test_one_layer_and_gradients_are_shown_too():
    rows = torch.ones(1, 2, requires_grad=True)
    vectors = SteeringVectors(directions=rows, layers=(2,))
    assert vectors.by_layer()["norm"].tolist() == pytest.approx([math.sqrt(2)])
    assert vectors.plot().data
    assert "<table>" in vectors._repr_html_()
