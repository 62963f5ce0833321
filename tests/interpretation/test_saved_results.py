"""Every kind of interpretation is saved and read back to the bit, and shows after that what it showed before."""

import dataclasses

import pandas as pd
import plotly.io
import pytest
from helpers.models import random_vectors

from caa_lens.contrast.sets import ContrastSet
from caa_lens.engine.pair_reading import pair_activations
from caa_lens.interpretation.attribution import LogitAttribution, attribute_logits
from caa_lens.interpretation.lens import LogitLens, logit_lens, word_ranks
from caa_lens.interpretation.pair_geometry import pair_pca, pair_separability, vector_norms
from caa_lens.interpretation.residual_stream import residual_lens
from caa_lens.interpretation.similarity import token_similarity
from caa_lens.interpretation.vector_cosines import Cosines, cosines
from caa_lens.results import Result
from caa_lens.steering.interventions import Intervention

LETTERS = ContrastSet.from_pairs(
    [
        ("Is it good?\n\nChoices:\n (A) Yes\n (B) No", "(A)", "(B)"),
        ("Was it <b>late</b>?\n\nChoices:\n (A) Yes\n (B) No", "(B)", "(A)"),
        ("Which?\n\nChoices:\n (A) This\n (B) That\n (C) Neither", "(C)", "(A)"),
    ],
    name="letters",
)
QUESTION = "How was <b>your</b> day, naïve 🙂?"


@pytest.fixture(scope="module")
def vectors(tiny_chat):
    return random_vectors(tiny_chat, behavior="wärme & <b>kälte</b>")


@pytest.fixture(scope="module")
def read(tiny_chat):
    return pair_activations(tiny_chat, LETTERS, progress=False)


KINDS = {
    "logit lens": lambda m, v, read: logit_lens(m, v.at([1, 3]), k=12),
    "logit lens in context": lambda m, v, read: logit_lens(m, v, reading="in_context", pairs=LETTERS, background=2),
    "word ranks": lambda m, v, read: word_ranks(m, v, ["happy", "<b>", "naïve"], reading="direct"),
    "residual lens": lambda m, v, read: residual_lens(m, QUESTION),
    "steered residual lens": lambda m, v, read: residual_lens(m, QUESTION, vectors=[(v[1], -1), v[3]], layers=[0, 3]),
    "token similarity": lambda m, v, read: token_similarity(m, QUESTION, v, answer="\tFine,\nthanks.", measure="dot"),
    "attribution": lambda m, v, read: attribute_logits(m, LETTERS, v[2], multiplier=1.5, progress=False),
    "attribution of one": lambda m, v, read: attribute_logits(m, [("Good?", "Yes", "No")], v[4], progress=False),
    "norms": lambda m, v, read: vector_norms(v, read),
    "pca": lambda m, v, read: pair_pca(read, layers=[1, 4]),
    "separability": lambda m, v, read: pair_separability(read, folds=3, progress=False),
    "cosines of layers": lambda m, v, read: cosines(v),
    "cosines of two sets": lambda m, v, read: cosines(v, random_vectors(m, layers=(1, 4), seed=2, behavior="cold")),
    "cosines at the same layer": lambda m, v, read: cosines(v, random_vectors(m, seed=2), same_layer=True),
    "cosines of behaviors": lambda m, v, read: cosines({"z": v, "a": random_vectors(m, seed=2)}, layer=3),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_was_saved_is_read_back_and_shows_the_same(name, tiny_chat, vectors, read, tmp_path):
    result = KINDS[name](tiny_chat, vectors, read)
    assert isinstance(result, Result)
    back = type(result).load(result.save(tmp_path / "result.parquet"))
    pd.testing.assert_frame_equal(back.frame, result.frame, check_exact=True)
    for one in dataclasses.fields(result):
        if one.name != "frame":
            assert getattr(back, one.name) == getattr(result, one.name), one.name
    assert list(back.provenance) == list(result.provenance)
    pd.testing.assert_frame_equal(back.summary(), result.summary(), check_exact=True)
    assert back.plot().to_json() == result.plot().to_json()
    assert repr(back) == repr(result)
    assert repr(result).startswith(type(result).__name__)


def test_provenance_says_what_each_was_computed_from(tiny_chat, vectors, read):
    of_vectors = {"vectors": vectors.provenance}
    assert logit_lens(tiny_chat, vectors).provenance == of_vectors
    assert word_ranks(tiny_chat, vectors, ["good"]).provenance == of_vectors
    assert token_similarity(tiny_chat, QUESTION, vectors).provenance == of_vectors
    of_one = attribute_logits(tiny_chat, LETTERS, vectors[2], progress=False).provenance
    assert of_one == {"vectors": vectors[2].provenance}
    both = of_vectors | {"activations": read.provenance}
    assert vector_norms(vectors, read).provenance == both
    assert pair_pca(read).provenance == {"activations": read.provenance}
    assert pair_separability(read, folds=3, progress=False).provenance == {"activations": read.provenance}


def test_an_intervention_that_is_made_twice_keeps_both_vectors_provenance(tiny_chat, vectors):
    same = Intervention(vector=vectors[1])
    lens = residual_lens(tiny_chat, QUESTION, vectors=[same, same, vectors[3]])
    words = [f"add 1 * {vectors[i].provenance.expression} at layer {i}" for i in (1, 3)]
    assert lens.interventions == (words[0], f"{words[0]} (2)", words[1])
    assert list(lens.provenance.values()) == [vectors[i].provenance for i in (1, 1, 3)]


def test_what_a_reader_reads_in_words_is_shown_in_words(tiny_chat, vectors):
    shown = logit_lens(tiny_chat, vectors, k=3)._repr_mimebundle_()
    assert shown["text/html"].startswith("<table")
    assert shown["text/plain"].startswith("LogitLens")
    assert word_ranks(tiny_chat, vectors, ["good"])._repr_mimebundle_()["text/html"].startswith("<table")
    coloured = token_similarity(tiny_chat, QUESTION, vectors)._repr_mimebundle_()["text/html"]
    assert "ColoredTokens" in coloured


def test_all_others_show_their_figure(tiny_chat, vectors, read, monkeypatch):
    monkeypatch.setattr(plotly.io.renderers, "default", "plotly_mimetype")  # as in a notebook
    for name in KINDS:
        if name.startswith(("logit", "word", "token")):
            continue
        shown = KINDS[name](tiny_chat, vectors, read)._repr_mimebundle_()
        assert "application/vnd.plotly.v1+json" in shown, name


def test_another_kinds_file_is_refused(tiny_chat, vectors, tmp_path):
    path = cosines(vectors).save(tmp_path / "cosines.parquet")
    with pytest.raises(ValueError, match=r"holds a Cosines, expected a LogitLens: Cosines\.load reads it"):
        LogitLens.load(path)
    assert Cosines.load(path).d_model == vectors.d_model


def test_the_change_of_a_question_is_one_number_in_all_its_rows(tiny_chat, vectors, tmp_path):
    result = attribute_logits(tiny_chat, LETTERS, vectors[2], progress=False)
    columns = ["unsteered", "steered", "change"]
    assert (result.frame.groupby("question")[columns].nunique() == 1).all(axis=None)
    changes = LogitAttribution.load(result.save(tmp_path / "a.parquet")).changes
    assert list(changes.columns) == ["question", *columns]
    assert list(changes["question"]) == [0, 1, 2]
    assert list(changes["change"]) == list(changes["steered"] - changes["unsteered"])
    assert result.total == changes["change"].mean()
