"""Each of the paper's experiments by itself: what it asks of the model, and what it says of numbers that are known.

No model runs here, but for one small random one. The runs' scores are stand-ins that tell which condition they are of;
the sections get made-up frames, and every sentence and table is computed here a second time.
"""

from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.models import tiny_model
from transformers import AutoTokenizer

from caa_lens.contrast.sets import ContrastSet
from caa_lens.engine.pair_reading import PairActivations
from caa_lens.interpretation.cosine_maps import ModelCosines, cosine_map, model_cosines
from caa_lens.interpretation.pair_geometry import PairPCA, PairSeparability, pair_pca, pair_separability
from caa_lens.interpretation.similarity import token_similarity
from caa_lens.measures.intervals import bootstrap_interval
from caa_lens.models.loading.demo_model import demo_model_path
from caa_lens.paper.numbers import published
from caa_lens.provenance import Provenance
from caa_lens.vectors.steering_vectors import SteeringVectors
from experiments import (
    base_to_chat,
    comparison,
    contrast_pca,
    cross_layer_cosines,
    finetuned_text,
    finetuning,
    knowledge,
    layer_sweep,
    measures,
    multipliers,
    open_ended,
    system_prompts,
    token_similarities,
    vector_transfer,
    vector_words,
)
from experiments.catalogue import EXPERIMENTS
from experiments.paper.figure_4_multipliers import rise
from experiments.paper.figure_5_judged import EXPERIMENT as JUDGED
from experiments.running.behavior_sets import behavior_sets
from experiments.running.costs import Cost, generation_cost, reading_cost, scoring_cost, tokens_of
from experiments.running.identity import content_hash, prompts_hash
from experiments.running.run_folder import RunFolder
from experiments.running.settings import RunConfig
from experiments.running.units import Unit

BY_NAME = {experiment.name: experiment for experiment in EXPERIMENTS}
NBSP = "\N{NO-BREAK SPACE}"
CONFIG = RunConfig.of("demo", behaviors=("sentiment", "refusal"), layer_step=2, seed=3)
PAPER_7B = RunConfig.of("meta-llama/Llama-2-7b-chat-hf", "paper", behaviors=("refusal", "hallucination"))
N_LAYERS, LAYER = 6, 3  # the chosen layer is none of the swept 0, 2, 4


class StandIn:
    """A context without a model: vectors by (behavior, which, how), and the sets of the run's settings."""

    def __init__(self, path, config=CONFIG, n_layers=N_LAYERS):
        self.config, self.n_layers, self.layer = config, n_layers, LAYER
        self.folder = RunFolder(path)
        self.model, self.base_model = "chat", "base"
        self.kept, self.changed = {}, {}
        self.made = {}
        for i, (behavior, which, how) in enumerate(
            (b, which, how) for b in config.behaviors for which in ("", "base-") for how in ("raw", "normalised")
        ):
            directions = torch.randn(n_layers, 8, generator=torch.Generator().manual_seed(i))
            about = Provenance(model=f"{which}chat", behavior=behavior, expression=how)
            self.made[behavior, which, how] = SteeringVectors(
                directions=directions, layers=tuple(range(n_layers)), provenance=about
            )

    @property
    def swept_layers(self):
        return tuple(range(0, self.n_layers, self.config.layer_step))

    def sets(self, behavior):
        return self.changed.get(behavior) or behavior_sets(self.config, behavior)

    def raw_vectors(self, behavior, which=""):
        return self.made[behavior, which, "raw"]

    def vectors(self, behavior, which=""):
        return self.made[behavior, which, "normalised"]

    def once(self, slot, key, make):
        if (slot, key) not in self.kept:
            self.kept[slot, key] = make()
        return self.kept[slot, key]

    def described(self, condition):
        """[(behavior, which, how, the vector's own layer, where it is added, multiplier)] of a condition."""
        return [
            (*name, layer, step.vector.layer, float(step.multiplier))
            for step in condition
            for name, vectors in self.made.items()
            for layer in vectors.layers
            if torch.equal(vectors[layer].direction, step.vector.direction) and step.operator == "add"
        ]


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

    monkeypatch.setattr("caa_lens.measures.answers.score", score)
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


# ---- what runs ask ---------------------------------------------------------------------------------------------


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
    monkeypatch.setattr("caa_lens.prompts.formats.resolve_format", lambda *_: "the format")
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


@pytest.fixture
def generated(monkeypatch):
    """Calls of `generate`: (model, prompts, vectors, max_new_tokens); the answers are the prompts turned round."""
    calls = []

    def generate(model, prompts, *, vectors=(), max_new_tokens, **_):
        calls.append((model, list(prompts), [(v, float(m)) for v, m in vectors], max_new_tokens))
        return [prompt[::-1] for prompt in prompts]

    monkeypatch.setattr("caa_lens.steering.generation.generate", generate)
    return calls


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
    pd.testing.assert_frame_equal(frame, model_cosines(base, chat).frame)
    np.testing.assert_allclose(frame["cosine"], torch.cosine_similarity(base.directions, chat.directions), atol=1e-5)
    assert frame.attrs == {"d_model": 8, "vectors": [asdict(base.provenance), asdict(chat.provenance)]}
    across = cross_layer_cosines.run(unit, context)
    pd.testing.assert_frame_equal(across, cosine_map(chat).frame)
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


def random_activations(layers, n_pairs=12):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(n_pairs, 2, len(layers), 8, generator=generator)
    values[:, 0] += torch.linspace(0, 3, len(layers))[:, None]
    return PairActivations(
        values=values,
        norms=values.norm(dim=-1),
        layers=layers,
        letters=(("A", "B"), ("B", "A")) * (n_pairs // 2),
        provenance=Provenance(model="chat", behavior="refusal"),
    )


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


# ---- sections: what is said of numbers -------------------------------------------------------------------------

N = 9
SPREAD = np.array([3.0, -1, 0.5, 2, -4, 1, -2.5, 4, -3])  # of the questions: sums to 0, its median is not 0


def scores_of(levels, names, metric="margin", **columns):
    """Rows of a run: {labels of a cell: mean}. A question's spread grows with its cell, so that intervals are wide."""
    parts = []
    for i, (key, mean) in enumerate(levels.items()):
        labels = dict(zip(names, key if isinstance(key, tuple) else (key,), strict=True))
        scores = mean + 0.01 * (i + 1) * SPREAD
        parts.append(pd.DataFrame({**labels, "question": range(N), "metric": metric, "score": scores, **columns}))
    return pd.concat(parts, ignore_index=True)


def values_of(frame, column="score", **cell):
    for name, value in cell.items():
        frame = frame[frame[name] == value]
    return frame.sort_values("question")[column].to_numpy()


def with_interval(values):
    (low,), (high,) = bootstrap_interval(np.asarray(values)[:, None])
    return float(np.mean(values)), low, high


def effect_of(frame, **cell):
    return with_interval(values_of(frame, multiplier=1.0, **cell) - values_of(frame, multiplier=-1.0, **cell))


def cell_text(frame, digits=3, **cell):
    mean, low, high = with_interval(values_of(frame, **cell))
    return f"{mean:.{digits}f} [{low:.{digits}f},{NBSP}{high:.{digits}f}]"


def section_of(name, frames, config):
    """An experiment's section, which has the experiment's own heading."""
    section = BY_NAME[name].section(frames, config)
    assert (section.title, section.source) == (BY_NAME[name].title, BY_NAME[name].source)
    return section


def tables_of(section):
    return dict(section.captioned_tables())


def swept(best, n_layers=5, metric="margin", scale=1.0):
    """A layer sweep whose largest effect is at `best`; layer 0 works the other way round."""
    effects = {x: scale * (-2.0 if x == 0 else 1.0 / (1 + abs(x - best))) for x in range(n_layers)}
    levels = {(-1, 0.0): 0.2} | {(x, m): 0.2 + m * effect / 2 for x, effect in effects.items() for m in (-1.0, 1.0)}
    frame = scores_of(levels, ["layer", "multiplier"], metric)
    frame.attrs["n_layers"] = n_layers
    return frame


def test_the_layer_sweep_names_each_behaviors_best_layer_with_its_interval():
    frames = {Unit.of(behavior="z"): swept(3), Unit.of(behavior="a"): swept(1, metric="p_matching", scale=0.1)}
    section = section_of("layer_sweep", frames, CONFIG.model_copy(update={"layer": 4}))
    (table,) = tables_of(section).values()
    assert table["behavior"].tolist() == ["z", "a"]
    assert table["best layer"].tolist() == [3, 1]
    assert table["metric"].tolist() == ["margin", "p_matching"]
    for (unit, frame), row, said in zip(frames.items(), table.to_dict("records"), section.found[1:], strict=True):
        mean, low, high = effect_of(frame, layer=row["best layer"])
        assert (row["effect"], row["95 % low"], row["95 % high"]) == pytest.approx((mean, low, high))
        verdict = "includes" if low < 0 < high else "excludes"
        assert said == (
            f"{unit['behavior']}: largest at layer {row['best layer']}, {mean:+.3f} (95 % interval {low:.3f} to "
            f"{high:.3f}, which {verdict} 0)."
        )
    best = layer_sweep.best_layer(frames)
    assert section.found[0] == (
        "Largest effect over all behaviors, in standard deviations of the unsteered scores: layer "
        f"{best} ({best / 4:.0%} of the depth). Single-layer experiments of this run steer at layer 4."
    )
    chosen = section_of("layer_sweep", frames, CONFIG)
    assert chosen.found[0].endswith(f"steer at layer {best}.")
    assert len(section.figures) == 4  # effects and levels, of margins and of probabilities


def test_an_interval_is_said_to_exclude_0_on_either_side():
    rows = pd.DataFrame({"behavior": ["up", "down", "wide"], "layer": 1, "mean": [1.0, -1.0, 0.5]})
    rows = rows.assign(low=[0.5, -2.0, -0.1], high=[2.0, -0.5, 1.0])
    assert [line.split("which ")[1] for line in layer_sweep._shown(rows)] == [
        "excludes 0).",
        "excludes 0).",
        "includes 0).",
    ]


def test_the_best_layer_is_of_the_largest_effect_not_of_the_largest_size():
    assert layer_sweep.best_layer({Unit.of(behavior="a"): swept(3)}) == 3  # layer 0 moves further, the other way


def test_multipliers_are_shown_with_intervals_and_whether_they_rise():
    levels = {-1.0: 0.1, -0.5: 0.3, 0.0: 0.2, 0.5: 0.4, 1.0: 0.35}
    rising = {m: 0.5 + 0.1 * m for m in levels}
    frames = {
        Unit.of(behavior="z"): scores_of({(2, m): x for m, x in levels.items()}, ["layer", "multiplier"]),
        Unit.of(behavior="a"): scores_of({(2, m): rising[m] for m in (0.5, -1.0, 0.0, 1.0)}, ["layer", "multiplier"]),
    }
    section = section_of("multipliers", frames, CONFIG)
    assert section.text.startswith("The layer-2 vector")
    assert section.found == [
        "z: the score does not rise at the steps to 0, 1; 0.100 at -1, 0.350 at +1.",
        "a: the score rises at every step; 0.400 at -1, 0.600 at +1.",
    ]
    (table,) = tables_of(section).values()
    frame = frames[Unit.of(behavior="z")]
    assert table.iloc[0].to_dict() == {
        "behavior": "z",
        "metric": "margin",
        **{f"{m:+g}" if m else "0": cell_text(frame, multiplier=m) for m in levels},
    }


def test_a_step_that_stays_level_is_no_rise():
    rows = pd.DataFrame({"multiplier": [-1.0, 0.0, 1.0], "mean": [0.5, 0.5, 0.75]})
    assert rise("b", rows) == "b: the score does not rise at the step to 0; 0.500 at -1, 0.750 at +1."


def test_a_moved_vectors_effect_is_told_at_its_own_and_at_the_best_layer():
    frames = {}
    for behavior, best in (("z", 4), ("a", 1)):
        frames[Unit.of(behavior=behavior)] = swept(best).query("layer >= 0").assign(source=2)
    section = section_of("vector_transfer", frames, CONFIG)
    assert section.text.startswith("The layer-2 vector added")
    for (unit, frame), best, said in zip(frames.items(), (4, 1), section.found, strict=True):
        (own, low, high), (most, from_, to) = effect_of(frame, layer=2), effect_of(frame, layer=best)
        assert said == (
            f"{unit['behavior']}: effect {own:+.3f} [{low:.3f}, {high:.3f}] at its own layer 2, largest at layer "
            f"{best}, {most:+.3f} [{from_:.3f}, {to:.3f}]."
        )


def test_base_vectors_best_layer_is_told_with_its_interval():
    frames = {Unit.of(behavior="z"): swept(3).query("layer >= 0"), Unit.of(behavior="a"): swept(1).query("layer >= 0")}
    section = section_of("base_transfer", frames, CONFIG)
    expected = []
    for (unit, frame), best in zip(frames.items(), (3, 1), strict=True):
        mean, low, high = effect_of(frame, layer=best)
        expected.append(f"{unit['behavior']}: largest effect at layer {best}, {mean:+.3f} [{low:.3f}, {high:.3f}].")
    assert section.found == expected
    assert (section.title, section.source) == ("Base vectors in the chat model", "Figure 10")


def test_base_cosines_are_told_at_their_peak_and_at_the_end():
    base, chat = Provenance(model="base"), Provenance(model="chat")
    frame = pd.DataFrame({"layer": [0, 1, 2], "cosine": [0.2, 0.9, 0.4]})
    frame.attrs |= {"d_model": 8, "vectors": [asdict(base), asdict(chat)]}
    section = section_of("base_cosines", {Unit.of(behavior="b"): frame}, CONFIG)
    assert section.found == ["b: largest at layer 1 (0.90), 0.40 at the last layer."]
    (figure,) = section.figures
    assert figure.to_json() == ModelCosines(frame=frame, d_model=8, vectors=(base, chat)).plot().to_json()


def test_the_base_vectors_section_is_the_norms_under_its_own_title():
    norms = pd.DataFrame({"layer": [0, 1], "norm": [1.0, 2.0], "n_pairs": 7})
    section = section_of("base_vectors", {Unit.of(behavior="b"): norms}, CONFIG)
    assert (section.title, section.source) == ("Steering vectors of the base model", "Section 7")
    (table,) = tables_of(section).values()
    assert table[["behavior", "n_pairs"]].to_dict("records") == [{"behavior": "b", "n_pairs": 7}]


def test_effects_are_told_by_system_prompt():
    frames = {}
    for behavior, shift in (("z", 0.0), ("a", 0.3)):
        for i, side in enumerate(system_prompts.SIDES):
            levels = {(2, m): shift + 0.1 * i + 0.05 * (i + 1) * m for m in (-1.0, 0.0, 1.0)}
            frames[Unit.of(behavior=behavior, system=side)] = scores_of(levels, ["layer", "multiplier"])
    section = section_of("system_prompts", frames, CONFIG)
    assert "with the layer-2 vector at -1, 0 and +1" in section.text
    for behavior, said in zip(("z", "a"), section.found, strict=True):
        parts = []
        for side in ("positive", "negative", "none"):
            mean, low, high = effect_of(frames[Unit.of(behavior=behavior, system=side)])
            parts.append(f"{side} {mean:+.3f} [{low:.3f}, {high:.3f}]")
        assert said == f"{behavior}: effect of +1 against -1 by system prompt: {', '.join(parts)}."
    (table,) = tables_of(section).values()
    assert table["system"].tolist() == ["positive", "negative", "none"] * 2
    frame = frames[Unit.of(behavior="a", system="negative")]
    assert table.iloc[4].to_dict() == {
        "behavior": "a",
        "metric": "margin",
        "system": "negative",
        **{label: cell_text(frame, multiplier=m) for label, m in (("-1", -1.0), ("0", 0.0), ("+1", 1.0))},
    }


def paper_scores(table, columns):
    """Frames of units whose means are the paper's own numbers of a table, `columns` being what parts the units."""
    numbers = published(table, PAPER_7B.model_name)
    frames = {}
    for key, rows in numbers.groupby(columns, sort=False):
        rest = [name for name in ("layer", "multiplier") if name in rows]
        levels = dict(zip(map(tuple, rows[rest].to_numpy()), rows["value"], strict=True))
        frame = scores_of(levels, rest, "p_matching").assign(category="c", source=13)
        frame["layer"] = frame["layer"].astype(int) if "layer" in frame else 13
        frame.attrs["n_layers"] = 32
        frames[Unit.of(**dict(zip(columns, key, strict=True)))] = frame
    return frames, len(numbers)


@pytest.mark.parametrize(
    ("table", "columns", "name"),
    [
        ("ab", ["behavior"], "multipliers"),
        ("system_prompt", ["behavior", "system"], "system_prompts"),
        ("layer_transfer", ["behavior"], "vector_transfer"),
        ("base_to_chat_transfer", ["behavior"], "base_transfer"),
        ("mmlu", ["behavior"], "mmlu"),
        ("truthful_qa", ["behavior"], "truthful_qa"),
        ("finetune_ab", ["behavior", "finetune"], "finetuning"),
    ],
)
def test_each_section_meets_every_cell_of_the_papers_own_table(table, columns, name):
    frames, n_cells = paper_scores(table, columns)
    beside = tables_of(section_of(name, frames, PAPER_7B))["Beside the paper's, cell by cell"]
    assert len(beside) == n_cells
    assert beside["difference"].abs().max() < 1e-4
    assert set(beside["paper within interval"]) == {"yes"}
    assert "Beside the paper's, cell by cell" not in tables_of(section_of(name, frames, CONFIG))


def test_nothing_stands_beside_the_paper_where_it_has_no_table_or_there_are_no_cells():
    cells = pd.DataFrame(
        {"behavior": ["refusal"], "layer": 13, "multiplier": 1.0, "mean": 0.5, "low": 0.4, "high": 0.6}
    )
    assert [caption for caption, _ in comparison.paper_tables(cells, "ab", PAPER_7B)] == [
        "Beside the paper's, cell by cell"
    ]
    assert comparison.paper_tables(cells[:0], "ab", PAPER_7B) == []
    assert comparison.paper_tables(cells, "ab", CONFIG) == []
    assert not comparison.has_paper_numbers("ab", PAPER_7B.model_copy(update={"data": "bundled"}))
    assert not comparison.has_paper_numbers(
        "finetune_ab", PAPER_7B.model_copy(update={"model": "m/Llama-2-13b-chat-hf"})
    )


def test_numbers_beside_the_paper_are_rounded_and_one_answer_has_no_interval():
    cells = pd.DataFrame({"behavior": "refusal", "metric": "p_matching", "layer": 13, "multiplier": [-0.5, 0.5]})
    cells = cells.assign(mean=0.123456, low=[np.nan, 0.0], high=[np.nan, 0.111149])
    shown = comparison.beside_the_paper(cells, "ab", PAPER_7B)
    assert list(shown) == [
        *("behavior", "layer", "multiplier", "ours", "95 % low", "95 % high", "paper", "difference"),
        "paper within interval",
    ]
    assert shown["ours"].tolist() == [0.1235, 0.1235]
    assert shown["95 % high"].tolist()[1] == 0.1111
    assert shown["multiplier"].tolist() == [-0.5, 0.5]
    assert shown["paper within interval"].tolist() == ["", "no"]


def test_a_grid_has_its_rows_and_columns_in_the_order_of_the_cells():
    cells = pd.DataFrame(
        {
            "behavior": ["z", "z", "a", "a"],
            "side": ["right", "left", "right", "left"],
            "mean": [0.25, 1, 2, 3],
            "low": [0.5, 1, 2, 3],
            "high": [0.75, 1, 2, 3],
        }
    )
    shown = comparison.grid(cells, ["behavior"], "side", digits=2)
    assert shown.to_dict("list") == {
        "behavior": ["z", "a"],
        "right": [f"0.25 [0.50,{NBSP}0.75]", f"2.00 [2.00,{NBSP}2.00]"],
        "left": [f"1.00 [1.00,{NBSP}1.00]", f"3.00 [3.00,{NBSP}3.00]"],
    }
    assert shown.columns.name is None


def test_means_and_effects_are_over_questions_in_the_order_of_the_behaviors():
    levels = {(x, m): x + m for x in (5, 2) for m in (-2.0, 0.0, 2.0)}
    frames = {
        Unit.of(behavior="z"): scores_of(levels, ["layer", "multiplier"]),
        Unit.of(behavior="a"): scores_of(levels, ["layer", "multiplier"], "p_matching"),
    }
    means = measures.means(frames, ["layer", "multiplier"])
    assert list(means) == ["behavior", "metric", "layer", "multiplier", "mean", "low", "high"]
    assert list(dict.fromkeys(zip(means["behavior"], means["metric"], strict=True))) == [
        ("z", "margin"),
        ("a", "p_matching"),
    ]
    frame = frames[Unit.of(behavior="a")]
    row = means[(means["behavior"] == "a") & (means["layer"] == 2) & (means["multiplier"] == 2)].iloc[0]
    expected = with_interval(values_of(frame, layer=2, multiplier=2.0))
    assert row[["mean", "low", "high"]].tolist() == pytest.approx(expected)
    assert measures.means(frames, ["layer", "multiplier"], value="question")["mean"].unique() == pytest.approx([4])
    each = measures.effects(frames, ["layer"], multiplier=2.0)
    assert list(each) == ["behavior", "metric", "layer", "question", "effect"]
    assert list(dict.fromkeys(each["behavior"])) == ["z", "a"]
    cell = each[(each["behavior"] == "a") & (each["layer"] == 5)]
    difference = values_of(frame, layer=5, multiplier=2.0) - values_of(frame, layer=5, multiplier=-2.0)
    np.testing.assert_allclose(cell.sort_values("question")["effect"], difference)


def test_text_is_told_by_its_mean_measures_at_the_ends_and_unsteered():
    parts = {}
    for behavior, shift in (("z", 0.0), ("a", 0.25)):
        for m in reversed(open_ended.MULTIPLIERS):
            rows = pd.DataFrame({"prompt": [0, 1, 2], "question": ["q0", "q1", "q2"], "layer": 2})
            rows["answer"] = [f"{behavior}{prompt}{m:g}" for prompt in range(3)]
            rows["sentiment"] = np.array([0.0, 0.1, 0.5]) + shift + m / 8
            rows["repetition"] = np.array([0.0, 0.3, 0.6]) + shift / 2
            rows["distinct_2"], rows["n_tokens"] = 0.5, [3, 4, 8]
            rows["mean_logp"] = [np.nan] * 3 if m == 2.0 else [-1.0, -2.0, -4.5]
            parts[Unit.of(behavior=behavior, multiplier=m)] = rows
    section = section_of("open_ended", parts, CONFIG)
    assert section.text.startswith("Greedy answers with the layer-2 vector.")
    assert section.found == [
        "z: sentiment -0.05 at -2, +0.20 unsteered, +0.45 at +2; mean log-probability -2.50, -2.50, nothing to count; "
        "repeated 4-grams 30%, 30%, 30%.",
        "a: sentiment +0.20 at -2, +0.45 unsteered, +0.70 at +2; mean log-probability -2.50, -2.50, nothing to count; "
        "repeated 4-grams 42%, 42%, 42%.",
    ]
    assert [name for name, _ in section.texts] == ["z: q0", "z: q1", "a: q0", "a: q1"]
    assert section.texts[3][1] == [
        (f"{m:+g}" if m else "unsteered", f"a1{m:g}") for m in (-2.0, -1.5, -1.0, 0.0, 1.0, 1.5, 2.0)
    ]
    (table,) = tables_of(section).values()
    assert table["n_tokens"].tolist() == [5.0] * 14
    assert list(table) == ["behavior", "multiplier", *open_ended.MEASURES]
    assert len(section.figures) == 3


def test_separation_is_told_by_layer_and_depth():
    about = Provenance(model="chat", behavior="refusal")
    parts = pd.DataFrame({"layer": [0, 1, 2], "accuracy": [0.5, 0.9, 0.8], "low": [0.4, 0.7, 0.6]})
    parts = parts.assign(high=[0.6, 1.0, 0.9], explained=0.1, silhouette=0.2)
    frames = {}
    for behavior, emergence in (("z", 1), ("a", None)):
        drawn = pair_pca(random_activations((0, 1, 2)), layers=(0, 1)).frame
        drawn.attrs |= {"n_layers": 5, "activations": asdict(about)}
        told = parts.copy()
        told.attrs |= {"n_layers": 5, "activations": asdict(about), "emergence": emergence, "chance": 0.55}
        frames |= {Unit.of(behavior=behavior, what="pca"): drawn, Unit.of(behavior=behavior, what="separability"): told}
    section = section_of("contrast_pca", frames, CONFIG)
    best = "best held-out accuracy 0.90 [0.70, 1.00] at layer 1, chance 0.55."
    assert section.found == [
        f"z: the sides become separable at layer 1 (25% of the depth); {best}",
        f"a: the sides become separable at no layer; {best}",
    ]
    assert [figure.to_json() for figure in section.figures[:2]] == [
        PairPCA(frame=drawn, activations=about).plot().to_json(),
        PairSeparability(frame=parts, emergence=1, chance=0.55, activations=about).plot().to_json(),
    ]
    (table,) = tables_of(section).values()
    assert table.to_dict("records") == [
        {"behavior": name, "emerges at": at, "layer": 1, "accuracy": 0.9, "low": 0.7, "high": 1.0}
        for name, at in (("z", 1), ("a", ""))
    ]


def test_decay_is_told_by_half_at_the_largest_distance():
    frames = {}
    for behavior, slow in (("z", (0.1, 0.01)), ("a", (0.01, 0.1))):
        cosines = pd.DataFrame([(a, b) for a in range(8) for b in range(8)], columns=["layer", "other_layer"])
        rate = np.where(cosines[["layer", "other_layer"]].min(axis=1) >= 4, slow[1], slow[0])
        cosines["cosine"] = 1 - (cosines["other_layer"] - cosines["layer"]).abs() * rate
        cosines.attrs["vectors"] = asdict(Provenance(behavior=behavior))
        frames[Unit.of(behavior=behavior)] = cosines
    section = section_of("cross_layer_cosines", frames, CONFIG)
    assert section.found == [
        "z: similarity decays more slowly in the second half (mean cosine of layers 3 apart: 0.70 in the first half, "
        "0.97 in the second).",
        "a: similarity does not decay more slowly in the second half (mean cosine of layers 3 apart: 0.97 in the "
        "first half, 0.70 in the second).",
    ]
    (table,) = tables_of(section).values()
    assert table["behavior"].tolist() == ["z", "z", "a", "a"]
    assert table["half"].tolist() == ["first", "second"] * 2
    np.testing.assert_allclose(table["1 apart"], [0.9, 0.99, 0.99, 0.9])
    assert len(section.figures) == 2


@pytest.mark.parametrize("n_layers", [8, 9])
def test_layers_of_different_halves_are_no_part_of_the_decay(n_layers):
    cosines = pd.DataFrame([(a, b) for a in range(n_layers) for b in range(n_layers)], columns=["layer", "other_layer"])
    first = cosines < n_layers / 2
    cosines["cosine"] = np.where(first.all(axis=1), 0.25, np.where(~first.any(axis=1), 0.75, np.nan))
    cosines["cosine"] = cosines["cosine"].fillna(-99)
    table = cross_layer_cosines.decay(cosines).set_index("half")
    assert table.loc["first", ["1 apart", "3 apart"]].tolist() == [0.25, 0.25]
    assert table.loc["second", ["1 apart", "3 apart"]].tolist() == [0.75, 0.75]


def test_similar_tokens_are_told_by_side_and_shown_on_one_scale():
    cosines = {"matching": [[0.1, 0.3], [0.5, 0.5], [0.2, 0.0]], "not matching": [[0.0, 0.1], [0.6, 0.8], [0.0, 0.0]]}
    rows = [
        {"text": text, "side": side, "position": position, "cosine": value, "in_answer": position > 0, "layer": 2}
        for side, texts in cosines.items()
        for text, values in enumerate(texts)
        for position, value in enumerate([9.0, *values])
    ]
    own = pd.DataFrame(
        {
            "text": [0, 0, 0, 1, 1],
            "side": "own",
            "position": [0, 1, 2, 0, 1],
            "cosine": [0.99, -0.45678, 0.2, 0.9, 0.1],
            "piece": list("abcde"),
            "in_answer": [False, False, True, False, True],
            "layer": 2,
        }
    )
    frames = {Unit.of(behavior="b", texts="answers"): own, Unit.of(behavior="b", texts="pairs"): pd.DataFrame(rows)}
    section = section_of("token_similarities", frames, CONFIG)
    assert section.text.startswith("Cosine of each token's residual stream after layer 2 ")
    apart = np.array([0.15, -0.2, 0.1])
    (low,), (high,) = bootstrap_interval(apart[:, None], seed=3)
    assert section.found == [
        f"b: tokens of matching answers have a cosine {apart.mean():+.3f} [{low:.3f}, {high:.3f}] above those of the "
        "other answer; larger in 67% of 3 pairs."
    ]
    (table,) = tables_of(section).values()
    (row,) = table.to_dict("records")
    assert row.pop("pairs where matching is larger") == "67% of 3"
    assert row.pop("behavior") == "b"
    expected = {
        "matching": 0.8 / 3,
        "not matching": 0.25,
        "difference": apart.mean(),
        "95 % low": low,
        "95 % high": high,
    }
    assert row == pytest.approx(expected)
    assert [(each.caption, list(each.tokens), each.bound) for each in section.tokens] == [
        ("b, prompt 1", [("b", -0.4568), ("c", 0.2)], pytest.approx(0.45678)),
        ("b, prompt 2", [("e", 0.1)], pytest.approx(0.45678)),
    ]


def test_words_are_shown_side_by_side_from_the_last_layer_down():
    rows = [
        {"layer": layer, "side": side, "token": f"{side[0]}{layer}{i}"}
        for layer in range(14)
        for side in ("promoted", "suppressed")
        for i in range(2)
    ]
    unit = Unit.of(behavior="b", reading="in_context")
    ((caption, table),) = section_of("vector_words", {unit: pd.DataFrame(rows)}, CONFIG).tables
    assert caption == "b, in context"
    assert table["layer"].tolist() == [1, 3, 5, 7, 9, 11, 13]
    assert table.iloc[0].to_dict() == {"layer": 1, "promoted": "p10  p11", "suppressed": "s10  s11"}
    ((_, few),) = section_of("vector_words", {unit: pd.DataFrame(rows[:12])}, CONFIG).tables
    assert few["layer"].tolist() == [0, 1, 2]


def test_knowledge_is_told_unsteered_and_at_one():
    frames = {}
    for behavior, shift in (("z", 0.0), ("a", 0.1)):
        levels = {(2, m): 0.5 + shift * abs(m) + 0.02 * m for m in knowledge.MULTIPLIERS}
        frames[Unit.of(behavior=behavior)] = scores_of(levels, ["layer", "multiplier"]).assign(category="c")
    section = section_of("mmlu", frames, CONFIG)
    assert section.found == ["Unsteered 0.500; at -1 and +1 between 0.480 and 0.620."]
    (table,) = tables_of(section).values()
    assert table["behavior"].tolist() == ["z", "a"]
    assert table["-2"].tolist()[1] == cell_text(frames[Unit.of(behavior="a")], multiplier=-2.0)


def test_truthfulness_is_told_as_the_mean_over_categories():
    levels = {(2, m): 0.5 - 0.1 * m for m in knowledge.MULTIPLIERS}
    frame = scores_of(levels, ["layer", "multiplier"])
    frame["category"] = np.where(frame["question"] < 2, "few", "many")
    frame.loc[frame["category"] == "few", "score"] += 0.3
    section = section_of("truthful_qa", {Unit.of(behavior="sycophancy"): frame}, CONFIG)

    def level(m):
        rows = frame[frame["multiplier"] == m]
        return rows.groupby("category")["score"].mean().mean()

    assert section.found == [f"p(correct) {level(-1.0):.3f} at -1, {level(0.0):.3f} unsteered, {level(1.0):.3f} at +1."]
    (table,) = tables_of(section).values()
    mean, low, high = knowledge.category_mean(frame[frame["multiplier"] == -2.0], n_resamples=2000, seed=0)
    assert (mean, low, high) == knowledge.category_mean(frame[frame["multiplier"] == -2.0])
    assert mean == pytest.approx(level(-2.0))
    assert table["-2"].tolist() == [f"{mean:.3f} [{low:.3f},{NBSP}{high:.3f}]"]


def taught_frames():
    frames = {}
    for behavior, shift in (("z", 0.0), ("a", 0.1)):
        for side, level in (("positive", 0.6), ("negative", 0.4)):
            levels = {(2, m): level + shift + 0.05 * m for m in finetuning.MULTIPLIERS}
            frames[Unit.of(behavior=behavior, finetune=side)] = scores_of(levels, ["layer", "multiplier"])
    return frames


@pytest.mark.parametrize("how", ["full", "lora"])
def test_taught_letters_are_told_by_side_steered_and_unsteered(how):
    frames = taught_frames()
    section = section_of("finetuning", frames, CONFIG.model_copy(update={"finetune": how}))
    assert section.found == [
        "z: p(matching) taught the positive letters 0.600, steered 0.550 at -1 and 0.650 at +1; taught the negative "
        "letters 0.400, steered 0.350 at -1 and 0.450 at +1.",
        "a: p(matching) taught the positive letters 0.700, steered 0.650 at -1 and 0.750 at +1; taught the negative "
        "letters 0.500, steered 0.450 at -1 and 0.550 at +1.",
    ]
    told = {"full": "all weights, SGD at 0.0001", "lora": "rank-8 adapters"}[how]
    assert section.text.startswith(f"One epoch on the answer letter ({told}), then the original model's layer-2 vector")
    shown, right = tables_of(section).values()
    assert shown[["behavior", "finetune"]].to_numpy().tolist() == [
        [b, side] for b in ("z", "a") for side in ("positive", "negative")
    ]
    frame = frames[Unit.of(behavior="z", finetune="negative")]
    assert shown["+1"].tolist()[1] == cell_text(frame, multiplier=1.0)
    assert right["behavior"].tolist() == ["z", "z", "a", "a"]
    assert right["n"].tolist() == [N] * 4


def test_only_full_finetuning_stands_beside_the_papers():
    frames, _ = paper_scores("finetune_ab", ["behavior", "finetune"])
    full, lora = (
        section_of("finetuning", frames, PAPER_7B.model_copy(update={"finetune": how})) for how in ("full", "lora")
    )
    right = "Share of held-out questions answered as taught, unsteered, 95 % Wilson interval"
    assert set(tables_of(full)) == {
        "Mean p(matching) and 95 % interval",
        "Beside the paper's, cell by cell",
        f"{right}, beside the paper's",
    }
    assert set(tables_of(lora)) == {"Mean p(matching) and 95 % interval", right}
    assert "paper" not in tables_of(lora)[right]


def test_taught_text_is_told_by_side():
    parts = {}
    for behavior, shift in (("z", 0.0), ("a", 0.5)):
        for side, sign in (("positive", 1), ("negative", -1)):
            for m in finetuning.MULTIPLIERS:
                rows = pd.DataFrame({"prompt": [0, 1], "question": ["q0", "q1"], "layer": 2, "answer": f"{side}{m:g}"})
                rows["sentiment"] = np.array([0.0, 0.2]) * sign + shift / 10 + m / 10
                rows["repetition"] = rows["distinct_2"] = rows["mean_logp"] = 0.5
                rows["n_tokens"] = [3, 5]
                parts[Unit.of(behavior=behavior, finetune=side, multiplier=m)] = rows
    section = section_of("finetuned_text", parts, CONFIG)
    assert section.found == [
        "z: sentiment of the text taught the positive letters +0.10, steered +0.00 at -1 and +0.20 at +1; taught the "
        "negative letters -0.10, steered -0.20 at -1 and +0.00 at +1.",
        "a: sentiment of the text taught the positive letters +0.15, steered +0.05 at -1 and +0.25 at +1; taught the "
        "negative letters -0.05, steered -0.15 at -1 and +0.05 at +1.",
    ]
    assert "the original model's layer-2 vector" in section.text
    assert [name for name, _ in section.texts] == ["z: q0", "a: q0"]
    assert section.texts[1][1] == [
        (f"taught {side}, {m:+g}", f"{side}{m:g}") for side in ("positive", "negative") for m in finetuning.MULTIPLIERS
    ]
    (table,) = tables_of(section).values()
    assert table["n"].tolist() == [2] * 12
    assert table["n_tokens"].tolist() == [4.0] * 12


# ---- units, what they need and cost ----------------------------------------------------------------------------

LETTERED = ("refusal", "sycophancy")
ALL = RunConfig.of("demo", behaviors=("sentiment", "refusal", "sycophancy"))


def of(**lists):
    """Units of every combination, the first list outermost."""
    units = [{}]
    for name, values in lists.items():
        units = [{**unit, name: value} for unit in units for value in values]
    return [Unit.of(**unit) for unit in units]


def test_the_bundled_behaviors_answered_by_letter_are_those_named_here():
    assert [b for b in ALL.behaviors if behavior_sets(ALL, b).generate.kind == "ab"] == list(LETTERED)
    assert all(behavior_sets(ALL, b).open_ended for b in ALL.behaviors)


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("layer_sweep", of(behavior=ALL.behaviors)),
        ("system_prompts", of(behavior=ALL.behaviors, system=("positive", "negative", "none"))),
        ("open_ended", of(behavior=ALL.behaviors, multiplier=(-2.0, -1.5, -1.0, 0.0, 1.0, 1.5, 2.0))),
        ("finetuning", of(behavior=LETTERED, finetune=("positive", "negative"))),
        ("finetuned_text", of(behavior=LETTERED, finetune=("positive", "negative"), multiplier=(-1.0, 0.0, 1.0))),
        (
            "finetuned_judged",
            of(behavior=LETTERED, finetune=("none", "positive", "negative"), multiplier=(-1.0, 0.0, 1.0)),
        ),
        ("contrast_pca", of(behavior=LETTERED, what=("pca", "separability"))),
        ("token_similarities", of(behavior=ALL.behaviors, texts=("answers", "pairs"))),
        ("vector_words", of(behavior=ALL.behaviors, reading=("normed", "in_context"))),
        ("mmlu", of(behavior=ALL.behaviors)),
        ("truthful_qa", of(behavior=("sycophancy",))),
    ],
)
def test_units_are_every_combination_of_the_papers(name, units):
    assert list(BY_NAME[name].units(ALL)) == units


def test_behaviors_without_prompts_have_no_units_of_text(monkeypatch):
    def sets(config, behavior):
        found = behavior_sets(config, behavior)
        return replace(found, open_ended=()) if behavior == "refusal" else found

    monkeypatch.setattr("experiments.running.behavior_sets.behavior_sets", sets)
    for module in (open_ended, token_similarities, finetuned_text):
        monkeypatch.setattr(module, "behavior_sets", sets)
    assert {unit["behavior"] for unit in open_ended.units(ALL)} == {"sentiment", "sycophancy"}
    assert {unit["behavior"] for unit in finetuned_text.units(ALL)} == {"sycophancy"}
    texts = {behavior: [] for behavior in ALL.behaviors}
    for unit in token_similarities.units(ALL):
        texts[unit["behavior"]].append(unit["texts"])
    assert texts == {"sentiment": ["answers", "pairs"], "refusal": ["pairs"], "sycophancy": ["answers", "pairs"]}


@pytest.mark.parametrize(
    ("name", "behaviors", "reason"),
    [
        ("finetuning", ("sentiment",), "none of the behaviors is answered by letter"),
        (
            "finetuned_text",
            ("sentiment",),
            "none of the behaviors that are answered by letter has open-ended prompts",
        ),
        ("contrast_pca", ("sentiment",), "none of the behaviors has A/B pairs, whose letters it reads"),
        ("truthful_qa", ("refusal",), "needs sycophancy among the behaviors"),
        ("finetuning", ("refusal",), None),
        ("finetuned_text", ("refusal",), None),
        ("contrast_pca", ("refusal",), None),
        ("open_ended", ("refusal",), None),
        ("system_prompts", ("refusal",), None),
    ],
)
def test_an_experiment_without_units_is_skipped_with_the_reason(name, behaviors, reason):
    assert BY_NAME[name].skip(RunConfig.of("demo", behaviors=behaviors)) == reason


def test_taught_text_is_judged_where_there_are_a_judge_and_a_rubric(monkeypatch):
    with_judge = RunConfig.of("demo", behaviors=LETTERED, judge="j", judge_url="http://h/v1")
    skip = BY_NAME["finetuned_judged"].skip
    assert skip(with_judge) is None
    assert "no judge was given" in skip(ALL)
    assert "answered by letter" in skip(with_judge.model_copy(update={"behaviors": ("sentiment",)}))
    monkeypatch.setattr("caa_lens.measures.open_ended.rubrics.RUBRICS", {"refusal": "a rubric"})
    assert {unit["behavior"] for unit in finetuned_text.judged_units(with_judge)} == {"refusal"}
    monkeypatch.setattr("caa_lens.measures.open_ended.rubrics.RUBRICS", {})
    assert skip(with_judge) == "none of the behaviors has a rubric"


def test_behaviors_without_system_prompts_are_left_out(monkeypatch):
    monkeypatch.setattr(system_prompts, "OF_BUNDLED", {"refusal": ("yes", "no")})
    assert {unit["behavior"] for unit in system_prompts.units(ALL)} == {"refusal"}
    assert system_prompts.skip(ALL) is None
    assert system_prompts.skip(RunConfig.of("demo", behaviors=("sentiment",))) == (
        "none of the behaviors has system prompts"
    )
    assert {unit["behavior"] for unit in system_prompts.units(PAPER_7B)} == {"refusal", "hallucination"}


def test_what_needs_a_base_model_is_skipped_without_one_and_held_to_it(models):
    with_base = CONFIG.model_copy(update={"base_model": str(models / "base")})
    for name in ("base_vectors", "base_cosines", "base_transfer"):
        assert BY_NAME[name].skip(with_base) is None
        assert BY_NAME[name].skip(CONFIG) == "needs the base model: give it with --base-model"
        assert BY_NAME[name].own(with_base)["base_model"] == str(models / "base")


@pytest.mark.parametrize("layer", [None, 3])
def test_needs_are_the_vectors_and_where_no_layer_is_given_the_sweep(layer):
    config = CONFIG.model_copy(update={"layer": layer})
    chosen = ("vectors",) if layer is not None else ("vectors", "layer_sweep")
    for name in (
        *("multipliers", "vector_transfer", "system_prompts", "open_ended", "token_similarities", "finetuning"),
        *("mmlu", "truthful_qa"),
    ):
        assert BY_NAME[name].needs(config) == chosen
    for name in ("layer_sweep", "contrast_pca", "cross_layer_cosines", "vector_words"):
        assert BY_NAME[name].needs(config) == ("vectors",)
    for name in ("base_cosines", "base_transfer"):
        assert BY_NAME[name].needs(config) == ("vectors", "base_vectors")
    assert BY_NAME["finetuned_text"].needs(config) == ("finetuning",)
    assert BY_NAME["finetuned_judged"].needs(config) == ("judged", "finetuned_text")


def test_what_an_experiment_depends_on_alone():
    assert BY_NAME["open_ended"].own(ALL) == prompts_hash(ALL)
    assert BY_NAME["finetuning"].own(ALL) == {"finetune": "full", **prompts_hash(ALL)}


def test_other_questions_or_other_categories_have_another_hash(monkeypatch):
    pairs = ContrastSet.from_pairs([(f"Question {n}?", "yes", "no") for n in range(3)], name="facts")
    there = {"mmlu": (pairs, ("a", "b", "a")), "truthfulqa": (pairs[:2], ("a", "b"))}
    monkeypatch.setattr("caa_lens.paper.questions.load_paper_questions", lambda name: there[name])
    for name, questions in (("mmlu", "mmlu"), ("truthful_qa", "truthfulqa")):
        of_set, categories = there[questions]
        assert BY_NAME[name].own(ALL) == {f"{questions}/questions": content_hash([of_set.content_hash, categories])}
        assert BY_NAME[name].skip(ALL) is None


def test_questions_that_have_not_been_fetched_are_stood_in_for_in_a_plan(monkeypatch, tmp_path):
    monkeypatch.setenv("CAA_LENS_CACHE", str(tmp_path))
    planned = PAPER_7B.model_copy(update={"stand_ins": ("truthfulqa",), "n_questions": None})
    pairs, categories = knowledge.questions("truthfulqa", planned)
    assert (len(pairs), categories) == (817, ("",) * 817)
    assert "are not here" in knowledge.skip_without("mmlu", planned)
    fewer = planned.model_copy(update={"n_questions": 5})
    assert len(knowledge.questions("truthfulqa", fewer)[0]) == 5
    assert len(knowledge.questions("truthfulqa", planned.model_copy(update={"n_questions": 817}))[0]) == 817


def test_costs_are_of_what_a_unit_runs(context, monkeypatch):
    facts = ContrastSet.from_pairs([(f"Question {n}?", "yes", "no") for n in range(3)], name="facts")
    monkeypatch.setattr("caa_lens.paper.questions.load_paper_questions", lambda name: (facts, ("a",) * 3))
    prompts = tuple(f"Tell me about {n}." for n in range(13))
    context.changed["refusal"] = replace(context.sets("refusal"), open_ended=prompts)
    sets, n_new = context.sets("refusal"), CONFIG.max_new_tokens
    unit = {"behavior": "refusal"}

    def cost(name, **more):
        return BY_NAME[name].cost(Unit.of(**unit, **more), context)

    assert cost("multipliers") == scoring_cost(sets.test, 5, depth=0.6)
    assert cost("system_prompts", system="none") == scoring_cost(sets.test, 3, depth=0.7)
    assert cost("mmlu") == cost("truthful_qa") == scoring_cost(facts, 5, depth=0.6)
    assert cost("base_vectors") == cost("vectors") == reading_cost(sets.generate)
    for name in ("layer_sweep", "vector_transfer", "base_transfer"):  # 15 of the demo's 30 layers
        assert cost(name) == scoring_cost(sets.test, 31, depth=0.5)
    file = context.folder.vectors_file("refusal")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    assert cost("layer_sweep") == scoring_cost(sets.test, 7, depth=0.5)  # layers 0, 2, 4 of 6
    batches = [generation_cost(prompts[:10], n_new), generation_cost(prompts[10:], n_new)]
    again = Cost(forwards=13, tokens=tokens_of(prompts) + 13 * n_new)
    assert cost("open_ended", multiplier=1.0) == batches[0] + batches[1] + again
    assert cost("finetuned_text", finetune="positive", multiplier=1.0) == again
    assert cost("finetuned_judged", finetune="none", multiplier=1.0) == Cost()
    assert cost("finetuned_judged", finetune="positive", multiplier=1.0) == JUDGED.cost(Unit.of(**unit), context)
    lessons = Cost(forwards=len(sets.generate), tokens=3 * reading_cost(sets.generate).tokens)
    taught = lessons + scoring_cost(sets.test, 3, depth=0.7)
    for _ in range(3):
        taught += batches[0] + batches[1]
    found = cost("finetuning", finetune="positive")
    assert (found.forwards, found.steps, found.requests) == (taught.forwards, taught.steps, 0)
    assert found.tokens == pytest.approx(taught.tokens)
    assert cost("contrast_pca", what="pca") == reading_cost(sets.generate)
    assert cost("contrast_pca", what="separability") == Cost(tokens=reading_cost(sets.generate).tokens / 2)
    assert cost("vector_words", reading="normed") == Cost()
    ten = sets.test.sample(10, seed=3)
    assert cost("vector_words", reading="in_context") == reading_cost(ten)
    shown = generation_cost(prompts[:2], n_new)
    shown += Cost(forwards=2, tokens=tokens_of(prompts[:2]) + 2 * n_new)
    assert cost("token_similarities", texts="answers") == shown
    questions = [pair.question for pair in sets.test.pairs[:10]]
    assert cost("token_similarities", texts="pairs") == Cost(forwards=20, tokens=2 * tokens_of(questions))


def test_adapters_find_the_weights_that_the_model_was_loaded_from(monkeypatch, tmp_path):
    asked_for = []
    monkeypatch.setattr("caa_lens.models.loading.hub.download", lambda *words: asked_for.append(words) or tmp_path)
    assert finetuning.weights_folder("demo") == demo_model_path()
    assert finetuning.weights_folder(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match=r"a folder with safetensors, got /m/x\.gguf: use --finetune full"):
        finetuning.weights_folder("/m/x.gguf")
    assert finetuning.weights_folder("owner/model") == tmp_path
    ((name, files, revision),) = asked_for
    assert (name, revision) == ("owner/model", None)
    assert {"config.json", "tokenizer*", "model*.safetensors"} <= set(files)
