"""What each of the paper's experiments asks of the model, whose scores are stand-ins that tell their condition."""

from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.made_up_scores import (
    random_activations,
)
from helpers.models import tiny_model
from helpers.stand_in_context import CONFIG, LAYER, StandIn
from transformers import AutoTokenizer

from caa_lens.contrast.sets import ContrastSet
from caa_lens.interpretation.pair_geometry import pair_pca, pair_separability
from caa_lens.interpretation.similarity import token_similarity
from caa_lens.interpretation.vector_cosines import cosines
from caa_lens.models.loading.demo_model import demo_model_path
from caa_lens.provenance import Provenance
from caa_lens.steering.generated_text import GeneratedText
from caa_lens.vectors.steering_vectors import SteeringVectors
from experiments.own import vector_words
from experiments.paper import figure_2_contrast_pca as contrast_pca
from experiments.paper import figure_3_layer_sweep as layer_sweep
from experiments.paper import figure_4_multipliers as multipliers
from experiments.paper import figure_5_open_ended as open_ended
from experiments.paper import figure_6_token_similarities as token_similarities
from experiments.paper import figure_7_cross_layer_cosines as cross_layer_cosines
from experiments.paper import figure_8_vector_transfer as vector_transfer
from experiments.paper import figures_9_10_base_to_chat as base_to_chat
from experiments.paper import layer_choice
from experiments.paper import table_3_system_prompts as system_prompts
from experiments.paper import tables_4_10_13_finetuned_text as finetuned_text
from experiments.paper import tables_4_10_13_finetuning as finetuning
from experiments.paper import tables_5_12_knowledge as knowledge
from experiments.running.behavior_sets import behavior_sets
from experiments.running.settings import RunConfig
from experiments.running.units import Unit


@pytest.fixture
def context(tmp_path):
    return StandIn(tmp_path / "run")


@pytest.fixture
def asked(monkeypatch):
    """Calls of `score`: model, test set, conditions, system prompt. Pair p under condition c scores c + p / 1000."""
    calls = []

    def score(model, test, conditions, *, system=None, **_):
        calls.append(SimpleNamespace(model=model, test=test, conditions=list(conditions), system=system))
        places = torch.arange(len(conditions)) + torch.arange(len(test))[:, None] / 1000
        return SimpleNamespace(metric="margin", values=places, settings={"model": model, "test": test.name})

    monkeypatch.setattr("caa_lens.measures.answers.score_answers", score)
    return calls


@pytest.fixture
def generated(monkeypatch):
    """Calls of `generate`: (model, prompts, vectors, max_new_tokens); the answers are the prompts turned round."""
    calls = []

    def generate(model, prompts, *, vectors=(), max_new_tokens, **_):
        calls.append((model, list(prompts), [(v, float(m)) for v, m in vectors], max_new_tokens))
        return [GeneratedText(prompt[::-1], cut=False) for prompt in prompts]

    monkeypatch.setattr("caa_lens.steering.generation.generate", generate)
    return calls


def conditions_by_cell(context, call, frame, labels):
    """{labels of a cell: its condition}, after checking that every question of every cell has its own score."""
    found = {}
    for key, rows in frame.groupby(labels, sort=False):
        (c,) = set(rows["score"].astype(int))
        assert rows["question"].tolist() == list(range(len(call.test)))
        np.testing.assert_allclose(rows["score"], c + np.arange(len(call.test)) / 1000, atol=1e-5)
        found[key] = context.described(call.conditions[c])
    assert len(frame) == len(found) * len(call.test)
    return found


def test_the_layer_sweep_asks_each_swept_layers_own_vector_and_the_unsteered_model(context, asked):
    frame = layer_sweep.run(Unit.of(behavior="refusal"), context)
    (call,) = asked
    assert (call.model, call.system) == ("chat", None)
    assert call.test == context.sets("refusal").test
    assert conditions_by_cell(context, call, frame, ["layer", "multiplier"]) == {
        (-1, 0.0): [],
        **{(x, m): [("refusal", "", "normalised", x, x, m)] for x in (0, 2, 4) for m in (-1.0, 1.0)},
    }
    assert frame.attrs == {"model": "chat", "test": "refusal", "n_layers": 6}
    assert set(frame["metric"]) == {"margin"}


def test_the_layer_choice_asks_the_same_of_validation_pairs(context, asked):
    frame = layer_choice.run(Unit.of(behavior="refusal"), context)
    (call,) = asked
    assert call.test == context.sets("refusal").validation
    assert conditions_by_cell(context, call, frame, ["layer", "multiplier"]) == {
        (-1, 0.0): [],
        **{(x, m): [("refusal", "", "normalised", x, x, m)] for x in (0, 2, 4) for m in (-1.0, 1.0)},
    }


def test_the_layer_of_the_settings_goes_before_the_chosen_one(context):
    assert layer_choice.chosen_layer(context) == LAYER
    context.config = CONFIG.model_copy(update={"layer": 5})
    assert layer_choice.chosen_layer(context) == 5
    assert layer_choice.skip(context.config) == "the settings name layer 5"


def test_validation_pairs_are_neither_extracted_from_nor_reported():
    for given in ({}, {"n_generate": 120}, {"size": "paper", "n_test": 30}):
        config = RunConfig.of("demo", **given)
        for behavior in config.behaviors:
            sets = behavior_sets(config, behavior)
            parts = [set(part.pair_hashes) for part in (sets.generate, sets.validation, sets.test)]
            assert len(set.union(*parts)) == sum(map(len, parts))
            assert len(sets.validation) == config.n_validation
    named = RunConfig.of("demo", layer=4)
    assert behavior_sets(named, "sentiment").validation is None
    assert behavior_sets(named, "sentiment").generate == behavior_sets(RunConfig.of("demo"), "sentiment").generate


def test_a_set_that_is_too_small_to_choose_on_is_told_of():
    with pytest.raises(ValueError, match="104 pairs beside the held-out ones, expected more than the 200"):
        behavior_sets(RunConfig.of("demo", n_validation=200), "sentiment")


def test_multipliers_ask_the_chosen_layers_vector_at_five_strengths(context, asked):
    frame = multipliers.run(Unit.of(behavior="sentiment"), context)
    (call,) = asked
    assert call.test == context.sets("sentiment").test
    assert conditions_by_cell(context, call, frame, ["layer", "multiplier"]) == {
        (3, m): [("sentiment", "", "normalised", 3, 3, m)] if m else [] for m in (-1.0, -0.5, 0.0, 0.5, 1.0)
    }


def test_a_moved_vector_is_the_chosen_layers_own_at_every_swept_layer_and_at_its_own(context, asked):
    frame = vector_transfer.run(Unit.of(behavior="refusal"), context)
    (call,) = asked
    assert call.test == context.sets("refusal").test
    assert conditions_by_cell(context, call, frame, ["source", "layer", "multiplier"]) == {
        (3, x, m): [("refusal", "", "normalised", 3, x, m)] for x in (0, 2, 3, 4) for m in (-1.0, 1.0)
    }


def test_base_vectors_are_asked_of_the_chat_model_layer_by_layer(context, asked):
    frame = base_to_chat.run_transfer(Unit.of(behavior="refusal"), context)
    (call,) = asked
    assert (call.model, call.system) == ("chat", None)
    assert conditions_by_cell(context, call, frame, ["layer", "multiplier"]) == {
        (x, m): [("refusal", "base-", "normalised", x, x, m)] for x in (0, 2, 4) for m in (-1.0, 1.0)
    }


def test_system_prompts_are_put_before_all_multipliers(context, asked):
    for side in ("positive", "none"):
        frame = system_prompts.run(Unit.of(behavior="refusal", system=side), context)
        call = asked[-1]
        assert conditions_by_cell(context, call, frame, ["layer", "multiplier"]) == {
            (3, m): [("refusal", "", "normalised", 3, 3, m)] if m else [] for m in (-1.0, 0.0, 1.0)
        }
    assert [call.system is None for call in asked] == [False, True]


def test_taught_text_is_the_units_own_multiplier_measured_by_the_untaught_model(context, monkeypatch):
    calls = []

    def measure_texts(model, frame, **_):
        calls.append(model)
        return frame

    monkeypatch.setattr("caa_lens.measures.open_ended.text_measures.measure_texts", measure_texts)
    unit = {"behavior": "refusal", "finetune": "positive"}
    texts = pd.DataFrame(
        {"prompt": [0, 1] * 3, "multiplier": [-1.0, -1.0, 0.0, 0.0, 1.0, 1.0], "answer": list("abcdef")}
    )
    context.folder.write_frame(finetuning.answers_file(context.folder, Unit.of(**unit)), texts)
    frame = finetuned_text.run(Unit.of(**unit, multiplier=1.0), context)
    assert frame["answer"].to_dict() == {0: "e", 1: "f"}
    assert calls == ["chat"]


def test_the_positive_system_prompt_asks_for_the_behavior_and_the_negative_one_against_it():
    words = {
        "sentiment": ("cheerful", "bitter"),
        "formality": ("formally", "casually"),
        "refusal": ("decline every", "fulfil every"),
        "sycophancy": ("agree", "what is true"),
    }
    assert set(words) == set(system_prompts.OF_BUNDLED)
    for behavior, (for_it, against_it) in words.items():
        assert for_it in system_prompts.system_prompt(CONFIG, behavior, "positive")
        assert against_it in system_prompts.system_prompt(CONFIG, behavior, "negative")


def test_a_taught_model_is_scored_and_answers_at_three_multipliers(context, asked, generated, monkeypatch):
    model, taught = SimpleNamespace(tokenizer=None), []
    monkeypatch.setattr("caa_lens.prompts.prompt_formats.resolve_format", lambda *_: "the format")
    monkeypatch.setattr(finetuning, "letters_of", lambda _, pairs, side, *more: [(side, n) for n in range(len(pairs))])
    monkeypatch.setattr(finetuning, "teach", lambda *given, rate: taught.append((*given, rate)))
    context.load, context.release = lambda name, **_: model if name == "demo" else None, lambda: None
    unit = Unit.of(behavior="refusal", finetune="negative")
    frame = finetuning.run(unit, context)
    order = np.random.default_rng(CONFIG.seed).permutation(len(context.sets("refusal").generate))
    assert taught == [(model, [("negative", n) for n in order], 1e-4)]
    (call,) = asked
    assert (call.model, call.test, call.system) == (model, context.sets("refusal").test, None)
    assert conditions_by_cell(context, call, frame, ["layer", "multiplier"]) == {
        (3, m): [("refusal", "", "normalised", 3, 3, m)] if m else [] for m in (-1.0, 0.0, 1.0)
    }
    texts = pd.read_parquet(finetuning.answers_file(context.folder, unit))
    prompts = list(context.sets("refusal").open_ended)
    assert texts["multiplier"].tolist() == [m for m in (-1.0, 0.0, 1.0) for _ in prompts]
    assert texts["question"].tolist() == 3 * prompts
    assert texts["answer"].tolist() == 3 * [prompt[::-1] for prompt in prompts]
    assert all(each is model for each, *_ in generated)
    assert [[m for _, m in vectors] for _, _, vectors, _ in generated] == [[-1.0], [], [1.0]]
    context.changed["refusal"] = replace(context.sets("refusal"), open_ended=())
    other = Unit.of(behavior="refusal", finetune="positive")
    finetuning.run(other, context)
    assert not finetuning.answers_file(context.folder, other).exists()


def test_knowledge_is_asked_with_each_questions_own_category(context, asked, monkeypatch):
    pairs = ContrastSet.from_pairs([(f"Question {n}?", "yes", "no") for n in range(3)], name="facts")
    monkeypatch.setattr("caa_lens.paper.questions.load_paper_questions", lambda name: (pairs, ("a", "b", "a")))
    frame = knowledge.run_on("mmlu", Unit.of(behavior="sentiment"), context)
    (call,) = asked
    assert call.test == pairs
    assert conditions_by_cell(context, call, frame, ["layer", "multiplier"]) == {
        (3, m): [("sentiment", "", "normalised", 3, 3, m)] if m else [] for m in (-2.0, -1.0, 0.0, 1.0, 2.0)
    }
    assert frame["category"].tolist() == ["a", "b", "a"] * 5


def test_answers_are_of_all_prompts_in_order_ten_at_a_time(context, generated, monkeypatch):
    prompts = tuple(f"Tell me about {n}." for n in range(23))
    context.changed["refusal"] = replace(context.sets("refusal"), open_ended=prompts)
    measured = []

    def measure_texts(model, frame, **_):
        measured.append(model)
        return frame.assign(sentiment=0.5)

    monkeypatch.setattr("caa_lens.measures.open_ended.text_measures.measure_texts", measure_texts)
    frame = open_ended.run(Unit.of(behavior="refusal", multiplier=-1.5), context)
    assert frame["prompt"].tolist() == list(range(23))
    assert frame["question"].tolist() == list(prompts)
    assert frame["answer"].tolist() == [prompt[::-1] for prompt in prompts]
    assert (set(frame["layer"]), set(frame["multiplier"])) == ({3}, {-1.5})
    assert [len(prompts) for _, prompts, _, _ in generated] == [10, 10, 3]
    vector = context.vectors("refusal")[3]
    for model, _, vectors, n_new in generated:
        assert (model, n_new) == ("chat", CONFIG.max_new_tokens)
        assert [(v.layer, m) for v, m in vectors] == [(3, -1.5)]
        assert torch.equal(vectors[0][0].direction, vector.direction)
    assert measured == ["chat"]
    open_ended.answers("another", "refusal", 0.0, context)
    assert generated[-1][::2] == ("another", [])  # unsteered


def test_vector_words_reads_the_swept_layers_and_the_last(context, monkeypatch):
    calls = []

    def logit_lens(model, vectors, **how):
        calls.append((model, vectors, how))
        return SimpleNamespace(frame="the frame")

    monkeypatch.setattr("caa_lens.interpretation.lens.logit_lens", logit_lens)
    assert vector_words.run(Unit.of(behavior="refusal", reading="in_context"), context) == "the frame"
    ((model, vectors, how),) = calls
    assert (model, vectors) == ("chat", context.vectors("refusal"))
    assert how.pop("pairs") == context.sets("refusal").test.sample(10, seed=3)
    assert how == {"k": 8, "layers": [0, 2, 5], "reading": "in_context"}
    few = context.sets("sentiment").test[:4]
    context.changed["sentiment"] = replace(context.sets("sentiment"), test=few)
    vector_words.run(Unit.of(behavior="sentiment", reading="normed"), context)
    assert sorted(calls[-1][2]["pairs"].pairs, key=str) == sorted(few.pairs, key=str)
    assert calls[-1][2]["reading"] == "normed"


def test_cosines_are_of_the_vectors_as_extracted(context):
    unit = Unit.of(behavior="refusal")
    chat, base = context.raw_vectors("refusal"), context.raw_vectors("refusal", "base-")
    frame = base_to_chat.run_cosines(unit, context)
    pd.testing.assert_frame_equal(frame, cosines(base, chat, same_layer=True).frame)
    np.testing.assert_allclose(frame["cosine"], torch.cosine_similarity(base.directions, chat.directions), atol=1e-5)
    assert frame.attrs == {"d_model": 8, "vectors": [asdict(base.provenance), asdict(chat.provenance)]}
    across = cross_layer_cosines.run(unit, context)
    pd.testing.assert_frame_equal(across, cosines(chat).frame)
    assert across.attrs == {"vectors": asdict(chat.provenance)}


def test_base_vectors_are_extracted_from_the_base_model_into_files_of_their_own(context, monkeypatch):
    calls = []

    def extract(model, pairs, **_):
        calls.append((model, pairs))
        return context.raw_vectors("refusal", "base-")

    monkeypatch.setattr("caa_lens.vectors.extraction.extract", extract)
    frame = base_to_chat.run_vectors(Unit.of(behavior="refusal"), context)
    assert calls == [("base", context.sets("refusal").generate)]
    np.testing.assert_allclose(frame["norm"], context.raw_vectors("refusal", "base-").norms)
    assert not context.folder.vectors_file("refusal").exists()
    assert context.folder.vectors_file("refusal", "base-").exists()


@pytest.mark.parametrize(("n_layers", "panels"), [(4, (0, 1, 2, 3)), (15, (0, 4, 8, 12)), (16, tuple(range(0, 16, 2)))])
def test_separation_is_of_the_pairs_that_vectors_are_made_from(tmp_path, monkeypatch, n_layers, panels):
    context = StandIn(tmp_path / "run", CONFIG.model_copy(update={"layer_step": 1}), n_layers)
    layers, read = tuple(range(n_layers)), []

    def pair_activations(model, pairs, *, layers, **_):
        read.append((model, pairs, layers))
        return random_activations(layers)

    monkeypatch.setattr("caa_lens.engine.pair_reading.pair_activations", pair_activations)
    drawn = contrast_pca.run(Unit.of(behavior="refusal", what="pca"), context)
    activations = random_activations(layers)
    pd.testing.assert_frame_equal(drawn, pair_pca(activations, layers=panels).frame)
    about = {"n_layers": n_layers, "activations": asdict(activations.provenance)}
    assert drawn.attrs == about
    if n_layers == 4:
        parts = contrast_pca.run(Unit.of(behavior="refusal", what="separability"), context)
        expected = pair_separability(activations, seed=3, progress=False)
        pd.testing.assert_frame_equal(parts, expected.frame)
        assert parts.attrs == {"emergence": expected.emergence, "chance": expected.chance, **about}
    assert read == [("chat", context.sets("refusal").generate, layers)]  # once, for both


def test_similar_tokens_are_of_the_own_answers_and_of_both_answers_of_pairs(tmp_path, generated):
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    context, model = StandIn(tmp_path / "run"), tiny_model(d_vocab=len(tokenizer), n_ctx=512, tokenizer=tokenizer)
    context.model = model
    directions = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    about = Provenance(behavior="refusal")
    context.made["refusal", "", "normalised"] = SteeringVectors(
        directions=directions, layers=tuple(range(5)), provenance=about
    )
    vector = context.vectors("refusal")[3]
    prompts = ("What is tea?", "What is a tree?", "What is a stone?")
    context.changed["refusal"] = replace(context.sets("refusal"), open_ended=prompts)

    frame = token_similarities.run(Unit.of(behavior="refusal", texts="answers"), context)
    assert generated == [(model, list(prompts[:2]), [], CONFIG.max_new_tokens)]
    assert list(dict.fromkeys(zip(frame["text"], frame["side"], strict=True))) == [(0, "own"), (1, "own")]
    whole = token_similarity(model, prompts[1], vector, answer=prompts[1][::-1])
    part = frame[frame["text"] == 1]
    np.testing.assert_allclose(part["cosine"], whole.frame["cosine"], atol=1e-6)
    assert part["piece"].tolist() == list(whole.pieces)
    assert part["in_answer"].tolist() == [i >= whole.answer_start for i in range(len(part))]

    pairs = context.sets("refusal").test.pairs
    assert len(pairs) > 10
    frame = token_similarities.run(Unit.of(behavior="refusal", texts="pairs"), context)
    both = ("matching", "not matching")
    texts = list(dict.fromkeys(zip(frame["text"], frame["side"], strict=True)))
    assert texts == [(i, side) for i in range(10) for side in both]
    pair = pairs[4]
    for side, letter in zip(both, (pair.positive, pair.negative), strict=True):
        bare = pair.question.split("\n\nChoices:")[0]
        whole = token_similarity(model, bare, vector, answer=pair.options[letter])
        part = frame[(frame["text"] == 4) & (frame["side"] == side)]
        np.testing.assert_allclose(part["cosine"], whole.frame["cosine"], atol=1e-6)


def test_a_question_is_shown_without_its_options():
    for options in ("\n\nChoices:\n (A) Yes\n (B) No", "\n (A) Yes\n (B) No"):
        pair = ContrastSet.from_pairs([("Is it?" + options, "(A)", "(B)")]).pairs[0]
        assert token_similarities.question(pair) == "Is it?"
