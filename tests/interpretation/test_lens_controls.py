"""A reading's controls: random directions of the same norm, given the same treatment."""

import pytest
import torch
from helpers.models import random_vectors, tiny_model

from caa_lens.contrast.sets import ContrastSet
from caa_lens.interpretation import lens_controls
from caa_lens.interpretation.lens import logit_lens, word_ranks
from caa_lens.interpretation.lens_controls import agreement, p_value, ranks_of, verdict, with_random_directions
from caa_lens.interpretation.lens_downstream import read_downstream
from caa_lens.interpretation.lens_prompts import prompts_to_read
from caa_lens.plots.lens import rank_curves
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.vectors.steering_vectors import SteeringVector

PROMPTS = [Prompt.from_tokens(range(3, 9 + i)) for i in range(4)]
OPTIONS = {"prompts": PROMPTS, "place": "instruction", "progress": False}
PAIRS = ContrastSet.from_pairs([("How was it?", "It was a great day.", "Bad."), ("And you?", "Fine!", "Tired.")])


def test_the_controls_have_the_vectors_norm_at_every_layer_and_are_the_same_directions():
    steps = torch.randn(3, 32) * torch.tensor([[1.0], [5.0], [0.1]])
    drawn = with_random_directions(steps, 7, seed=3)
    assert torch.equal(drawn[:, 0], steps)
    torch.testing.assert_close(drawn.norm(dim=-1), steps.norm(dim=-1, keepdim=True).expand(3, 8))
    units = drawn[:, 1:] / drawn[:, 1:].norm(dim=-1, keepdim=True)
    torch.testing.assert_close(units[0], units[2])
    assert not torch.equal(drawn, with_random_directions(steps, 7, seed=4))


def test_agreement_is_one_for_halves_that_have_nothing_to_do_with_each_other_and_three_for_equal_bell_shapes():
    halves = torch.randn(1, 2, 200_000, generator=torch.Generator().manual_seed(0))
    assert float(agreement(halves)[0]) == pytest.approx(1, abs=0.03)
    assert float(agreement(halves[:, [0, 0]])[0]) == pytest.approx(3, abs=0.1)
    outstanding = halves.clone()
    outstanding[:, :, :50] += 20  # the same tokens stand far out on both halves
    assert float(agreement(outstanding)[0]) > 20
    outstanding[:, 1, :50] = halves[:, 1, :50]
    assert float(agreement(outstanding)[0]) < 2
    torch.testing.assert_close(agreement(7 * halves + 3), agreement(halves))


@pytest.mark.parametrize("reading", ["causal", "effect"])
def test_p_is_uniform_for_vectors_that_are_random_directions(reading):
    model = tiny_model(d_vocab=256, n_layers=2)
    n_controls, n_vectors = 9, 60
    prompts = prompts_to_read(model, PROMPTS, pairs=None, behavior="", place="instruction", prompt_format=None)
    drawn = torch.randn(n_vectors, model.cfg.d_model, generator=torch.Generator().manual_seed(5))
    values = []
    for i, vector in enumerate(drawn):
        steps = with_random_directions(vector[None], n_controls, seed=100 + i)
        (found,), _ = read_downstream(model, steps, [0], prompts, to_first_order=reading == "causal", progress=False)
        values.append(p_value(found.agreement))
    counts = torch.tensor(values).mul(n_controls + 1).round().long()
    assert counts.min() >= 1
    assert counts.max() <= n_controls + 1
    observed = torch.bincount(counts, minlength=n_controls + 2)[1:].double()
    expected = n_vectors / (n_controls + 1)
    chi_squared = float(((observed - expected) ** 2 / expected).sum())
    assert chi_squared < 21.7  # 99 % of a chi-squared distribution with nine degrees of freedom


def test_a_vector_that_says_one_token_is_readable_and_its_words_beat_their_controls(tiny_chat):
    model = tiny_chat
    token = model.tokenizer.encode(" happy")[0]
    direction = (model.W_U[:, token] / model.ln_final.w).detach()
    v = SteeringVector.from_direction(30 * direction / direction.norm(), layer=4)
    options = {"prompts": ["How was it?", "And you?"], "progress": False, "reading": "causal"}
    ranks = word_ranks(model, v, ["happy"], **options)
    row = ranks.frame.iloc[0]
    assert row["rank"] == 1
    assert row["percentile"] == 0
    assert row["control_low"] > 100
    told = ranks.medians().iloc[0]
    assert told["p_value"] == pytest.approx(1 / 39)
    assert told["verdict"] == "readable"
    assert len(ranks.control_medians[0]) == 38  # each of 19 in both directions
    bands = rank_curves(ranks.frame, vectors="v", reading="causal", d_vocab=ranks.d_vocab, controls=ranks.medians())
    assert any("random directions" in (trace.name or "") for trace in bands.data)


def test_a_layer_that_is_not_told_from_its_controls_is_said_to_be_so_in_table_and_figure(monkeypatch):
    model = tiny_model()
    lens = logit_lens(model, random_vectors(model, seed=4), k=3, reading="causal", **OPTIONS)
    table = lens.by_layer()
    for row in table.itertuples():
        assert row.verdict == ("readable" if row.p_value <= 0.05 else "nothing to read here")
    assert set(lens.readable_layers) == set(table.loc[table["p_value"] <= 0.05, "layer"])
    nothing = table.loc[table["verdict"] != "readable", "layer"]
    assert len(nothing)
    assert list(lens.summary()["verdict"]) == list(table["verdict"])
    assert {f"({layer})" for layer in nothing} <= set(lens.plot().data[0].y)


def test_too_few_controls_say_so_and_none_say_nothing():
    model = tiny_model()
    few = logit_lens(model, random_vectors(model)[1], reading="causal", controls=5, **OPTIONS)
    assert set(few.frame["verdict"]) == {"too few controls to say"}
    none = logit_lens(model, random_vectors(model)[1], reading="causal", controls=0, **OPTIONS)
    assert "verdict" not in none.frame
    assert none.readable_layers == ()
    assert verdict(0.05, 19) == "readable"
    assert verdict(0.1, 19) == "nothing to read here"


def test_ranks_of_equal_scores_are_the_best_one():
    scores = torch.tensor([3.0, 1.0, 3.0, 2.0])
    assert ranks_of(scores, torch.tensor([0, 1, 2, 3])).tolist() == [1, 4, 1, 3]


def test_every_reading_that_can_fool_has_controls_unless_they_are_declined(tiny_chat):
    v = random_vectors(tiny_chat)[2]
    for reading, n in (("in_context", 19), ("causal", 19), ("effect", 19), ("normed", 0), ("direct", 0)):
        options = {"pairs": PAIRS} if reading != "normed" else {}
        found = logit_lens(tiny_chat, v, reading=reading, progress=False, **options)
        assert ("verdict" in found.frame) == bool(n)
        assert found.settings.get("controls", "0") == str(n)


def test_a_control_of_a_reading_is_that_reading_of_the_control(monkeypatch, tiny_chat):
    """Each control's ranks are what `word_ranks` gives for the control as a vector."""
    v = random_vectors(tiny_chat)[2]
    words, seen = ["good", "bad", "the"], []
    controlled = lens_controls.controlled

    def keep(*given, **options):
        seen.append(controlled(*given, **options))
        return seen[-1]

    monkeypatch.setattr(lens_controls, "controlled", keep)
    for reading in ("in_context", "causal", "effect"):
        seen.clear()
        options = {"reading": reading, "pairs": PAIRS, "progress": False}
        word_ranks(tiny_chat, v, words, controls=2, **options)
        (found,) = seen
        drawn = with_random_directions(v.direction[None], 2, 0)[0, 1:]
        for j, direction in enumerate(drawn):
            alone = word_ranks(
                tiny_chat, SteeringVector.from_direction(direction, layer=2), words, controls=0, **options
            )
            assert alone.frame["rank"].tolist() == pytest.approx(found.ranks[j].tolist(), abs=3)
        if reading == "causal":
            assert found.ranks[2].tolist() == pytest.approx(
                (tiny_chat.cfg.d_vocab + 1 - found.ranks[0]).tolist(), abs=3
            )


def test_a_result_with_controls_is_saved_and_read_back(tmp_path, tiny_chat):
    from caa_lens.interpretation.lens_results import LogitLens, WordRanks

    v = random_vectors(tiny_chat)[2]
    ranks = word_ranks(tiny_chat, v, ["good"], reading="causal", pairs=PAIRS, progress=False)
    assert WordRanks.load(ranks.save(tmp_path / "ranks.parquet")).medians().equals(ranks.medians())
    lens = logit_lens(tiny_chat, v, reading="effect", pairs=PAIRS, progress=False)
    assert LogitLens.load(lens.save(tmp_path / "lens.parquet")).by_layer().equals(lens.by_layer())
