"""Arithmetic on vectors and sets obeys its laws, agrees with slow twins, and says how a result was made."""

import math
import operator
import re
from inspect import unwrap
from itertools import combinations

import numpy as np
import pytest
import torch
from helpers.device import device
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from caa_lens.provenance import Provenance
from caa_lens.vectors.algebra.combinations import mean_vector
from caa_lens.vectors.algebra.expression_parser import evaluate
from caa_lens.vectors.steering_vectors import SteeringVector, SteeringVectors

D_MODEL = 6
LAYERS = (3, 20)  # neither positions nor a run, so that an index cannot pass for a block
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]

components = st.floats(-100, 100, width=32, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-3)
rows = st.lists(components, min_size=D_MODEL, max_size=D_MODEL)
sets = st.lists(rows, min_size=len(LAYERS), max_size=len(LAYERS)).map(torch.tensor)
nonzero_sets = sets.filter(lambda directions: bool(directions.any(-1).all()))
scales = st.floats(-10, 10, width=32, allow_subnormal=False)
shares = st.floats(0, 1)


def law(*strategies, examples=30):
    """A law of sets of vectors: `sets` draws their directions."""

    def decorate(test):
        @settings(deadline=None, derandomize=True, max_examples=examples)
        @given(st.tuples(*strategies))
        def run(drawn):
            test(*(make("v", each) if isinstance(each, torch.Tensor) else each for each in drawn))

        return run

    return decorate


def make(name, directions, *, layers=LAYERS, model="m"):
    provenance = Provenance(model=model, behavior=name, expression=name)
    return SteeringVectors(directions=directions, layers=layers, provenance=provenance)


def abc(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {name: make(name, torch.randn(2, D_MODEL, generator=generator).to(dtype)) for name in "abc"}


def by_layer(series):
    """The numbers of a set's cosine, angle or dot product, in the order of its layers."""
    return torch.tensor(series.to_numpy())


def one(direction, *, layer=7, model="m", name="v"):
    return SteeringVector.from_direction(torch.tensor(direction), layer, behavior=name, model=model)


def assert_same(actual, expected, *, atol=1e-4, rtol=1e-5):
    torch.testing.assert_close(actual.directions, expected.directions, atol=atol, rtol=rtol)


def in_general_position(*vectors):
    """Far enough from parallel and opposite for the rounding to float32."""
    pairs = list(combinations(vectors, 2))
    return all(bool((v.angle(w) > 0.01).all() and (v.angle(w) < math.pi - 0.01).all()) for v, w in pairs)


# ---- every operation: on sets and vectors, in every dtype, written down and read back ---------------------------

EXPRESSIONS = [
    "a + b",
    "a - b",
    "a - (b - c)",
    "a + (b + c)",
    "a - b - c",
    "a + b - c",
    "2 * (a + b)",
    "2 * a + b",
    "0.5 * (2 * a)",
    "2 * a / 4",
    "2 * (a / 4)",
    "a / 4 / 3",
    "(a - b) / 4",
    "a / (-4)",
    "-a",
    "-(a + b)",
    "-(-a)",
    "-(2 * a)",
    "-a / 2",
    "a - (-b)",
    "a + (-b)",
    "-1.5 * a",
    "a - (-1.5 * b)",
    "0.3333333333333333 * a",
    "1e-05 * a",
    "a.onto(b)",
    "a.onto(b, c)",
    "(a + b).onto(a - b)",
    "-a.onto(b)",
    "(-a).onto(b)",
    "a.without(b)",
    "a.without(b, b - c)",
    "(a - b.onto(a)).normalized(to=1.5)",
    "a.scaled_to(0.1, of=12.5)",
    "a.lerp(b, 0.25)",
    "a.slerp(b, 0.25)",
    "a.rotated(b, 0.3)",
    "(a / 3).top_k(2)",
    "mean(a, b, c)",
    "mean(a, b, weights=[2, 0.5])",
    "mean(a, -b).onto(c) + c",
]


def computed(text, names):
    return eval(text, {"mean": mean_vector, **names})


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_a_derived_vector_prints_the_expression_that_made_it(text):
    derived = computed(text, abc())
    assert derived.provenance.expression == text
    assert text in repr(derived)
    of_one_layer = re.sub(r"\b[abc]\b", r"\g<0>[20]", text)
    assert computed(of_one_layer, abc()).provenance.expression == of_one_layer


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_a_set_does_layer_by_layer_what_its_vectors_do(text):
    derived = computed(text, abc())
    for layer in LAYERS:
        alone = computed(text, {name: vectors[layer] for name, vectors in abc().items()})
        torch.testing.assert_close(derived[layer].direction, alone.direction, rtol=1e-6, atol=1e-7)
    assert derived.layers == LAYERS


SINGLE = [
    "a + b",
    "a - b",
    "-a",
    "0.3 * a",
    "a / 3",
    "a.onto(b)",
    "a.onto(b, c)",
    "a.without(b)",
    "a.normalized(to=1.5)",
    "a.scaled_to(0.1, of=12.5)",
    "a.lerp(b, 0.3)",
    "a.slerp(b, 0.3)",
    "a.rotated(b, 0.3)",
    "a.top_k(2)",
    "a.onto_pca(points, 2)",
    "mean(a, b, weights=[2, 0.5])",
]


@pytest.mark.parametrize("text", SINGLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_result_is_the_float64_result_rounded_once_to_the_left_operands_dtype(text, dtype):
    names = abc(torch.float16)
    names["a"] = names["a"].to(dtype)
    points = {"points": torch.randn(7, 2, D_MODEL, generator=torch.Generator().manual_seed(1)).to(torch.float16)}
    exact = computed(text, {name: vectors.to(torch.float64) for name, vectors in names.items()} | points)
    result = computed(text, names | points)
    assert result.directions.dtype == dtype
    assert torch.equal(result.directions.double(), exact.directions.to(dtype).double())
    swapped = computed(text, {"a": names["b"], "b": names["a"], "c": names["c"], **points})
    assert swapped.directions.dtype == torch.float16


@pytest.mark.parametrize("text", [text for text in SINGLE if "points" not in text])
@pytest.mark.second_device
def test_a_result_lives_on_the_left_operands_device_and_is_the_same_everywhere(text):
    far = {name: vectors.to(device()) for name, vectors in abc(torch.bfloat16).items()}
    result, near = computed(text, far), computed(text, abc(torch.bfloat16))
    assert result.directions.device.type == device().type
    assert torch.equal(result.directions.cpu(), near.directions)
    mixed = computed(text, {**far, "a": abc(torch.bfloat16)["a"]})
    assert torch.equal(mixed.directions, near.directions)


def test_numbers_are_not_rounded_to_the_dtype():
    large = one([60000.0] * 4).to(torch.float16)  # whose norm is more than float16 can hold
    assert large.norm == 120000
    assert large @ large == 120000**2
    assert large.cosine(large) == pytest.approx(1, abs=1e-15)
    half = make("a", torch.full((2, 4), 60000.0, dtype=torch.float16))
    for numbers, expected in [
        (by_layer(half.norms), 120000),
        (by_layer(half @ half), 120000**2),
        (by_layer(half.cosine(-half)), -1),
    ]:
        torch.testing.assert_close(numbers, torch.full((2,), expected, dtype=torch.float64), rtol=1e-15, atol=0)


def test_what_does_not_fit_a_dtype_is_refused_rather_than_made_infinite_or_clamped():
    for dtype, value in [(torch.float16, 60000.0), (torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)]:
        with pytest.raises(ValueError, match=r"does not fit into float.*: use \.to\(torch\.float32\) first"):
            3 * one([value, value]).to(dtype)
        with pytest.raises(ValueError, match="does not fit into float"):
            one([3 * value, value]).to(dtype)
    # Norms of numbers whose squares leave float64 are right all the same.
    far = SteeringVector(direction=torch.tensor([3e200, 4e200], dtype=torch.float64), layer=3)
    assert far.norm == pytest.approx(5e200, rel=1e-15)
    assert far.onto(far).norm == pytest.approx(5e200, rel=1e-12)


@pytest.mark.parametrize("text", [*SINGLE[:-2], "mean(a, b)"])
def test_no_operation_changes_its_inputs_or_shares_memory_with_them(text):
    names = abc(torch.float64)
    kept = {name: vectors.directions.clone() for name, vectors in names.items()}
    computed(text, names).directions.zero_()
    for layer in LAYERS:
        computed(text, {name: vectors[layer] for name, vectors in names.items()}).direction.zero_()
    _ = names["a"] @ names["b"], names["a"].cosine(names["b"]), names["a"].angle(names["b"])
    moved = names["a"][3].at_layer(20)
    moved.direction.zero_()
    for name, vectors in names.items():
        assert torch.equal(vectors.directions, kept[name])
        assert vectors.provenance.expression == name


# Expressions at random, with whole numbers and others, read by Python and by the parser.
leaves = st.sampled_from(["a", "b", "c"])
factors = st.sampled_from(["2", "-1.5", "0.1", "1e-05"])


def larger(inner):
    binary = st.sampled_from(
        ["({} + {})", "({} - {})", "{}.onto({})", "{}.without({})", "{}.lerp({}, 0.25)", "mean({}, {})"]
    )
    return st.one_of(
        st.builds(str.format, binary, inner, inner),
        st.builds("({} * {})".format, factors, inner),
        st.builds("({} / {})".format, inner, factors),
        st.builds("(-{})".format, inner),
        st.builds("{}.top_k(3)".format, inner),
        st.builds("{}.normalized(to=0.75)".format, inner),
    )


@law(st.recursive(leaves, larger, max_leaves=12), examples=100)
def test_any_printed_expression_gives_the_very_same_vectors_when_it_is_computed_again(text):
    names = abc()
    try:
        derived = computed(text, names)
    except ValueError:  # projections on zero
        assume(False)
    printed = derived.provenance.expression
    assert torch.equal(computed(printed, names).directions, derived.directions)
    assert torch.equal(evaluate(printed, names).directions, derived.directions)
    assert len(printed) <= len(text) + 12  # parentheses only where needed, but around a negative operand


def test_an_expression_that_would_grow_without_end_is_cut_in_the_middle():
    v, w = abc()["a"], abc()["b"]
    for _ in range(40):  # each step uses the expression twice: a million million characters
        v = (v - v.onto(w)).normalized() + w
    assert len(v.provenance.expression) <= 2000
    assert " … " in v.provenance.expression
    assert (v - v.lerp(w, 0.5)).provenance.expression.count("(") > 0


# ---- linear -----------------------------------------------------------------------------------------------------


@law(sets, sets, sets)
def test_addition_does_not_care_about_order_or_grouping_and_subtraction_undoes_it(a, b, c):
    assert torch.equal((a + b).directions, (b + a).directions)
    assert_same((a + b) + c, a + (b + c))
    assert_same((a + b) - b, a)
    assert_same(a - b, a + (-b), atol=0, rtol=0)


@law(sets, sets, scales, scales)
def test_scaling_is_linear(a, b, s, t):
    assert_same(s * (a + b), s * a + s * b, atol=1e-3)
    assert_same((s + t) * a, s * a + t * a, atol=1e-3)
    assert_same(s * (t * a), (s * t) * a, atol=1e-3)
    assert torch.equal((s * a).directions, (a * s).directions)
    if abs(s) > 0.01:
        assert_same((a * s) / s, a)


@law(sets)
def test_negating_twice_is_exactly_the_vector_itself(a):
    negative = -a
    assert torch.equal((-negative).directions, a.directions)
    assert torch.equal(negative.directions, (-1.0 * a).directions)
    assert not bool((a + negative).directions.any())


@law(sets, sets, shares)
def test_linear_interpolation_goes_from_one_end_to_the_other(a, b, t):
    assert torch.equal(a.lerp(b, 0).directions, a.directions)
    assert torch.equal(a.lerp(b, 1).directions, b.directions)
    assert_same(a.lerp(b, t), a + t * (b - a))
    assert_same(a.lerp(b, t), b.lerp(a, 1 - t))
    assert_same(a.lerp(b, 2.0), 2.0 * b - a, atol=1e-3)  # beyond the end


def test_numpys_numbers_scale_like_pythons():
    a = abc()["a"]
    for two in (np.float64(2), np.float32(2), np.int64(2)):
        for vectors in (a, a[3]):
            assert torch.equal(unwrap(type(vectors).__mul__)(vectors, two)._rows, 2 * vectors._rows)
    assert isinstance(np.float64(2) * a, SteeringVectors)


# ---- lengths and angles -----------------------------------------------------------------------------------------


@law(rows, rows)
def test_dot_product_norm_and_cosine_agree_with_sums_by_hand(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    norm_a, norm_b = sum(x * x for x in a) ** 0.5, sum(y * y for y in b) ** 0.5
    first, second = one(a), one(b)
    assert first @ second == pytest.approx(dot, rel=1e-12, abs=1e-12 * norm_a * norm_b)
    assert first.norm == pytest.approx(norm_a, rel=1e-12)
    if norm_a and norm_b:
        assert first.cosine(second) == pytest.approx(dot / (norm_a * norm_b), abs=1e-12)
        assert math.cos(first.angle(second)) == pytest.approx(first.cosine(second), abs=1e-12)


def test_small_angles_are_exact_where_the_cosine_sees_nothing():
    a = one([1.0, 0.0])
    b = SteeringVector(direction=torch.tensor([1.0, 1e-12], dtype=torch.float64), layer=7)
    assert a.angle(b) == pytest.approx(1e-12, rel=1e-6)
    assert a.cosine(b) == 1.0
    assert a.angle(-a) == pytest.approx(math.pi, rel=1e-15)
    assert a.angle(a) == 0


@law(nonzero_sets, st.floats(0.125, 64))
def test_normalizing_sets_the_norm_and_keeps_the_direction(a, to):
    normalized = a.normalized(to=to)
    torch.testing.assert_close(by_layer(normalized.norms), torch.full((2,), to).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(by_layer(normalized.cosine(a)), torch.ones(2).double(), rtol=1e-12, atol=0)
    assert_same(normalized.normalized(to=a.norms), a)


def test_a_share_of_the_residual_norm_may_be_given_by_layer():
    a = abc()["a"]
    scaled = a.scaled_to(0.1, of=torch.tensor([20.0, 300.0], dtype=torch.bfloat16))
    torch.testing.assert_close(by_layer(scaled.norms), torch.tensor([2.0, 30.0]).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(by_layer(scaled.cosine(a)), torch.ones(2).double(), rtol=1e-12, atol=0)
    assert scaled.provenance.expression == "a.scaled_to(0.1, of=[20, 300])"
    assert_same(computed(scaled.provenance.expression, {"a": a}), scaled, atol=0, rtol=1e-6)
    assert torch.equal(a.scaled_to(0.1, of=20)[3].direction, a[3].scaled_to(0.1, of=20.0).direction)
    assert torch.equal(a.scaled_to(0.1, of=20).directions, a.normalized(to=2).directions)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (-1.0, "a norm must be finite and not negative, got -1.0"),
        (float("nan"), "must be finite"),
        (float("inf"), "must be finite"),
        ([1.0, 2.0, 3.0], r"one number, or one for each layer of a set, got shape \(3,\)"),
        (torch.ones(2, 1), r"got shape \(2, 1\)"),
    ],
)
def test_sizes_that_cannot_be_meant_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        abc()["a"].normalized(to=size)
    if isinstance(size, list):
        with pytest.raises(ValueError, match=r"got shape \(2,\)"):
            abc()["a"][3].normalized(to=[1.0, 2.0])


# ---- subspaces --------------------------------------------------------------------------------------------------


def least_squares(v, others):
    """The slow obvious projection: the combination of the others that lies nearest."""
    basis = np.stack([w.direction.double().numpy() for w in others], axis=1)
    return basis @ np.linalg.lstsq(basis, v.direction.double().numpy(), rcond=1e-6)[0]


@law(nonzero_sets, nonzero_sets, nonzero_sets, st.sampled_from([(), (1,), (2, -1.5)]))
def test_projection_on_several_is_the_nearest_combination_of_them(v, a, b, dependent):
    assume(in_general_position(a, b))
    others = [a, b, *(s * a + b for s in dependent)]  # combinations of the first two change nothing
    onto, rest = v.onto(*others), v.without(*others)
    for layer in LAYERS:
        expected = least_squares(v[layer], [a[layer], b[layer]])
        tolerance = 1e-4 * v[layer].norm
        np.testing.assert_allclose(onto[layer].direction.numpy(), expected, atol=tolerance, rtol=0)
        np.testing.assert_allclose((v - rest)[layer].direction.numpy(), expected, atol=tolerance, rtol=0)


@law(sets, nonzero_sets, nonzero_sets)
def test_projecting_twice_is_projecting_once_and_the_parts_add_up(v, a, b):
    for others in [(a,), (a, b)]:
        onto, rest = v.onto(*others), v.without(*others)
        assert_same(onto.onto(*others), onto)
        assert_same(rest.without(*others), rest)
        assert_same(onto + rest, v)
        largest = v.norms * 1e-6
        for w in others:
            assert bool(((rest @ w.normalized()).abs() <= largest).all())  # orthogonal after removal
        np.testing.assert_allclose(onto.norms**2 + rest.norms**2, v.norms**2, rtol=1e-5, atol=1e-6)


@law(sets, sets, nonzero_sets, nonzero_sets, scales)
def test_projection_is_linear_and_sees_only_the_subspace(v, w, a, b, s):
    assume(in_general_position(a, b))
    assert_same((v + s * w).onto(a, b), v.onto(a, b) + s * w.onto(a, b), atol=1e-2)
    assert_same(v.onto(a, b), v.onto(-3.0 * b, 1e-3 * a), atol=1e-3)
    assert_same(v.onto(a), v.without(v.without(a)) if bool((v.without(a).norms > 1e-3).all()) else v.onto(a), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_nothing_is_left_of_a_combination_but_exactly_zero(dtype):
    a, b, c = abc(dtype).values()
    assert not a.without(a).directions.any()
    assert not (2 * a + b).without(a, b).directions.any()  # but for rounding, which must not pass for a direction
    assert bool((c.without(a, b).norms > 0.1).all())
    # The rounded sum a + b adds no direction of its own, so a third one is not removed with it.
    torch.testing.assert_close(c.without(a, b, a + b).directions, c.without(a, b).directions)
    assert bool((c.without(a, b, a + b).norms > 0.1).all())


def test_a_vector_much_shorter_than_the_others_still_spans_its_direction():
    a, b, c = abc().values()
    assert_same(c.without(a, 1e-9 * b), c.without(a, b), atol=1e-5)


def test_a_small_remainder_is_orthogonal_as_measured_against_itself():
    a, b, _ = abc(torch.float64).values()
    rest = (a + 1e-10 * b).without(a)
    assert bool((rest.norms > 1e-11).all())
    assert bool((rest.cosine(a).abs() < 1e-12).all())


def test_more_vectors_than_components_leave_nothing():
    generator = torch.Generator().manual_seed(3)
    many = [one(torch.randn(4, generator=generator).tolist()) for _ in range(9)]
    assert not one([1.0, 2.0, 3.0, 4.0]).without(*many).direction.any()
    assert torch.equal(one([1.0, 2.0, 3.0, 4.0]).onto(*many).direction, torch.tensor([1.0, 2.0, 3.0, 4.0]))


@law(sets, st.integers(1, D_MODEL))
def test_the_largest_components_are_the_nearest_vector_with_so_many(v, k):
    kept = v.top_k(k)
    for layer in LAYERS:
        direction = v[layer].direction.double()
        chosen = [
            torch.zeros(D_MODEL).double().index_put_((torch.tensor(i),), direction[list(i)])
            for i in combinations(range(D_MODEL), k)
        ]
        nearest = min(float((direction - candidate).norm()) for candidate in chosen)
        assert (v - kept)[layer].norm == pytest.approx(nearest, abs=1e-5)
        assert int((kept[layer].direction != 0).sum()) <= k
    assert torch.equal(kept.top_k(k).directions, kept.directions)
    assert torch.equal(v.top_k(D_MODEL).directions, v.directions)


def test_of_equal_components_the_first_are_kept():
    assert one([1.0, -2.0, 2.0, -2.0]).top_k(2).direction.tolist() == [0, -2, 2, 0]


@pytest.mark.parametrize("k", [1, 2, D_MODEL])
def test_truncation_to_principal_components_agrees_with_scikit_learn(k):
    from sklearn.decomposition import PCA

    points = torch.randn(20, 2, D_MODEL, generator=torch.Generator().manual_seed(0)) + 5  # centring matters
    v = abc()["a"]
    truncated = v.onto_pca(points, k)
    for i, layer in enumerate(LAYERS):
        basis = PCA(n_components=k, svd_solver="full").fit(points[:, i].double().numpy()).components_
        expected = basis.T @ (basis @ v[layer].direction.double().numpy())
        np.testing.assert_allclose(truncated[layer].direction.numpy(), expected, atol=1e-5)
        alone = v[layer].onto_pca(points[:, i], k)
        torch.testing.assert_close(alone.direction, truncated[layer].direction, atol=1e-6, rtol=1e-6)
    assert_same(truncated.onto_pca(points, k), truncated)
    assert truncated.provenance.expression == f"a.onto_pca(points, {k})"


def test_components_that_points_do_not_have_are_refused():
    a, points = abc()["a"], torch.randn(3, 2, D_MODEL, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="3 points vary along 2 directions, got k=3: give more points or a smaller k"):
        a.onto_pca(points, 3)
    with pytest.raises(ValueError, match="4 points vary along 0 directions"):
        a.onto_pca(torch.full((4, 2, D_MODEL), 0.1), 1)
    with pytest.raises(ValueError, match=r"points of shape \(3, 1, 6\), expected \(points, 2, 6\)"):
        a.onto_pca(points[:, :1], 1)
    for k in (0, D_MODEL + 1):
        for truncate in (a.top_k, lambda k: a.onto_pca(points, k)):
            with pytest.raises(ValueError, match=f"k must be from 1 to d_model=6, got {k}"):
                truncate(k)


# ---- rotation ---------------------------------------------------------------------------------------------------


@law(nonzero_sets, nonzero_sets, st.floats(-7, 7))
def test_rotation_keeps_the_norm_stays_in_the_plane_and_turns_by_the_angle(v, w, by):
    assume(in_general_position(v, w))
    turned = v.rotated(w, by)
    np.testing.assert_allclose(turned.norms, v.norms, rtol=1e-5, atol=0)
    assert bool((turned.without(v, w).norms <= 1e-4 * v.norms).all())
    expected = math.acos(math.cos(by))  # angles between vectors are from 0 to pi
    torch.testing.assert_close(by_layer(turned.angle(v)), torch.full((2,), expected).double(), rtol=0, atol=1e-3)
    if abs(by) < 1e-3:
        assert_same(turned, v, atol=1e-2 * float(v.norms.max()))


@law(nonzero_sets, nonzero_sets)
def test_rotation_by_the_whole_angle_arrives_and_by_a_full_turn_returns(v, w):
    assume(in_general_position(v, w))
    for layer in LAYERS:
        arrived = v[layer].rotated(w[layer], v[layer].angle(w[layer]))
        assert arrived.angle(w[layer]) == pytest.approx(0, abs=1e-5)
    assert_same(v.rotated(w, 2 * math.pi), v, atol=1e-4)
    assert_same(v.rotated(w, math.pi), -v, atol=1e-4)
    assert torch.equal(v.rotated(w, 0).directions, v.directions)


@law(nonzero_sets, nonzero_sets, shares)
def test_spherical_interpolation_turns_and_grows_evenly(v, w, t):
    assume(in_general_position(v, w))
    between = v.slerp(w, t)
    np.testing.assert_allclose(between.norms, (1 - t) * v.norms + t * w.norms, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(by_layer(between.angle(v)), t * by_layer(v.angle(w)), rtol=0, atol=1e-5)
    torch.testing.assert_close(by_layer(between.angle(w)), (1 - t) * by_layer(v.angle(w)), rtol=0, atol=1e-5)
    assert_same(between, w.slerp(v, 1 - t), atol=1e-3)
    assert_same(v.slerp(w, 0), v, atol=1e-5)
    assert_same(v.slerp(w, 1), w, atol=1e-4)


@law(nonzero_sets, nonzero_sets, shares)
def test_spherical_interpolation_of_equal_norms_is_the_formula_with_sines(v, w, t):
    assume(in_general_position(v, w))
    v, w = v.normalized(), w.normalized()
    angle = by_layer(v.angle(w))[:, None]
    expected = (torch.sin((1 - t) * angle) * v.directions + torch.sin(t * angle) * w.directions) / torch.sin(angle)
    torch.testing.assert_close(v.slerp(w, t).directions.double(), expected, rtol=0, atol=1e-5)


def test_of_parallel_vectors_there_is_a_mean_but_no_plane_and_of_opposite_ones_neither():
    v = one([3.0, 4.0, 0.0])
    assert torch.equal(v.slerp(2 * v, 0.5).direction, 1.5 * v.direction)
    with pytest.raises(ValueError, match="are opposite: no arc between them is the shortest"):
        v.slerp(-2 * v, 0.5)
    for other in (2 * v, -v, v + 1e-9 * one([0.0, 0.0, 1.0])):
        with pytest.raises(ValueError, match="are parallel: they span no plane to rotate in"):
            v.rotated(other, 0.5)
        assert torch.equal(v.rotated(other, 0).direction, v.direction)
    for t in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"slerp needs t from 0 to 1, got {t}: turn further with \.rotated"):
            v.slerp(one([1.0, 0.0, 0.0]), t)


# ---- refusals ---------------------------------------------------------------------------------------------------

MEETINGS = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "project": lambda a, b: a.onto(b),
    "project on several": lambda a, b: a.onto(a, b),
    "remove": lambda a, b: a.without(b),
    "dot": lambda a, b: a @ b,
    "lerp": lambda a, b: a.lerp(b, 0.5),
    "slerp": lambda a, b: a.slerp(b, 0.5),
    "rotate": lambda a, b: a.rotated(b, 0.5),
    "mean": lambda a, b: mean_vector(a, b),
}


@pytest.mark.parametrize("meeting", MEETINGS)
def test_vectors_that_do_not_belong_together_are_refused_with_a_remedy(meeting):
    combine, here = MEETINGS[meeting], one([1.0, 2.0])
    with pytest.raises(ValueError, match=r"layer 7 and layer 9: move one on purpose with \.at_layer\(7\)"):
        combine(here, one([1.0, 3.0], layer=9))
    combine(here, one([1.0, 3.0], layer=9).at_layer(7))
    with pytest.raises(ValueError, match="of different models, m and n: their residual streams have different bases"):
        combine(here, one([1.0, 3.0], model="n"))
    with pytest.raises(ValueError, match="d_model=2 and d_model=3: both must come from models of the same width"):
        combine(here, one([1.0, 2.0, 3.0]))
    a = abc()["a"]
    with pytest.raises(ValueError, match=r"layers 3, 20 and layers 3-4: choose the same ones with \.at\(\[\.\.\.\]\)"):
        combine(a, make("b", torch.ones(2, D_MODEL), layers=(3, 4)))
    with pytest.raises(TypeError, match=r"expected SteeringVectors, got SteeringVector$"):
        combine(a, a[3])


def test_anything_but_vectors_is_refused():
    here = one([1.0, 2.0])
    for method in (SteeringVector.__add__, SteeringVector.__sub__, SteeringVector.__matmul__, SteeringVector.onto):
        with pytest.raises(TypeError, match="expected SteeringVector, got Tensor"):
            unwrap(method)(here, torch.ones(2))
    for method in (SteeringVector.__mul__, SteeringVector.__rmul__, SteeringVector.__truediv__):
        assert unwrap(method)(here, here) is NotImplemented  # which Python turns into a TypeError
        assert unwrap(method)(here, "2") is NotImplemented


def test_numbers_of_a_set_say_which_layer_they_are_of():
    a, b = abc()["a"], abc()["b"]
    for name, found in [("cosine", a.cosine(b)), ("angle", a.angle(b)), ("dot product", a @ b)]:
        assert (found.name, found.index.name, tuple(found.index)) == (name, "layer", a.layers)
        assert found.dtype == "float64"
    assert a.cosine(b)[20] == pytest.approx(a[20].cosine(b[20]), abs=1e-15)
    sizes = abs(a @ b)
    torch.testing.assert_close(by_layer(a.normalized(to=sizes).norms), by_layer(sizes), rtol=1e-6, atol=0)
    assert torch.equal(a.normalized(to=sizes.to_numpy()).directions, a.normalized(to=sizes).directions)
    with pytest.raises(ValueError, match=r"a norm is given for layers 20, 3, and these vectors are of layers 3, 20"):
        a.normalized(to=sizes[::-1])


def test_sum_adds_a_list_of_vectors():
    a, b, c = (abc()[name] for name in "abc")
    assert torch.equal(sum([a, b, c]).directions, (a + b + c).directions)
    assert sum([a, b]).provenance.expression == (a + b).provenance.expression
    assert sum([a]) is a
    for other in (1, 0.5, "a", None):
        with pytest.raises(TypeError):
            other + a


@pytest.mark.parametrize(
    "two", [torch.tensor(2.0), torch.tensor([2], dtype=torch.int64), np.array(2.0), np.float32(2), np.array([2])]
)
def test_a_tensor_or_an_array_of_one_number_scales_from_either_side(two):
    a = abc()["a"]
    for scaled in (two * a, a * two):
        assert torch.equal(scaled.directions, (2 * a).directions)
        assert scaled.provenance.expression == (2 * a).provenance.expression
    assert torch.equal((a / two).directions, (a / 2).directions)
    assert torch.equal((two * a[3]).direction, (2 * a[3]).direction)


def test_a_tensor_of_several_numbers_or_with_gradients_is_no_scale():
    a = abc()["a"]
    told = r"one number, got a tensor of shape \(2,\): multiply the layers one by"
    for several in (torch.ones(2), np.ones(2)):
        for one, other in [(several, a), (a, several)]:
            with pytest.raises(TypeError, match=told):
                one * other
        with pytest.raises(TypeError, match=told):
            a / several
    with pytest.raises(TypeError, match="gradients would not reach a tensor: give it as multiplier="):
        torch.tensor(2.0, requires_grad=True) * a
    with pytest.raises(TypeError):
        torch.tensor(2.0) + a
    for multiply in (operator.mul, operator.add, operator.truediv):
        with pytest.raises(TypeError):
            multiply(a.norms, a)
    with pytest.raises(ValueError, match="must be finite"):
        torch.tensor(float("nan")) * a


def test_a_direction_may_be_an_array():
    array = np.array([1.0, 2.0])
    vector = SteeringVector.from_direction(array, 3)
    array[0] = 7
    assert (vector.direction.tolist(), vector.direction.dtype) == ([1.0, 2.0], torch.float64)
    with pytest.raises(TypeError, match=r"got a list, expected a tensor or an array \[d_model\]"):
        unwrap(SteeringVector.from_direction.__func__)(SteeringVector, [1.0, 2.0], 3)


def test_a_vector_of_unknown_model_goes_with_any_but_does_not_join_two():
    unknown = SteeringVector(direction=torch.tensor([1.0, 0.0]), layer=7)
    known, foreign = one([0.0, 2.0]), one([0.0, 2.0], model="n")
    for derived in (known + unknown, unknown + known, unknown.onto(known)):
        assert derived.provenance.model == "m"
        with pytest.raises(ValueError, match="of different models, m and n"):
            derived + foreign
    with pytest.raises(ValueError, match="of different models, m and n"):
        unknown.onto(known, foreign)


def test_cosine_compares_across_models_and_single_layers_but_not_widths():
    v, w = one([1.0, 1.0]), one([0.0, 2.0], layer=9, model="n")
    assert v.cosine(w) == pytest.approx(0.5**0.5, abs=1e-12)
    assert v.angle(w) == pytest.approx(math.pi / 4, abs=1e-12)
    with pytest.raises(ValueError, match="d_model=2 and d_model=3"):
        v.cosine(one([1.0, 1.0, 1.0]))
    a = abc()["a"]
    torch.testing.assert_close(by_layer(a.cosine(make("b", -a.directions, model="n"))), -torch.ones(2).double())
    with pytest.raises(ValueError, match="layers 3, 20 and layers 3-4"):
        a.cosine(make("b", torch.ones(2, D_MODEL), layers=(3, 4)))


def test_zero_has_no_direction_and_cannot_divide():
    zero, a = one([0.0, 0.0]), one([1.0, 2.0])
    asked = {
        "normalized": zero.normalized,
        "scaled": lambda: zero.scaled_to(0.1, of=3.0),
        "onto": lambda: a.onto(zero),
        "without": lambda: a.without(a, zero),
        "cosine": lambda: a.cosine(zero),
        "angle": lambda: zero.angle(a),
        "slerp": lambda: a.slerp(zero, 0.5),
        "rotated": lambda: zero.rotated(a, 0.5),
    }
    for refuse in asked.values():
        with pytest.raises(ValueError, match="is the zero vector somewhere in layer 7: it has no direction there"):
            refuse()
    assert zero.onto(a).norm == 0
    half_zero = make("h", torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    with pytest.raises(ValueError, match="h is the zero vector somewhere in layers 3, 20"):
        half_zero.normalized()
    with pytest.raises(ValueError, match="cannot be divided by 0"):
        a / 0.0
    with pytest.raises(ValueError, match="which vectors"):
        a.onto()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(bad):
    v, w = one([1.0, 2.0]), one([2.0, 1.0])
    for refuse in (lambda: bad * v, lambda: v / bad, lambda: v.lerp(w, bad), lambda: v.rotated(w, bad)):
        with pytest.raises(ValueError, match="must be finite, got"):
            refuse()
    with pytest.raises(ValueError, match="slerp needs t from 0 to 1"):
        v.slerp(w, bad)


# ---- provenance -------------------------------------------------------------------------------------------------


def test_provenance_says_what_the_vectors_share_and_lists_what_they_do_not():
    common = {"model": "m", "method": "mean difference", "prompt_format": "llama2-chat"}
    a = Provenance(behavior="a", n_pairs=12, dataset_hash="1", details={"torch": "2", "note": "x"}, **common)
    b = Provenance(behavior="b", n_pairs=12, dataset_hash="2", details={"torch": "2", "note": "y"}, **common)
    v, w = (SteeringVectors(directions=torch.ones(1, 2), layers=(3,), provenance=p) for p in (a, b))
    derived = (v + 2 * w).without(v).provenance
    assert (derived.model, derived.method, derived.prompt_format) == ("m", "mean difference", "llama2-chat")
    assert (derived.behavior, derived.dataset_hash, derived.n_pairs) == ("a | b", "1 | 2", 0)
    assert derived.details == {"torch": "2", "note": "x | y"}
    assert (2 * v).provenance.n_pairs == (v + v).provenance.n_pairs == 12
    assert v.provenance.details == {"torch": "2", "note": "x"}
