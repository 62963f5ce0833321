"""Steering vectors: arithmetic obeys its laws, says how a result was made, and refuses what does not fit together."""

from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caa_lens.vectors import Provenance, SteeringVector, SteeringVectors, normalize_across_behaviors

D_MODEL = 6
LAYERS = (3, 7, 20)  # neither positions nor a run, so that an index cannot pass for a block

laws = settings(deadline=None, derandomize=True, max_examples=30)
components = st.floats(-100, 100, width=32, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-3)
directions = st.lists(components, min_size=D_MODEL, max_size=D_MODEL)
nonzero_directions = directions.filter(any)
scales = st.floats(-10, 10, width=32, allow_subnormal=False)


def vector(direction, *, layer=7, model="m", behavior="v"):
    return SteeringVector.from_direction(torch.tensor(direction), layer, behavior=behavior, model=model)


def vector_set(behavior="a", *, layers=LAYERS, model="m", seed=0, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return SteeringVectors(
        directions=(scale * torch.randn(len(layers), D_MODEL, generator=generator)).to(dtype),
        layers=layers,
        provenance=Provenance(model=model, behavior=behavior, method="mean difference", n_pairs=12),
    )


def assert_same_direction(actual, expected, *, atol=1e-4, rtol=1e-5):
    torch.testing.assert_close(actual.direction, expected.direction, atol=atol, rtol=rtol)


# ---- arithmetic -------------------------------------------------------------------------------------------------


@laws
@given(directions, directions)
def test_adding_then_subtracting_gives_the_vector_back(a, b):
    a, b = vector(a), vector(b)
    assert_same_direction((a + b) - b, a)


@laws
@given(directions, directions, directions)
def test_addition_does_not_care_about_order_or_grouping(a, b, c):
    a, b, c = vector(a), vector(b), vector(c)
    assert torch.equal((a + b).direction, (b + a).direction)
    assert_same_direction((a + b) + c, a + (b + c))


@laws
@given(directions, directions, scales, scales)
def test_scaling_is_linear(a, b, s, t):
    a, b = vector(a), vector(b)
    assert_same_direction(s * (a + b), s * a + s * b, atol=1e-3)
    assert_same_direction((s + t) * a, s * a + t * a, atol=1e-3)
    assert_same_direction(s * (t * a), (s * t) * a, atol=1e-3)
    assert torch.equal((s * a).direction, (a * s).direction)


@laws
@given(directions)
def test_negating_twice_is_exactly_the_vector_itself(a):
    a = vector(a)
    negative = -a
    assert torch.equal((-negative).direction, a.direction)
    assert_same_direction(a + -a, 0.0 * a, atol=0, rtol=0)
    assert torch.equal((-a).direction, (-1.0 * a).direction)


@laws
@given(directions, st.sampled_from([0.5, -4.0, 3.0]))
def test_dividing_undoes_multiplying(a, s):
    a = vector(a)
    assert_same_direction((a * s) / s, a)


@laws
@given(nonzero_directions, st.floats(0.125, 64))
def test_normalizing_sets_the_norm_and_keeps_the_direction(a, to):
    a = vector(a)
    normalized = a.normalized(to=to)
    assert normalized.norm == pytest.approx(to, rel=1e-5)
    assert normalized.cosine(a) == pytest.approx(1, abs=1e-5)
    assert_same_direction(normalized.normalized(to=a.norm), a)


@laws
@given(directions, nonzero_directions)
def test_projecting_twice_is_projecting_once(a, b):
    a, b = vector(a), vector(b)
    assert_same_direction(a.onto(b).onto(b), a.onto(b))


@laws
@given(directions, nonzero_directions)
def test_without_leaves_nothing_along_the_other_vector(a, b):
    a, b = vector(a), vector(b)
    rest = a.without(b)
    assert abs(rest @ b) <= 1e-5 * max(1, a.norm) * b.norm
    assert_same_direction(rest + a.onto(b), a)
    assert rest.norm <= a.norm * (1 + 1e-5)


@laws
@given(directions, directions)
def test_dot_product_norm_and_cosine_agree_with_sums_by_hand(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    norm_a, norm_b = sum(x * x for x in a) ** 0.5, sum(y * y for y in b) ** 0.5
    first, second = vector(a), vector(b)
    assert first @ second == pytest.approx(dot, abs=1e-5 * (1 + norm_a * norm_b))
    assert first.norm == pytest.approx(norm_a, rel=1e-6)
    if norm_a and norm_b:
        assert first.cosine(second) == pytest.approx(dot / (norm_a * norm_b), abs=1e-5)


def test_numpy_numbers_scale_like_python_ones():
    import numpy as np

    a = vector_set()[7]
    for two in (np.float64(2), np.float32(2)):
        scaled = two * a
        assert isinstance(scaled, SteeringVector)
        assert torch.equal(scaled.direction, 2 * a.direction)


# ---- the expression ---------------------------------------------------------------------------------------------

EXPRESSIONS = {
    "a[3] + b[3]": lambda a, b: a + b,
    "a[3] - b[3]": lambda a, b: a - b,
    "a[3] - (b[3] - a[3])": lambda a, b: a - (b - a),
    "a[3] - (a[3] + b[3])": lambda a, b: a - (a + b),
    "a[3] - b[3] - a[3]": lambda a, b: (a - b) - a,
    "a[3] + b[3] - a[3]": lambda a, b: (a + b) - a,
    "2 * (a[3] + b[3])": lambda a, b: 2.0 * (a + b),
    "2 * a[3] + b[3]": lambda a, b: 2.0 * a + b,
    "0.5 * (2 * a[3])": lambda a, b: 0.5 * (2.0 * a),
    "(a[3] - b[3]) / 4": lambda a, b: (a - b) / 4.0,
    "a[3] / 4": lambda a, b: a / 4.0,
    "-a[3]": lambda a, b: -a,
    "-(a[3] + b[3])": lambda a, b: -(a + b),
    "-(-a[3])": lambda a, b: -(-a),  # noqa: B002
    "a[3] - (-b[3])": lambda a, b: a - (-b),
    "a[3].onto(b[3])": lambda a, b: a.onto(b),
    "(a[3] + b[3]).onto(a[3] - b[3])": lambda a, b: (a + b).onto(a - b),
    "a[3].without(b[3])": lambda a, b: a.without(b),
    "(a[3] - b[3].onto(a[3])).normalized(to=1.5)": lambda a, b: (a - b.onto(a)).normalized(to=1.5),
    "(2 * a[3]).at_layer(9)": lambda a, b: (2.0 * a).at_layer(9),
}


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_a_derived_vector_prints_the_expression_that_made_it(text):
    a, b = vector_set("a")[3], vector_set("b", seed=1)[3]
    derived = EXPRESSIONS[text](a, b)
    assert derived.provenance.expression == text
    assert text in repr(derived)


def apply_step(step, stack):
    """One step of a stack machine over vectors; every branch makes a new vector or leaves the stack alone."""
    name, argument = step
    if name in ("a", "b"):
        stack.append(argument[3])
    elif name in ("+", "-", "onto", "without") and len(stack) >= 2:
        right, left = stack.pop(), stack.pop()
        if name in ("onto", "without") and right.norm < 1e-3:
            right = left + right if (left + right).norm > 1e-3 else argument
        binary = {
            "+": lambda: left + right,
            "-": lambda: left - right,
            "onto": lambda: left.onto(right),
            "without": lambda: left.without(right),
        }
        stack.append(binary[name]())
    elif name in ("neg", "*", "/", "normalized") and stack:
        top = stack.pop()
        unary = {
            "neg": lambda: -top,
            "*": lambda: argument * top,
            "/": lambda: top / argument,
            "normalized": lambda: top.normalized(to=argument) if top.norm > 1e-3 else top,
        }
        stack.append(unary[name]())


@laws
@given(st.lists(st.sampled_from(["a", "b", "a", "b", "+", "-", "onto", "without", "neg", "*", "/", "normalized"])))
def test_evaluating_any_expression_gives_the_vector_it_names(names):
    a, b = vector_set("a"), vector_set("b", seed=1)
    # Scales are not whole numbers, and print exactly.
    arguments = {"a": a, "b": b, "*": -1.5, "/": 2.5, "normalized": 0.75, "onto": a[3], "without": a[3]}
    stack = [a[3]]
    for name in names:
        apply_step((name, arguments.get(name)), stack)
    derived = stack[-1]
    again = eval(derived.provenance.expression, {"a": a, "b": b})
    assert_same_direction(again, derived, atol=1e-6, rtol=1e-6)


def test_moving_to_another_layer_is_on_purpose_and_on_record():
    a = vector_set()
    moved = a[3].at_layer(20)
    assert (moved.layer, moved.hook_name) == (20, "blocks.20.hook_resid_post")
    assert torch.equal(moved.direction, a[3].direction)
    assert moved.provenance.expression == "a[3].at_layer(20)"
    assert_same_direction(moved - a[20], vector((a[3].direction - a[20].direction).tolist()))


def test_provenance_survives_arithmetic():
    derived = (2.0 * vector_set()[7]).normalized()
    assert derived.provenance.method == "mean difference"
    assert (derived.provenance.n_pairs, derived.provenance.model) == (12, "m")


# ---- refusals ---------------------------------------------------------------------------------------------------

OPERATIONS = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "project": lambda a, b: a.onto(b),
    "remove": lambda a, b: a.without(b),
    "dot": lambda a, b: a @ b,
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_vectors_that_do_not_belong_together_are_refused_with_a_remedy(operation):
    combine = OPERATIONS[operation]
    here = vector([1.0, 2.0])
    with pytest.raises(ValueError, match=r"layer 7 and layer 9: move one on purpose with \.at_layer\(7\)"):
        combine(here, vector([1.0, 2.0], layer=9))
    with pytest.raises(ValueError, match="of different models, m and n: their residual streams have different bases"):
        combine(here, vector([1.0, 2.0], model="n"))
    with pytest.raises(ValueError, match="d_model=2 and d_model=3: both must come from models of the same width"):
        combine(here, vector([1.0, 2.0, 3.0]))
    with pytest.raises(TypeError, match="expected a SteeringVector, got Tensor"):
        combine(here, torch.ones(2))


def test_a_vector_made_by_hand_combines_with_any_model():
    unknown = SteeringVector(direction=torch.tensor([1.0, 0.0]), layer=7)
    assert torch.equal((vector([0.0, 2.0]) + unknown).direction, torch.tensor([1.0, 2.0]))


def test_cosine_compares_across_layers_and_models_but_not_widths():
    assert vector([1.0, 1.0]).cosine(vector([0.0, 2.0], layer=9, model="n")) == pytest.approx(0.5**0.5, abs=1e-6)
    with pytest.raises(ValueError, match="different width: d_model=2 and d_model=3"):
        vector([1.0, 1.0]).cosine(vector([1.0, 1.0, 1.0]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(bad):
    with pytest.raises(ValueError, match="a steering vector has 1 NaN or infinite components of 3: extract it again"):
        vector([1.0, bad, 2.0])
    directions = torch.tensor([[1.0, 2.0], [bad, bad]])
    with pytest.raises(ValueError, match="steering vectors has 2 NaN or infinite components of 4"):
        SteeringVectors(directions=directions, layers=(3, 7))
    with pytest.raises(ValueError, match="NaN or infinite"):
        bad * vector([1.0, 2.0])


def test_overflow_in_half_precision_is_refused():
    with pytest.raises(ValueError, match="2 NaN or infinite components of 2: extract it again in float32"):
        3.0 * vector([60000.0, 60000.0]).to(torch.float16)


def test_zero_has_no_direction_and_cannot_divide():
    zero, a = vector([0.0, 0.0]), vector([1.0, 2.0])
    with pytest.raises(ValueError, match="the zero vector has no direction to normalise"):
        zero.normalized()
    with pytest.raises(ValueError, match="cannot project onto the zero vector"):
        a.onto(zero)
    with pytest.raises(ValueError, match="cannot project onto the zero vector"):
        a.without(zero)
    with pytest.raises(ValueError, match="cannot be divided by 0"):
        a / 0.0


def test_negative_layers_are_refused():
    with pytest.raises(ValueError, match="0-based block number, got -1: count layers from the first block"):
        vector([1.0, 2.0], layer=-1)
    with pytest.raises(ValueError, match="0-based block number, got -1"):
        vector([1.0, 2.0]).at_layer(-1)
    with pytest.raises(ValueError, match=r"distinct 0-based block numbers in order, got \(-1, 3\)"):
        vector_set(layers=(-1, 3))


def test_whole_numbers_are_refused_as_directions():
    from inspect import unwrap  # without the tests' own type checking

    from caa_lens.vectors import _check_direction

    with pytest.raises(ValueError, match=r"floating-point numbers, got torch.int64: call \.float\(\) on it first"):
        unwrap(_check_direction)(torch.tensor([1, 2]), 1, "a steering vector")
    with pytest.raises(ValueError, match=r"needs a 1-dimensional tensor, got shape \(1, 2\)"):
        unwrap(_check_direction)(torch.ones(1, 2), 1, "a steering vector")


# ---- values -----------------------------------------------------------------------------------------------------


def test_no_operation_changes_its_inputs():
    a, b = vector_set("a"), vector_set("b", seed=1)
    kept = a.directions.clone(), b.directions.clone()
    v, w = a[7], b[7]
    results = [v + w, v - w, -v, 2.0 * v, v / 2.0, v.normalized(), v.onto(w), v.without(w), v.to(torch.float64)]
    normalize_across_behaviors({"a": a, "b": b})
    SteeringVectors.from_vectors([v, a[3]])
    for result in results:
        result.direction.zero_()
    assert torch.equal(a.directions, kept[0])
    assert torch.equal(b.directions, kept[1])
    assert (v.provenance.expression, w.provenance.expression) == ("a[7]", "b[7]")


def test_a_vector_made_by_hand_does_not_follow_its_tensor():
    tensor = torch.tensor([1.0, 2.0], requires_grad=True)
    made = SteeringVector.from_direction(tensor, 7)
    with torch.no_grad():
        tensor.zero_()
    assert torch.equal(made.direction, torch.tensor([1.0, 2.0]))
    assert not made.direction.requires_grad


def test_vectors_are_immutable():
    with pytest.raises(FrozenInstanceError):
        vector([1.0, 2.0]).layer = 3
    with pytest.raises(FrozenInstanceError):
        vector_set().layers = (1, 2, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_arithmetic_keeps_the_left_vectors_dtype(dtype):
    v, w = vector_set(dtype=dtype)[7], vector_set("b", seed=1)[7]
    derived = [v + w, v - w, -v, 0.3 * v, v / 3.0, v.normalized(to=2.0), v.onto(w), v.without(w), v.at_layer(9)]
    assert {one.direction.dtype for one in derived} == {dtype}
    exact = v.direction.double() + w.direction.double()
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(derived[0].direction.double(), exact, rtol=tolerance, atol=max(tolerance, 1e-7))
    assert {one.direction.dtype for one in normalize_across_behaviors({"v": vector_set(dtype=dtype)})["v"]} == {dtype}


def test_norms_are_computed_in_float32_whatever_the_dtype():
    large = vector([60000.0] * 4).to(torch.float16)  # whose norm is more than float16 can hold
    assert large.norm == pytest.approx(120000, rel=1e-6)
    assert large @ large == pytest.approx(120000**2, rel=1e-6)
    assert large.cosine(large) == pytest.approx(1, abs=1e-6)
    half = SteeringVectors(directions=torch.full((1, 4), 60000.0, dtype=torch.float16), layers=(7,))
    torch.testing.assert_close(half.norms, torch.tensor([120000.0]), atol=0, rtol=1e-6)


def test_changing_the_dtype_and_back_is_exact():
    v = vector_set()[7]
    assert torch.equal(v.to(torch.float64).to(torch.float32).direction, v.direction)
    assert v.to(torch.float64).direction.dtype == torch.float64
    vectors = vector_set()
    assert torch.equal(vectors.to("cpu").to(torch.float64).directions, vectors.directions.double())


# ---- sets -------------------------------------------------------------------------------------------------------


def test_indexing_is_by_block_never_by_list_position():
    vectors = vector_set()
    for row, layer in enumerate(LAYERS):
        assert torch.equal(vectors[layer].direction, vectors.directions[row])
        assert vectors[layer].layer == layer
        assert vectors[layer].hook_name == f"blocks.{layer}.hook_resid_post"
        assert vectors[layer].provenance.expression == f"a[{layer}]"
    for missing in (0, 1, 2, -1, -3, 4):
        assert missing not in vectors
        with pytest.raises(IndexError, match=rf"no vector for layer {missing}: this set has layers 3, 7, 20 \(0-based"):
            vectors[missing]


def test_iterating_gives_every_layer_in_order():
    vectors = vector_set()
    assert [v.layer for v in vectors] == [3, 7, 20]
    assert len(vectors) == 3
    assert torch.equal(torch.stack([v.direction for v in vectors]), vectors.directions)


def test_layers_print_as_runs():
    vectors = vector_set(layers=(0, 1, 2, 3, 7, 20, 21))
    assert "layers=0-3, 7, 20-21" in repr(vectors)


@pytest.mark.parametrize("chosen", [(20, 3), [3, 20, 3], range(3, 21, 17)])
def test_a_subset_keeps_each_layers_own_vector(chosen):
    vectors = vector_set()
    subset = vectors.at(chosen)
    assert subset.layers == (3, 20)
    assert torch.equal(subset[20].direction, vectors.directions[2])
    assert torch.equal(subset[3].direction, vectors.directions[0])
    assert subset.provenance == vectors.provenance


def test_a_subset_of_missing_layers_is_refused():
    with pytest.raises(IndexError, match="no vector for layer 1: this set has layers 3, 7, 20"):
        vector_set().at([3, 1])


def test_collecting_vectors_sorts_them_by_layer_and_undoes_iterating():
    vectors = vector_set()
    again = SteeringVectors.from_vectors([vectors[20], vectors[3], vectors[7]])
    assert again.layers == LAYERS
    assert torch.equal(again.directions, vectors.directions)
    assert again[20].provenance.expression == "a[20]"


def test_collecting_vectors_of_different_origin_records_each():
    a, b = vector_set("a"), vector_set("b", seed=1)
    assert SteeringVectors.from_vectors([b[7], a[3]]).provenance.expression == "{a[3], b[7]}"
    assert SteeringVectors.from_vectors([a[3] - b[3], a[7] - b[7]]).provenance.expression == "a - b"


def test_collecting_what_is_no_set_is_refused():
    a, b = vector_set("a"), vector_set("b", seed=1, model="other")
    with pytest.raises(ValueError, match="cannot make a set of no vectors"):
        SteeringVectors.from_vectors([])
    with pytest.raises(ValueError, match="of different models, m and other"):
        SteeringVectors.from_vectors([a[3], b[7]])
    with pytest.raises(ValueError, match=r"distinct 0-based block numbers in order, got \(3, 3\)"):
        SteeringVectors.from_vectors([a[3], a[3]])


def test_rows_and_layers_must_agree():
    with pytest.raises(ValueError, match="2 directions for 3 layers"):
        SteeringVectors(directions=torch.ones(2, 4), layers=LAYERS)
    with pytest.raises(ValueError, match=r"in order, got \(7, 3\)"):
        SteeringVectors(directions=torch.ones(2, 4), layers=(7, 3))


# ---- normalisation across behaviors -----------------------------------------------------------------------------


def test_normalizing_across_behaviors_equals_the_papers_formula():
    sets = {name: vector_set(name, seed=i, scale=1.0 + 3 * i) for i, name in enumerate("abc")}
    normalized = normalize_across_behaviors(sets)
    for layer in LAYERS:
        raw = {name: vectors[layer].direction.double() for name, vectors in sets.items()}
        mean_norm = sum(direction.norm() for direction in raw.values()) / 3
        for name, direction in raw.items():
            expected = (direction / direction.norm() * mean_norm).float()
            torch.testing.assert_close(normalized[name][layer].direction, expected, rtol=1e-5, atol=1e-6)
    assert list(normalized) == list("abc")
    assert normalized["b"].provenance.normalisation == "across behaviors: a, b, c"
    # Not across layers: their norms stay as different as they were.
    norms = normalized["a"].norms
    assert norms.max() > 1.1 * norms.min()


def test_normalizing_across_behaviors_twice_changes_nothing_more():
    once = normalize_across_behaviors({"a": vector_set("a"), "b": vector_set("b", seed=1, scale=5.0)})
    twice = normalize_across_behaviors(once)
    torch.testing.assert_close(twice["a"].directions, once["a"].directions, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(once["a"].norms, once["b"].norms, rtol=1e-5, atol=0)


def test_one_behavior_alone_keeps_its_norms():
    vectors = vector_set()
    alone = normalize_across_behaviors({"a": vectors})["a"]
    torch.testing.assert_close(alone.directions, vectors.directions, rtol=1e-6, atol=0)


def test_behaviors_that_cannot_be_compared_are_refused():
    a = vector_set("a")
    with pytest.raises(ValueError, match="'b' has layers 3, 7 of m, expected 3, 7, 20 of m: extract all behaviors"):
        normalize_across_behaviors({"a": a, "b": vector_set("b", layers=(3, 7))})
    with pytest.raises(ValueError, match="of other, expected 3, 7, 20 of m"):
        normalize_across_behaviors({"a": a, "b": vector_set("b", model="other")})
    with pytest.raises(ValueError, match="'b' has a zero vector, which cannot be rescaled"):
        normalize_across_behaviors({"a": a, "b": vector_set("b", scale=0.0)})
    with pytest.raises(ValueError, match="needs at least one set"):
        normalize_across_behaviors({})
