"""Expressions over named vectors: what is understood, and where a mistake is."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caa_lens.provenance import Provenance
from caa_lens.vectors.algebra.combinations import mean_vector
from caa_lens.vectors.algebra.expression_parser import METHODS, ExpressionError, evaluate
from caa_lens.vectors.steering_vectors import SteeringVector, SteeringVectors


def vectors(name, seed, *, model="m"):
    directions = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed))
    provenance = Provenance(model=model, behavior=name, expression=name)
    return SteeringVectors(directions=directions, layers=(3, 7), provenance=provenance)


A, B, C = vectors("A", 0), vectors("B", 1), vectors("C", 2)
FOREIGN = vectors("F", 3, model="n")
NAMES = {"A": A, "B": B, "C": C, "F": FOREIGN, "größe": A, "ﬁ": B}

MEANT = {
    "A": A,
    "  A\n+\tB ": A + B,
    "0.5*A - B": 0.5 * A - B,
    "A - B - C": (A - B) - C,
    "A - (B - C)": A - (B - C),
    "A + 2 * B / 4": A + (2 * B) / 4,
    "-A * 2": (-A) * 2,
    "--A": A,
    "2 * 3 * A": 6 * A,
    "A * (1 + 2) / (2 - 4)": A * 3 / -2,
    "1e-1 * A * .5": 0.1 * A * 0.5,
    "1_000 * A": 1000 * A,
    "A.onto(B, C)": A.onto(B, C),
    "A.without(B).normalized(to=2)": A.without(B).normalized(to=2),
    "(A - B).normalized(to=A.norms)": (A - B).normalized(to=A.norms),
    "A.normalized(to=[1, 2.5])": A.normalized(to=[1, 2.5]),
    "A.scaled_to(0.1, of=20)": A.scaled_to(0.1, of=20),
    "A.lerp(B, 1/4).slerp(C, t=0.5)": A.lerp(B, 0.25).slerp(C, 0.5),
    "A.rotated(B, 3.14159 / 2)": A.rotated(B, 3.14159 / 2),
    "A.top_k(3)": A.top_k(3),
    "A.at([7]) + B.at([7])": A.at([7]) + B.at([7]),
    "mean(A, B, weights=[2, 1])": mean_vector(A, B, weights=[2, 1]),
    "größe - B": A - B,
}


@pytest.mark.parametrize("text", MEANT)
def test_an_expression_means_what_python_would_make_of_it(text):
    found = evaluate(text, NAMES)
    torch.testing.assert_close(found.directions, MEANT[text].directions, rtol=1e-6, atol=1e-7)


def test_a_layer_of_a_set_is_a_vector_and_can_be_moved():
    found = evaluate("A[7].at_layer(3) + B[3]", NAMES)
    assert isinstance(found, SteeringVector)
    assert torch.equal(found.direction, (A[7].at_layer(3) + B[3]).direction)


MISTAKES = [
    # expression, place of the caret, message
    ("A + X", 4, "unknown name 'X': known are A, B, C, F"),
    ("A +", 3, "not understood: invalid syntax"),
    ("(A + B", 0, r"not understood: '\(' was never closed"),
    ("A B", 2, "not understood: invalid syntax"),
    ("A + $", 4, "not understood: invalid syntax"),
    ("A − B", 2, "not understood: invalid character '−'"),
    ("A * B", 2, "vectors can be multiplied and divided by numbers only"),
    ("2 / A", 2, "vectors can be multiplied and divided by numbers only"),
    ("größe - (B) * C", 12, "vectors can be multiplied and divided by numbers only"),
    ("A + 2", 2, "vectors and a number can only be multiplied or divided"),
    ("A - (1 / 0) * B", 7, "division by zero"),
    ("A / 0", 2, "cannot be divided by 0"),
    ("A + (B - F)", 7, "cannot combine vectors of different models, m and n"),
    ("A + B[7]", 2, "expected SteeringVectors, got SteeringVector"),
    ("A[3] - A[4]", 7, "no vector for layer 4: this set has layers 3, 7"),
    ("A.without(0 * B)", 0, "is the zero vector"),
    ("1e999 * A", 6, "a scale must be finite, got inf"),
    ("2 + 3", 0, "this is a number, expected vectors"),
    ("A.norms", 0, "this is a number, expected vectors"),
    ("A.save", 0, "not understood: expected vectors, numbers"),
    ("A.save('x')", 0, "not understood: expected vectors, numbers"),
    ("B + A.provenance", 4, "not understood: expected vectors, numbers"),
    ("2 * A.__class__", 4, "not understood: expected vectors, numbers"),
    ("exec('x')", 0, "not understood: expected vectors, numbers"),
    ("A ** 2", 0, "not understood: expected vectors, numbers"),
    ("B - A @ B", 4, "not understood: expected vectors, numbers"),
    ("A if A else B", 0, "not understood: expected vectors, numbers"),
    ("[A for A in B]", 0, "not understood: expected vectors, numbers"),
    ("lambda: A", 0, "not understood: expected vectors, numbers"),
    ("(A := B)", 1, "not understood: expected vectors, numbers"),
    ("A.onto(*[B])", 7, "not understood: expected vectors, numbers"),
    ("True * A", 0, "not understood: expected vectors, numbers"),
    ("2j * A", 0, "not understood: expected vectors, numbers"),
    ("A.onto(**B)", 0, r"unexpected keyword argument|keyword"),
    ("A\0", 2, "not understood: source code string cannot contain null bytes"),
]


@pytest.mark.parametrize(("text", "place", "message"), MISTAKES)
def test_a_mistake_is_shown_where_it_is(text, place, message):
    with pytest.raises(ExpressionError, match=message) as refused:
        evaluate(text, NAMES)
    *_, line, caret = str(refused.value).splitlines()
    assert line == f"  {text}"
    assert caret == f"  {' ' * place}^"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has 0 characters, expected 1 to 2000"),
        (" " * 5000, "has 0 characters"),
        ("A" + "+A" * 1000, "has 2001 characters, expected 1 to 2000"),
        ("(" * 250 + "A" + ")" * 250, "nested"),
        ("-" * 1900 + "A", "nested"),
        ("+".join("A" * 990), "nested"),
        ("A" + ".top_k(1)" * 200, None),
        ("9" * 1900 + " * A", "int too large|must be finite"),
        ("[" * 199 + "]" * 199, "nested|number"),
    ],
    ids=lambda text: (text or "none")[:12],
)
def test_what_is_too_long_or_too_deep_is_refused_before_it_hurts(text, message):
    if message is None:
        assert torch.equal(evaluate(text, NAMES).directions, A.top_k(1).directions)
        return
    with pytest.raises(ExpressionError, match=message):
        evaluate(text, NAMES)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.text(alphabet="AB+-*/(),.[]= 012e_xé'\"#\\:;@{}", max_size=30))
def test_no_text_ends_in_anything_but_vectors_or_a_clear_error(text):
    try:
        found = evaluate(text, NAMES)
    except ExpressionError:
        return
    assert found.d_model == 5


def test_nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("__import__('pathlib').Path('run').touch()", "A.save('run.safetensors')", "open('run', 'w')"):
        with pytest.raises(ExpressionError, match="not understood"):
            evaluate(text, NAMES)
    assert list(Path().iterdir()) == []


def test_every_method_that_may_be_called_makes_vectors_and_touches_nothing_else():
    for name in METHODS:
        assert hasattr(SteeringVectors if name == "at" else SteeringVector, name)
    assert not {"save", "load", "hook", "to"} & set(METHODS)
