"""What the paper's experiments on scores say of made-up ones; every sentence and table is computed a second time."""

from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from helpers.made_up_scores import (
    NBSP,
    PAPER_7B,
    N,
    cell_text,
    effect_of,
    paper_scores,
    scores_of,
    section_of,
    swept,
    tables_of,
    values_of,
    with_interval,
)
from helpers.stand_in_context import CONFIG

from caa_lens.interpretation.vector_cosines import Cosines
from caa_lens.measures.honest_choice import choose_honestly
from caa_lens.provenance import Provenance
from experiments.paper import layer_choice
from experiments.paper import table_3_system_prompts as system_prompts
from experiments.paper import tables_4_10_13_finetuning as finetuning
from experiments.paper import tables_5_12_knowledge as knowledge
from experiments.paper.figure_4_multipliers import rise
from experiments.running import scores as scoring
from experiments.running.settings import RunConfig
from experiments.running.units import Unit


def made_up(effects, metric="margin", spread=1.0, n=200):
    """A layer sweep's frame with the given effect at each layer, and unsteered scores of the given spread."""
    rng = np.random.default_rng(0)
    unsteered = spread * rng.standard_normal(n)
    cells = [(-1, 0.0, 0.0), *((layer, m, m * effect / 2) for layer, effect in effects.items() for m in (-1.0, 1.0))]
    frame = pd.concat(
        pd.DataFrame(
            {"layer": layer, "multiplier": m, "question": range(n), "metric": metric, "score": unsteered + shift}
        )
        for layer, m, shift in cells
    )
    frame["score"] += 0.1 * spread * rng.standard_normal(len(frame))
    frame.attrs["n_layers"] = 30
    return frame


def test_the_best_layer_weighs_behaviors_by_the_spread_of_their_unsteered_scores():
    wide = made_up({3: 1.0, 9: 1.2, 12: 0.2}, spread=2.0)
    narrow = made_up({3: 0.0, 9: 0.1, 12: 0.2}, metric="p_matching", spread=0.1)
    frames = {Unit.of(behavior="a"): wide, Unit.of(behavior="b"): narrow}
    assert layer_choice.best_layer(frames) == 12  # 0.1 + 2 deviations there, 0.6 + 1 at layer 9
    effects = scoring.layer_effects(frames).set_index(["behavior", "layer"])
    assert effects.loc[("a", 9), "mean"] == pytest.approx(1.2, abs=0.1)
    by_theory = 2 * 1.96 * 0.1 * 2.0 * (2 / 200) ** 0.5  # of a difference of two noisy scores, 200 questions
    width = effects.loc[("a", 9), "high"] - effects.loc[("a", 9), "low"]
    assert width == pytest.approx(by_theory, rel=0.2)
    section = layer_choice.section(frames, RunConfig(model="m", behaviors=("a", "b")))
    assert section.found[0].startswith("Largest effect over all behaviors, in standard deviations")
    assert "layer 12 (41% of the depth)" in section.found[0]


def test_the_chosen_layer_is_told_with_where_it_was_chosen():
    frames = {Unit.of(behavior="z"): swept(3), Unit.of(behavior="a"): swept(1, metric="p_matching", scale=0.1)}
    best = layer_choice.best_layer(frames)
    section = section_of("layer_choice", frames, CONFIG)
    assert section.found == [
        "Largest effect over all behaviors, in standard deviations of the unsteered scores: layer "
        f"{best} ({best / 4:.0%} of the depth). Single-layer experiments of this run steer there. "
        f"Validation pairs: z {N}, a {N}."
    ]
    assert len(section.figures) == 2  # of margins and of probabilities


def by_folds(frame):
    """What choosing a layer is worth, from the frame alone."""
    cells = frame[frame["layer"] >= 0].pivot(index="question", columns=["layer", "multiplier"], values="score")
    layers = sorted(set(cells.columns.get_level_values(0)))
    return choose_honestly(np.stack([cells[layer, 1.0] - cells[layer, -1.0] for layer in layers], axis=1)), layers


def test_the_layer_sweep_names_each_behaviors_best_layer_and_its_effect_on_questions_that_did_not_choose_it():
    frames = {Unit.of(behavior="z"): swept(3), Unit.of(behavior="a"): swept(1, metric="p_matching", scale=0.1)}
    section = section_of("layer_sweep", frames, CONFIG.model_copy(update={"layer": 4}))
    (table,) = tables_of(section).values()
    assert table["behavior"].tolist() == ["z", "a"]
    assert table["layer"].tolist() == [3, 1]
    assert table["metric"].tolist() == ["margin", "p_matching"]
    for (unit, frame), row, said in zip(frames.items(), table.to_dict("records"), section.found, strict=True):
        found, layers = by_folds(frame)
        assert row["layer"] == layers[found.cell]
        assert (row["effect"], row["low"], row["high"]) == pytest.approx((found.effect, found.low, found.high))
        assert row["folds that agree"] == found.agreeing
        verdict = "includes" if found.low <= 0 <= found.high else "excludes"
        assert said == (
            f"{unit['behavior']}: largest at layer {row['layer']}; on questions that did not choose it (by folds) "
            f"{found.effect:+.3f} (95 % interval {found.low:.3f} to {found.high:.3f}, which {verdict} 0)."
        )
    assert len(section.figures) == 4  # effects and levels, of margins and of probabilities


def test_a_layer_is_not_chosen_on_scores_that_cannot_be_compared():
    broken = made_up({3: 1.0, 9: 2.0}, n=20)
    broken.loc[(broken["layer"] == 9) & (broken["question"] == 4), "score"] = np.nan
    frames = {Unit.of(behavior="a"): made_up({3: 1.0, 9: 2.0}, n=20), Unit.of(behavior="b"): broken}
    with pytest.raises(ValueError, match="some scores of b are NaN, so that layers cannot be compared: name a layer"):
        layer_choice.best_layer(frames)
    (_, row) = scoring.best_layers(frames).itertuples()
    assert (row.behavior, row.layer) == ("b", 3)
    still = made_up({3: 1.0, 9: 2.0}, n=20)
    still.loc[still["layer"] == -1, "score"] = 0.5
    with pytest.raises(ValueError, match="all unsteered scores of c are the same, so that effects have no measure"):
        layer_choice.best_layer({Unit.of(behavior="c"): still})


def test_of_few_questions_a_best_layer_has_no_worth():
    few = swept(3).query("question < 7")
    (row,) = scoring.best_layers({Unit.of(behavior="z"): few}).itertuples()
    assert (row.layer, np.isnan(row.effect)) == (3, True)
    assert scoring.best_layer_told(row) == (
        "z: largest at layer 3; too few questions to say what that choice is worth."
    )


def test_an_interval_is_said_to_exclude_0_on_either_side():
    rows = pd.DataFrame({"behavior": ["up", "down", "wide"], "layer": 1, "effect": [1.0, -1.0, 0.5]})
    rows = rows.assign(low=[0.5, -2.0, -0.1], high=[2.0, -0.5, 1.0])
    assert [scoring.best_layer_told(row).split("which ")[1] for row in rows.itertuples()] == [
        "excludes 0).",
        "excludes 0).",
        "includes 0).",
    ]


def test_the_best_layer_is_of_the_largest_effect_not_of_the_largest_size():
    assert layer_choice.best_layer({Unit.of(behavior="a"): swept(3)}) == 3  # layer 0 moves further, the other way


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
        (own, low, high), (most, _) = effect_of(frame, layer=2), by_folds(frame)
        assert said == (
            f"{unit['behavior']}: effect {own:+.3f} [{low:.3f}, {high:.3f}] at its own layer 2, largest at layer "
            f"{best}, {most.effect:+.3f} [{most.low:.3f}, {most.high:.3f}] on questions that did not choose it."
        )


def test_base_vectors_best_layer_is_told_with_its_interval():
    frames = {Unit.of(behavior="z"): swept(3).query("layer >= 0"), Unit.of(behavior="a"): swept(1).query("layer >= 0")}
    section = section_of("base_transfer", frames, CONFIG)
    expected = []
    for (unit, frame), best in zip(frames.items(), (3, 1), strict=True):
        found, layers = by_folds(frame)
        assert layers[found.cell] == best
        (row,) = scoring.best_layers({unit: frame}).itertuples()
        expected.append(scoring.best_layer_told(row))
    assert section.found == expected
    assert (section.title, section.source) == ("Base vectors in the chat model", "Figure 10")


def test_base_cosines_are_told_at_their_peak_and_at_the_end():
    base, chat = Provenance(model="base"), Provenance(model="chat")
    frame = pd.DataFrame({"layer": [0, 1, 2], "cosine": [0.2, 0.9, 0.4]})
    frame.attrs |= {"d_model": 8, "vectors": [asdict(base), asdict(chat)]}
    section = section_of("base_cosines", {Unit.of(behavior="b"): frame}, CONFIG)
    assert section.found == ["b: largest at layer 1 (0.90), 0.40 at the last layer."]
    (figure,) = section.figures
    expected = Cosines(frame=frame, d_model=8, provenance={"vectors": base, "other": chat})
    assert figure.to_json() == expected.plot().to_json()


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


def test_means_and_effects_are_over_questions_in_the_order_of_the_behaviors():
    levels = {(x, m): x + m for x in (5, 2) for m in (-2.0, 0.0, 2.0)}
    frames = {
        Unit.of(behavior="z"): scores_of(levels, ["layer", "multiplier"]),
        Unit.of(behavior="a"): scores_of(levels, ["layer", "multiplier"], "p_matching"),
    }
    means = scoring.means(frames, ["layer", "multiplier"])
    assert list(means) == ["behavior", "metric", "layer", "multiplier", "mean", "low", "high"]
    assert list(dict.fromkeys(zip(means["behavior"], means["metric"], strict=True))) == [
        ("z", "margin"),
        ("a", "p_matching"),
    ]
    frame = frames[Unit.of(behavior="a")]
    row = means[(means["behavior"] == "a") & (means["layer"] == 2) & (means["multiplier"] == 2)].iloc[0]
    expected = with_interval(values_of(frame, layer=2, multiplier=2.0))
    assert row[["mean", "low", "high"]].tolist() == pytest.approx(expected)
    assert scoring.means(frames, ["layer", "multiplier"], value="question")["mean"].unique() == pytest.approx([4])
    each = scoring.effects(frames, ["layer"], multiplier=2.0)
    assert list(each) == ["behavior", "metric", "layer", "question", "effect"]
    assert list(dict.fromkeys(each["behavior"])) == ["z", "a"]
    cell = each[(each["behavior"] == "a") & (each["layer"] == 5)]
    difference = values_of(frame, layer=5, multiplier=2.0) - values_of(frame, layer=5, multiplier=-2.0)
    np.testing.assert_allclose(cell.sort_values("question")["effect"], difference)


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


def plain_category_interval(rows, n_resamples, seed):
    """The two stages as one says them: draw categories, and within each that was drawn, questions."""
    rng = np.random.default_rng(seed)
    scores = [part["score"].to_list() for _, part in rows.groupby("category")]
    resampled = []
    for _ in range(n_resamples):
        drawn = [scores[i] for i in rng.integers(len(scores), size=len(scores))]
        resampled.append(np.mean([np.mean([of[j] for j in rng.integers(len(of), size=len(of))]) for of in drawn]))
    return np.quantile(resampled, [0.025, 0.975])


def test_truthfulness_is_the_mean_over_categories_with_the_spread_of_both_stages():
    rows = pd.DataFrame({"category": ["a"] * 4 + ["b"], "score": [0.0, 0.0, 1.0, 1.0, 1.0]})
    assert knowledge.category_mean(rows)[0] == pytest.approx(0.75)
    rng = np.random.default_rng(3)
    rows = pd.DataFrame({"category": rng.integers(8, size=60)})
    rows["score"] = rng.random(60) * 0.5 + 0.06 * rows["category"]
    mean, low, high = knowledge.category_mean(rows, n_resamples=20_000)
    assert mean == pytest.approx(rows.groupby("category")["score"].mean().mean())
    expected = plain_category_interval(rows, 4000, seed=1)
    np.testing.assert_allclose([low, high], expected, atol=0.006)
    of_questions_only = [part["score"] - part["score"].mean() for _, part in rows.groupby("category")]
    within = 2 * 1.96 * np.sqrt(sum(part.var() / len(part) for part in of_questions_only)) / 8
    assert high - low > 1.2 * within


def test_one_question_a_category_still_has_an_interval_and_one_question_has_none():
    rows = pd.DataFrame({"category": list("abcdef"), "score": [0.1, 0.9, 0.5, 0.4, 0.8, 0.2]})
    _, low, high = knowledge.category_mean(rows, n_resamples=20_000)
    np.testing.assert_allclose([low, high], plain_category_interval(rows, 4000, seed=1), atol=0.03)
    assert high - low > 0.3
    assert np.isnan(knowledge.category_mean(rows[:1])[1:]).all()
