"""Cosines are the cosines, wherever they are drawn from; probes part what is parted and nothing else."""

import numpy as np
import pytest
import torch

from caa_lens.interpretation.pair_geometry import emergence_layer, held_out_accuracy
from caa_lens.interpretation.vector_cosines import cosines
from caa_lens.provenance import Provenance
from caa_lens.vectors.steering_vectors import SteeringVectors

LAYERS = (2, 3, 7, 20)  # ids that are not list positions


def made_up(seed, *, layers=LAYERS, d_model=16, behavior="b", model="m", dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return SteeringVectors(
        directions=(torch.randn(len(layers), d_model, generator=generator) * (1 + seed)).to(dtype),
        layers=tuple(layers),
        provenance=Provenance(model=model, behavior=behavior, expression=behavior),
    )


def numpy_cosines(a, b):
    a, b = a.directions.double().numpy(), b.directions.double().numpy()
    return np.array([[x @ y / np.sqrt((x @ x) * (y @ y)) for y in b] for x in a])


def test_a_cosine_map_is_the_cosine_of_every_layer_with_every_layer():
    vectors, other = made_up(1), made_up(2, layers=(3, 20, 21))
    table = cosines(vectors, other).summary()
    assert list(table.index) == [2, 3, 7, 20]
    assert list(table.columns) == [3, 20, 21]
    np.testing.assert_allclose(table.to_numpy(), numpy_cosines(vectors, other), atol=1e-12)
    assert table.loc[7, 20] == pytest.approx(vectors[7].cosine(other[20]), abs=1e-6)


def test_a_map_of_a_set_with_itself_is_symmetric_with_a_unit_diagonal():
    table = cosines(made_up(3)).summary().to_numpy()
    np.testing.assert_allclose(table, table.T, atol=1e-12)
    np.testing.assert_allclose(np.diag(table), 1, atol=1e-12)
    assert np.abs(table).max() <= 1


def test_swapping_the_arguments_transposes_the_map():
    a, b = made_up(1), made_up(2, layers=(3, 20, 21))
    np.testing.assert_allclose(cosines(a, b).summary().to_numpy(), cosines(b, a).summary().to_numpy().T, atol=1e-12)


def test_rescaling_a_layer_changes_no_cosine_and_negating_it_turns_the_sign():
    a, b = made_up(1), made_up(2)
    scaled = SteeringVectors.from_vectors([a[2] * 5, -a[3], a[7], a[20] / 3])
    expected = numpy_cosines(a, b) * np.array([1, -1, 1, 1])[:, None]
    np.testing.assert_allclose(cosines(scaled, b).summary().to_numpy(), expected, atol=1e-6)


def test_half_precision_vectors_are_compared_in_double_precision():
    vectors = made_up(1, dtype=torch.bfloat16)
    np.testing.assert_allclose(cosines(vectors).summary().to_numpy(), numpy_cosines(vectors, vectors), atol=1e-12)


def test_a_subset_of_the_layers_keeps_their_ids_and_values():
    vectors = made_up(4)
    whole, part = cosines(vectors).summary(), cosines(vectors.at([3, 20])).summary()
    assert list(part.index) == list(part.columns) == [3, 20]
    np.testing.assert_allclose(part.to_numpy(), whole.loc[[3, 20], [3, 20]].to_numpy(), atol=1e-12)


def test_behaviors_are_compared_at_the_layer_asked_for_in_the_order_given():
    sets = {"z": made_up(1), "a": made_up(2, layers=(3, 7)), "m": made_up(3)}
    result = cosines(sets, layer=7)
    assert list(result.frame.columns) == ["behavior", "other_behavior", "layer", "cosine"]
    table = result.summary()
    assert list(table.index) == list(table.columns) == ["z", "a", "m"]
    assert table.loc["z", "a"] == pytest.approx(sets["z"][7].cosine(sets["a"][7]), abs=1e-6)
    np.testing.assert_allclose(table.to_numpy(), table.to_numpy().T, atol=1e-12)
    np.testing.assert_allclose(np.diag(table), 1, atol=1e-12)


def test_models_are_compared_at_the_layers_that_both_have():
    a, b = made_up(1, model="base"), made_up(2, layers=(0, 3, 20, 21), model="chat")
    result = cosines(a, b, same_layer=True)
    assert list(result.frame["layer"]) == [3, 20]
    expected = [a[3].cosine(b[3]), a[20].cosine(b[20])]
    np.testing.assert_allclose(result.frame["cosine"], expected, atol=1e-6)
    np.testing.assert_allclose(cosines(b, a, same_layer=True).frame["cosine"], expected, atol=1e-6)
    assert "base" in repr(result)
    assert "chat" in repr(result)


def test_one_in_twenty_random_directions_passes_the_chance_band():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.nn.functional.normalize(torch.randn(2, 20_000, 64, generator=generator), dim=-1)
    band = cosines(made_up(1, d_model=64), made_up(2, d_model=64), same_layer=True).by_chance
    assert float(((a * b).sum(-1).abs() > band).float().mean()) == pytest.approx(0.05, abs=0.01)


def test_inputs_are_not_changed():
    vectors = made_up(1)
    before = vectors.directions.clone()
    cosines(vectors)
    cosines({"a": vectors}, layer=3)
    assert torch.equal(vectors.directions, before)


def test_vectors_of_different_width_are_refused():
    narrow, wide = made_up(1, model="small"), made_up(2, d_model=32, model="large")
    message = "b of small has d_model=16, b of large has d_model=32"
    for compare in (
        lambda: cosines(narrow, wide),
        lambda: cosines(narrow, wide, same_layer=True),
        lambda: cosines({"a": narrow, "b": wide}, layer=3),
    ):
        with pytest.raises(ValueError, match=message):
            compare()


def test_what_cannot_be_compared_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="no layer in common: the sets have layers 2, 3, 7, 20 and 4, 5"):
        cosines(made_up(1), made_up(2, layers=(4, 5)), same_layer=True)
    with pytest.raises(ValueError, match="'a' has no vector for layer 5, but for 2, 3, 7, 20"):
        cosines({"a": made_up(1)}, layer=5)
    with pytest.raises(ValueError, match="needs at least one set"):
        cosines({}, layer=5)
    zero = SteeringVectors(directions=torch.zeros(1, 4), layers=(9,))
    with pytest.raises(ValueError, match="at layer 9 is zero"):
        cosines(zero)


def test_arguments_that_do_not_go_together_are_refused_with_the_remedy():
    vectors = made_up(1)
    with pytest.raises(ValueError, match=r"compared at one layer: give it, as in layer=14"):
        cosines({"a": vectors})
    for more in ({"other": vectors}, {"same_layer": True}):
        with pytest.raises(ValueError, match="leave out other and same_layer"):
            cosines({"a": vectors}, layer=3, **more)
    with pytest.raises(
        ValueError, match=r"got layer=3 for .*: it is for sets by the behavior's name, \{name: vectors\}"
    ):
        cosines(vectors, layer=3)
    with pytest.raises(ValueError, match="same_layer=True compares two sets: give the other one"):
        cosines(vectors, same_layer=True)


def test_a_summary_is_a_matrix_or_of_the_same_layer_a_column():
    a, b = made_up(1), made_up(2)
    assert cosines(a, b).summary().shape == (4, 4)
    column = cosines(a, b, same_layer=True).summary()
    assert list(column.columns) == ["cosine"]
    assert list(column.index) == list(LAYERS)
    np.testing.assert_allclose(column["cosine"], np.diag(cosines(a, b).summary()), atol=1e-12)


def test_figures_show_the_numbers_under_their_layers_and_frame_the_diagonal():
    vectors, other = made_up(1), made_up(2, layers=(3, 20, 21), behavior="c")
    figure = cosines(vectors, other).plot()
    cells = figure.data[0]
    assert list(cells.y) == ["2", "3", "7", "20"]
    assert list(cells.x) == ["3", "20", "21"]
    assert cells.z[2][1] == pytest.approx(vectors[7].cosine(other[20]), abs=1e-6)
    assert [(s.x0, s.y0) for s in figure.layout.shapes] == [(-0.5, 0.5), (0.5, 2.5)]  # 3 with 3, 20 with 20
    assert len(cosines(vectors).plot().layout.shapes) == 4
    curve = cosines(vectors, other, same_layer=True).plot().data[0]
    assert list(curve.x) == [3, 20]


def test_names_from_data_are_escaped_in_figures():
    evil = "<script>alert('x')</script>"
    vectors = made_up(1, behavior=evil, model=evil)
    for result in (cosines(vectors), cosines({evil: vectors}, layer=3), cosines(vectors, vectors, same_layer=True)):
        assert "<script>alert" not in result.plot().to_html()
        assert "<script>" not in result.plot().to_json()
        assert "&lt;script&gt;alert('x')&lt;/script&gt;" in result.plot().layout.title.text


def test_a_probe_parts_planted_clusters_and_not_noise():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((100, 2, 12))
    planted = noise + 8 * np.array([1, -1])[:, None] * rng.standard_normal(12)
    assert held_out_accuracy(planted).mean() == 1
    # Four standard errors of 200 independent guesses.
    assert abs(held_out_accuracy(noise).mean() - 0.5) < 4 * np.sqrt(0.25 / 200)


def test_both_sides_of_a_pair_are_held_out_together():
    """Sides at +1 and -1 of an axis of their pair's own: who saw one side knows the other; who did not, nothing."""
    axes = np.eye(40)[:, None, :] * np.array([1.0, -1.0])[:, None]
    assert held_out_accuracy(axes).mean() == pytest.approx(0.5, abs=1e-9)


def test_accuracy_repeats_for_a_seed():
    points = np.random.default_rng(1).standard_normal((30, 2, 6))
    assert (held_out_accuracy(points, seed=3) == held_out_accuracy(points, seed=3)).all()


@pytest.mark.parametrize(
    ("accuracy", "chance", "layer"),
    [
        ([0.5, 0.5, 0.9, 1.0], 0.5, 7),
        ([0.5, 0.8, 0.6, 1.0], 0.5, 20),  # what does not stay does not count
        ([0.5, 0.8, 1.0, 0.5], 0.5, 3),  # late layers may forget
        ([1.0, 1.0, 1.0, 1.0], 0.5, 2),
        ([0.7, 0.7, 0.8, 0.9], 0.7, 7),  # half-way between chance and the best: 0.8
    ],
)
def test_emergence_is_the_layer_from_which_accuracy_stays_above_half_way(accuracy, chance, layer):
    assert emergence_layer(LAYERS, np.array(accuracy), chance) == layer
