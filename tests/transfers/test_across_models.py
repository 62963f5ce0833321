"""One model's vectors in another: against plain sweeps, on a finetuned copy of the real model, and across widths."""

import numpy as np
import pytest
import torch
from helpers.models import random_vectors

from caa_lens.contrast.sets import ContrastSet
from caa_lens.engine.pair_reading import PairActivations, pair_activations
from caa_lens.measures.answers import score_answers
from caa_lens.measures.intervals import bootstrap_interval
from caa_lens.measures.sweeps import sweep
from caa_lens.measures.training_pairs import TrainingPairsWarning
from caa_lens.models.loading.load import load_model
from caa_lens.prompts.prompt_formats import default_format, encode_answer
from caa_lens.transfers import across_models
from caa_lens.transfers.across_models import transfer_models
from caa_lens.transfers.residual_map import fit_residual_map
from caa_lens.vectors.extraction import extract
from caa_lens.vectors.steering_vectors import SteeringVectors

TEXTS = ContrastSet.from_pairs(
    [(f"How was day {n} of {n * 7}?", f"It was {n} times lovely.", f"It was {n} times awful.") for n in range(8)],
    name="days",
)


def test_own_and_foreign_effects_are_those_of_plain_sweeps(tiny_chat):
    own, foreign = (
        random_vectors(tiny_chat, layers=(0, 1, 3), seed=1),
        random_vectors(tiny_chat, layers=(1, 3, 4), seed=2),
    )
    result = transfer_models(tiny_chat, TEXTS, own, foreign, multipliers=[-1, 2], progress=False)
    assert set(result.frame["layer"]) == {1, 3}
    for origin, vectors in (("own", own), ("foreign", foreign)):
        swept = sweep(tiny_chat, TEXTS, vectors.at([1, 3]), multipliers=[-1, 0, 2], progress=False).frame
        table = swept.pivot(index=["layer", "question"], columns="multiplier", values="margin")
        rows = result.frame[result.frame["vectors"] == origin]
        ours = rows.pivot(index=["layer", "question"], columns="multiplier", values=["score", "effect"])
        for m in (-1, 2):
            np.testing.assert_allclose(ours["score"][m], table[m], atol=2e-5)
            np.testing.assert_allclose(ours["effect"][m], (table[m] - table[0]) / m, atol=4e-5)
    cosines = result.cosines().frame.set_index("layer")["cosine"]
    assert cosines[3] == pytest.approx(own[3].cosine(foreign[3]), abs=1e-6)


def test_multiplier_0_gives_zero_and_equal_vectors_equal_effects(tiny_chat):
    vectors = random_vectors(tiny_chat)
    result = transfer_models(tiny_chat, TEXTS, vectors, vectors, multipliers=[0, 1], progress=False)
    assert (result.frame.query("multiplier == 0")["effect"] == 0).all()
    own, foreign = (
        result.frame[result.frame["vectors"] == origin]["score"].to_numpy() for origin in ("own", "foreign")
    )
    np.testing.assert_array_equal(own, foreign)
    np.testing.assert_allclose(result.cosines().frame["cosine"], 1)


def test_foreign_vectors_can_be_given_the_own_ones_size(tiny_chat):
    own, foreign = random_vectors(tiny_chat, seed=1), random_vectors(tiny_chat, seed=2, scale=7)
    sized = SteeringVectors.from_vectors(f.normalized(to=o.norm) for o, f in zip(own, foreign, strict=True))
    result = transfer_models(tiny_chat, TEXTS, own, foreign, size="own", progress=False)
    plain = transfer_models(tiny_chat, TEXTS, own, sized, progress=False)
    np.testing.assert_allclose(result.frame["score"], plain.frame["score"], atol=2e-5)


def test_figures_show_both_and_the_unsteered_level(tiny_chat):
    own, foreign = random_vectors(tiny_chat, seed=1), random_vectors(tiny_chat, seed=2)
    result = transfer_models(tiny_chat, TEXTS, own, foreign, progress=False)
    figure = result.plot()
    names = [trace.name for trace in figure.data if trace.hoverinfo != "skip"]
    assert names == [f"{origin} vectors, multiplier {m}" for origin in ("own", "foreign") for m in (-1, 1)]
    assert figure.layout.shapes[0].y0 == result.unsteered
    curve = result.summary("score").query("vectors == 'foreign' and multiplier == 1").sort_values("layer")
    np.testing.assert_allclose(figure.data[-1].y, curve["mean"])
    np.testing.assert_allclose(result.plot_cosine().data[0].y, result.cosines().frame["cosine"])
    assert result.cosines().by_chance == pytest.approx(1.96 / own.d_model**0.5)
    assert "mean effect own" in repr(result)


def test_a_short_finetune_of_the_real_model_turns_its_vectors_a_little_and_they_still_steer_it(tmp_path):
    train, test = ContrastSet.load("sentiment").split(test=6, seed=0)
    train = train.sample(16, seed=0)
    model = load_model("demo", device="cpu")
    layers = (9, 15, 21)
    file = extract(model, train, layers=layers, progress=False).save(tmp_path / "before.safetensors")
    before = model.blocks[15].mlp.W_in.detach().clone()
    finetune(model, train.sample(4, seed=1), steps=3)
    assert not torch.equal(model.blocks[15].mlp.W_in, before)
    own, foreign = extract(model, train, layers=layers, progress=False), SteeringVectors.load(file)
    result = transfer_models(model, test, own, foreign, multipliers=[1], progress=False)
    cosines = result.cosines().frame["cosine"]
    assert ((cosines > 0.7) & (cosines < 0.9999)).all(), cosines
    effects = result.summary(n_resamples=0).set_index(["vectors", "layer"])["mean"]
    assert effects["foreign", 15] > 0.1
    assert effects["foreign", 15] == pytest.approx(effects["own", 15], rel=0.5)


def finetune(model, pairs, *, steps, rate=1e-4):
    """A few steps of Adam on the positive completions; changes the model in place."""
    prompts = [encode_answer(default_format(model), model.tokenizer, pair.question, pair.positive) for pair in pairs]
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for step in range(steps):
        prompt = prompts[step % len(prompts)]
        tokens = torch.tensor([prompt.tokens])
        with torch.enable_grad():
            logp = model(tokens).log_softmax(-1)[0, prompt.answer_start - 1 : -1]
            loss = -logp.gather(-1, tokens[0, prompt.answer_start :, None]).mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()


def test_vectors_cross_widths_only_by_a_map_and_through_files(tmp_path, demo_tokenizer, tiny_model):
    n_vocab = len(demo_tokenizer)
    wide = tiny_model(d_model=48, d_vocab=n_vocab, n_ctx=512, tokenizer=demo_tokenizer, seed=1)
    read = pair_activations(wide, TEXTS, progress=False).save(tmp_path / "wide.safetensors")
    file = extract(wide, TEXTS, progress=False).save(tmp_path / "vectors.safetensors")
    del wide  # the two models are never in memory together
    narrow = tiny_model(d_vocab=n_vocab, n_ctx=512, tokenizer=demo_tokenizer)
    own, foreign = extract(narrow, TEXTS, progress=False), SteeringVectors.load(file)
    with pytest.raises(
        ValueError, match=r"d_model=48, but tiny-random-llama has d_model=32: fit a linear map .*fit_residual_map"
    ):
        transfer_models(narrow, TEXTS, own, foreign)
    found = fit_residual_map(
        PairActivations.load(read), pair_activations(narrow, TEXTS, progress=False), progress=False
    )
    carried = found.carry(foreign)
    with pytest.warns(TrainingPairsWarning, match="8 of the 8 pairs scored are among those"):
        result = transfer_models(narrow, TEXTS, own, carried, multipliers=[1], progress=False)
    with pytest.warns(TrainingPairsWarning, match="8 of the 8 pairs scored are among those"):
        swept = sweep(narrow, TEXTS, carried, multipliers=[1], progress=False).frame["margin"]
    ours = result.frame[result.frame["vectors"] == "foreign"]["score"]
    np.testing.assert_allclose(ours, swept, atol=2e-5)


def test_pairs_that_either_vectors_were_extracted_from_are_counted_together(tiny_chat):
    own, foreign = (extract(tiny_chat, some, progress=False) for some in (TEXTS[:2], TEXTS[1:5]))
    for vectors, n_pairs in (((own, foreign), 5), ((own, own), 2), ((foreign, own), 5)):
        with pytest.warns(TrainingPairsWarning, match=f"{n_pairs} of the 8 pairs scored are among"):
            transfer_models(tiny_chat, TEXTS, *vectors, multipliers=[1], layers=[1], progress=False)
    transfer_models(tiny_chat, TEXTS[5:], own, foreign, multipliers=[1], layers=[1], progress=False)  # in silence


def test_bad_requests_are_refused(tiny_chat):
    vectors = random_vectors(tiny_chat)
    with pytest.raises(ValueError, match="unknown size 'half': expected one of keep, own"):
        transfer_models(tiny_chat, TEXTS, vectors, vectors, size="half")
    with pytest.raises(ValueError, match="no multipliers given"):
        transfer_models(tiny_chat, TEXTS, vectors, vectors, multipliers=[])
    with pytest.raises(ValueError, match="no layers"):
        transfer_models(tiny_chat, TEXTS, vectors.at([0]), vectors.at([3]))


def test_prompt_format_system_prompt_and_measure_reach_the_scores(tiny_chat):
    own, foreign = random_vectors(tiny_chat, seed=1, behavior="joy"), random_vectors(tiny_chat, seed=2)
    how = {"prompt_format": "llama2-base", "system": "Be brief."}
    result = transfer_models(tiny_chat, TEXTS, own, foreign, layers=[2], multipliers=[2], **how, progress=False)
    swept = sweep(tiny_chat, TEXTS, foreign.at([2]), multipliers=[0, 2], **how, progress=False)
    ours = result.frame[result.frame["vectors"] == "foreign"]["score"]
    np.testing.assert_allclose(ours, swept.frame[swept.frame["multiplier"] == 2]["margin"], atol=2e-5)
    assert result.unsteered == pytest.approx(swept.unsteered, abs=2e-5)
    expected = {name: said for name, said in swept.settings.items() if name not in ("operator", "positions")}
    assert result.settings == {**expected, "size": "keep"}
    assert result.metric == "margin"
    assert set(result.frame["behavior"]) == {"joy"}
    assert list(dict.fromkeys(result.frame["question"])) == list(range(len(TEXTS)))


def test_the_summary_is_of_every_cell_and_the_cosines_of_own_and_foreign(tiny_chat):
    own, foreign = random_vectors(tiny_chat, layers=(0, 2), seed=1), random_vectors(tiny_chat, layers=(0, 2), seed=2)
    result = transfer_models(tiny_chat, TEXTS, own, foreign, progress=False)
    summary = result.summary("score")
    assert list(summary) == ["vectors", "layer", "multiplier", "mean", "low", "high"]
    assert len(summary) == 2 * 2 * 2
    cell = result.frame.query("vectors == 'foreign' and layer == 2 and multiplier == -1")
    row = summary.query("vectors == 'foreign' and layer == 2 and multiplier == -1").iloc[0]
    (low,), (high,) = bootstrap_interval(cell.sort_values("question")["score"].to_numpy()[:, None])
    assert row[["mean", "low", "high"]].tolist() == pytest.approx([cell["score"].mean(), low, high])
    assert not np.allclose(result.summary("score", n_resamples=10, seed=1)["low"], summary["low"])
    assert result.provenance == {"own": own.provenance, "foreign": foreign.provenance}


def test_the_margin_of_letters_can_be_asked_for(tiny_chat):
    letters = ContrastSet.from_pairs(
        [(f"Is {n} good?\n\nChoices:\n (A) Yes\n (B) No", "(A)", "(B)") for n in range(3)],
        name="numbers",
    )
    own, foreign = random_vectors(tiny_chat, layers=[1], seed=1), random_vectors(tiny_chat, layers=[1], seed=2)
    p = transfer_models(tiny_chat, letters, own, foreign, progress=False)
    margin = transfer_models(tiny_chat, letters, own, foreign, measure="margin", progress=False)
    np.testing.assert_allclose(margin.frame["score"], np.log(p.frame["score"] / (1 - p.frame["score"])), atol=1e-5)
    assert (p.metric, margin.metric) == ("p_matching", "margin")


def test_the_budget_and_the_default_multipliers_are_those_of_the_signature(tiny_chat, monkeypatch):
    budgets = []

    def recorded(*given, max_tokens, **how):
        budgets.append(max_tokens)
        return score_answers(*given, max_tokens=max_tokens, **how)

    monkeypatch.setattr(across_models, "score_answers", recorded)
    vectors = random_vectors(tiny_chat, layers=[2])
    result = transfer_models(tiny_chat, TEXTS, vectors, vectors, max_tokens=17, progress=False)
    assert budgets == [17]
    assert result.frame["multiplier"].unique().tolist() == [-1, 1]
