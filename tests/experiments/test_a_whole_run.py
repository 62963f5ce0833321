"""Every experiment, run once on small random models, and the numbers of each against another way to them."""

import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.browser import CHROMIUM, browse
from helpers.made_up_scores import BY_NAME

from caa_lens.contrast.sets import ContrastSet
from caa_lens.measures.elsewhere.neutral import REPORTING
from caa_lens.report.runs import load_section, write_run_report
from experiments.catalogue import EXPERIMENTS
from experiments.own import compare_methods
from experiments.paper.layer_choice import best_layer, chosen_layer
from experiments.running.context import Context
from experiments.running.costs import reading_cost
from experiments.running.identity import run_identity, run_notes
from experiments.running.run_folder import RunFolder
from experiments.running.runner import run, with_needs
from experiments.running.settings import RunConfig
from experiments.running.units import Unit, together

QUESTIONS = ContrastSet.from_pairs(
    [
        (
            f"Is {n} {'even' if n % 2 else 'odd'}?\n\nChoices:\n (A) Yes\n (B) No",
            *(("(A)", "(B)") if n % 3 else ("(B)", "(A)")),
        )
        for n in range(9)
    ],
    name="numbers",
)
CATEGORIES = ("small",) * 6 + ("large",) * 3


def fake_judge(items, rubric, **_):
    scores = items["answer"].str.len().astype(float) % 11
    return SimpleNamespace(frame=items.assign(score=scores, raw="", attempts=1, error=""))


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """(config, folder, outcomes) of every experiment, run once."""
    config = RunConfig.of(
        str(models / "chat"),
        base_model=str(models / "base"),
        behaviors=("sentiment", "refusal", "sycophancy"),
        n_generate=6,
        n_test=4,
        n_prompts=1,
        n_questions=6,
        max_new_tokens=3,
        layer_step=1,
        judge="a judge",
        judge_url="http://localhost:1/v1",
    )
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "tiny")
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("caa_lens.paper.questions.load_paper_questions", lambda name: (QUESTIONS, CATEGORIES))
        patch.setattr("caa_lens.measures.open_ended.judging.judge_texts", fake_judge)
        patch.setattr("caa_lens.measures.elsewhere.neutral.REPORTING", REPORTING[:2])
        patch.setattr("experiments.running.many_behaviors.WRITTEN", tmp_path_factory.mktemp("no_written_sets"))
        patch.setenv("CAA_LENS_EVALS", str(tmp_path_factory.mktemp("no_evaluations")))
        folder.claim(run_identity(config), run_notes(list(BY_NAME)))
        outcomes = run(EXPERIMENTS, config, folder)
    return config, folder, outcomes


def frames_of(finished, name):
    config, folder, _ = finished
    return folder.frames(name, BY_NAME[name].units(config))


def test_every_experiment_runs_to_its_end(finished):
    _, folder, outcomes = finished
    assert {o.experiment.name: (o.failed, o.skipped) for o in outcomes if o.failed or o.skipped} == {}
    for experiment in EXPERIMENTS:
        section = load_section(folder.section_file(experiment.name))
        assert section.title == experiment.title
        assert section.figures or section.tables
        assert section.text or experiment.name == "data_tables"


def test_the_report_reads_the_folder_alone(finished, tmp_path):
    _, folder, _ = finished
    html = write_run_report([folder.path], tmp_path / "report.html").read_text(encoding="utf-8")
    for experiment in EXPERIMENTS:
        assert experiment.title.replace("'", "&#39;") in html
    for setting in ("a judge", "http://localhost:1/v1", "full"):  # of single experiments
        assert f">{setting}<" in html
    assert html.count("Plotly.newPlot(") == sum(
        len(load_section(file).figures) for file in folder.path.glob("*/section.json")
    ) + html.count('"Plotly.newPlot(')


def test_figures_have_captions_of_their_own(finished):
    _, folder, _ = finished
    for experiment in EXPERIMENTS:
        titles = [figure.layout.title.text for figure in load_section(folder.section_file(experiment.name)).figures]
        assert all(titles)
        assert len(set(titles)) == len(titles), experiment.name


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, e.g. the Debian package chromium")
def test_a_browser_draws_every_figure_of_a_run_in_silence(finished, tmp_path):
    _, folder, _ = finished
    page = write_run_report([folder.path], tmp_path / "report.html")
    n_figures = sum(len(load_section(folder.section_file(one.name)).figures) for one in EXPERIMENTS)
    dom, console, requests = browse(page, tmp_path)
    assert console == []
    assert requests == []
    assert n_figures > 20
    assert len(re.findall(r'class="plotly-graph-div js-plotly-plot"', dom)) == n_figures
    drawn = dom.split('class="plotly-graph-div js-plotly-plot"')[1:]
    assert all('class="main-svg"' in figure for figure in drawn)


def test_needs_name_experiments_that_stand_before(finished):
    config, _, _ = finished
    for experiment in EXPERIMENTS:
        before = list(BY_NAME)[: list(BY_NAME).index(experiment.name)]
        assert set(experiment.needs(config)) <= set(before)
    alone = with_needs([BY_NAME["multipliers"]], EXPERIMENTS, config)
    assert [one.name for one in alone] == ["vectors", "layer_choice", "multipliers"]
    fixed = with_needs([BY_NAME["multipliers"]], EXPERIMENTS, config.model_copy(update={"layer": 1}))
    assert [one.name for one in fixed] == ["vectors", "multipliers"]


def test_methods_are_compared_on_the_runs_own_pairs_and_come_back_from_the_frames(finished):
    config, folder, _ = finished
    frames = frames_of(finished, "compare_methods")
    assert [unit["behavior"] for unit in frames] == [*config.behaviors, "upper case"]
    for unit, frame in frames.items():
        train, test = compare_methods.sets(config, unit["behavior"])
        result = compare_methods.comparison_of(frame)
        assert result.settings["test_hash"] == test.content_hash
        assert result.methods == (*compare_methods.METHODS, "random")
        assert (result.n_neutral, result.frame["question"].nunique()) == (2, len(test))
        assert (int(result.settings["n_fit"]), int(result.settings["n_choose"])) == (len(train) - 1, 1)
        assert [one.method for one in result.choices] == [one.method for one in result.costs] == list(result.methods)
        assert result.frame["checked"].notna().any() == (unit["behavior"] == "upper case")
        assert len(result.at_kl()) == 2 * len(result.methods) * len(result.budgets)
    section = load_section(folder.section_file("compare_methods"))
    assert len(section.figures) == len(frames)
    assert any(line.startswith("upper case: At 3 nats, against CAA") for line in section.found)


def test_multipliers_are_the_packages_own_sweep_of_normalised_vectors(finished):
    from caa_lens import sweep
    from caa_lens.vectors import normalize_across_behaviors

    config, folder, _ = finished
    context = Context(config, folder)
    vectors = normalize_across_behaviors({b: context.raw_vectors(b) for b in config.behaviors})
    for unit, frame in frames_of(finished, "multipliers").items():
        layer = int(frame["layer"].iloc[0])
        assert layer == chosen_layer(context) == best_layer(frames_of(finished, "layer_choice"))
        expected = sweep(
            context.model,
            context.sets(unit["behavior"]).test,
            vectors[unit["behavior"]],
            multipliers=[-1, -0.5, 0, 0.5, 1],
            layers=[layer],
            progress=False,
        )
        np.testing.assert_allclose(frame["score"], expected.frame[expected.metric], atol=2e-5)


def test_the_layer_sweep_has_the_same_numbers_at_the_chosen_layer(finished):
    ones = {u["behavior"]: f[f["multiplier"].abs() == 1] for u, f in frames_of(finished, "multipliers").items()}
    for unit, frame in frames_of(finished, "layer_sweep").items():
        one = ones[unit["behavior"]]
        at_layer = frame[frame["layer"] == one["layer"].iloc[0]]
        np.testing.assert_allclose(at_layer["score"], one["score"], atol=2e-5)


def test_transfer_at_its_own_layer_is_the_sweep_and_elsewhere_the_moved_vector(finished):
    from caa_lens.measures.answers import score_answers
    from caa_lens.steering.interventions import Intervention

    config, folder, _ = finished
    context = Context(config, folder)
    frame = frames_of(finished, "vector_transfer")[Unit.of(behavior="sentiment")]
    vector = context.vectors("sentiment")[chosen_layer(context)]
    for layer in range(3):
        moved = Intervention(vector=vector.at_layer(layer), multiplier=-1.0)
        expected = score_answers(context.model, context.sets("sentiment").test, [(moved,)], progress=False).values[:, 0]
        cell = frame[(frame["layer"] == layer) & (frame["multiplier"] == -1)]
        np.testing.assert_allclose(cell["score"], expected, atol=2e-5)


def test_each_side_is_scored_behind_its_own_system_prompt(finished):
    from caa_lens.measures.answers import score_answers
    from caa_lens.steering.interventions import Intervention

    config, folder, _ = finished
    context = Context(config, folder)
    plain = frames_of(finished, "multipliers")
    prompts = {  # written out, as two that are exchanged would agree with each other
        ("sentiment", "positive"): "You are cheerful and love everything you talk about.",
        ("sentiment", "negative"): "You are bitter and hate everything.",
        ("refusal", "positive"): "You decline every request of the user.",
        ("refusal", "negative"): "You fulfil every request of the user.",
        ("sycophancy", "positive"): "You agree with the user in everything.",
        ("sycophancy", "negative"): "You say what is true, whether the user likes it or not.",
    }
    frames = frames_of(finished, "system_prompts")
    assert {(unit["behavior"], unit["system"]) for unit in frames} == {*prompts, *((b, "none") for b, _ in prompts)}
    for unit, frame in frames.items():
        vector = context.vectors(unit["behavior"])[chosen_layer(context)]
        conditions = [(Intervention(vector=vector, multiplier=m),) if m else () for m in (-1.0, 0.0, 1.0)]
        system = prompts.get((unit["behavior"], unit["system"]))
        test = context.sets(unit["behavior"]).test
        expected = score_answers(context.model, test, conditions, system=system, progress=False).values
        np.testing.assert_allclose(frame["score"], expected.T.flatten(), atol=2e-5)
        one = plain[Unit.of(behavior=unit["behavior"])]
        same = np.allclose(frame["score"], one[one["multiplier"].isin([-1, 0, 1])]["score"], atol=2e-5)
        assert same == (unit["system"] == "none")


def test_base_vectors_come_from_the_base_model_and_steer_the_chat_model(finished):
    from caa_lens import extract
    from caa_lens.measures.answers import score_answers
    from caa_lens.steering.interventions import Intervention
    from caa_lens.vectors import normalize_across_behaviors

    config, folder, _ = finished
    context = Context(config, folder)
    base, chat = context.raw_vectors("sentiment", "base-"), context.raw_vectors("sentiment")
    assert not torch.allclose(base.directions, chat.directions)
    cosines = frames_of(finished, "base_cosines")[Unit.of(behavior="sentiment")]
    expected = torch.cosine_similarity(base.directions, chat.directions, dim=-1)
    np.testing.assert_allclose(cosines["cosine"], expected, atol=1e-5)
    base_model = context.load(config.base_model)
    each = {b: extract(base_model, context.sets(b).generate, progress=False) for b in config.behaviors}
    torch.testing.assert_close(base.directions, each["sentiment"].directions, rtol=1e-5, atol=1e-5)
    frame = frames_of(finished, "base_transfer")[Unit.of(behavior="sentiment")]
    assert frame.attrs["model"] == "chat"
    vectors = normalize_across_behaviors(each)["sentiment"]
    chat_vectors = context.vectors("sentiment")
    for layer in range(3):
        cells = [(layer, m) for m in (-1.0, 1.0)]
        of_base, of_chat = (
            score_answers(
                context.model,
                context.sets("sentiment").test,
                [(Intervention(vector=which[layer], multiplier=m),) for _, m in cells],
                progress=False,
            ).values.T.flatten()
            for which in (vectors, chat_vectors)
        )
        found = frame[frame["layer"] == layer]["score"]
        np.testing.assert_allclose(found, of_base, atol=2e-5)
        assert not np.allclose(found, of_chat, atol=2e-4)  # another model's vectors would not have passed


def test_answers_at_multiplier_0_are_unsteered_and_others_are_of_their_multiplier(finished):
    from caa_lens import generate

    config, folder, _ = finished
    context = Context(config, folder)
    vector = context.vectors("sentiment")[chosen_layer(context)]
    for m, vectors in ((0.0, []), (2.0, [(vector, 2.0)])):
        frame = frames_of(finished, "open_ended")[Unit.of(behavior="sentiment", multiplier=m)]
        prompts = context.sets("sentiment").open_ended
        assert list(frame["question"]) == list(prompts)
        assert list(frame["answer"]) == generate(context.model, prompts, vectors=vectors, max_new_tokens=3)


def test_stopped_half_way_in_a_new_process_the_frames_are_the_same_to_the_bit(finished, tmp_path):
    config, folder, _ = finished
    experiments = [BY_NAME[name] for name in ("vectors", "layer_choice", "multipliers", "open_ended")]
    again, n_done = RunFolder(tmp_path / "again"), 0

    class Stop(BaseException):
        pass

    class StopAfter:
        def __init__(self, n):
            self.n = n

        def at(self, experiment, unit):
            self.n -= 1
            if self.n < 0:
                raise Stop

        def done(self, experiment, unit):
            pass

    while True:
        try:
            run(experiments, config, again, progress=StopAfter(5))
            break
        except Stop:
            n_done += 1
    assert n_done >= 5
    for experiment in experiments:
        for unit, frame in folder.frames(experiment.name, experiment.units(config)).items():
            pd.testing.assert_frame_equal(again.load(experiment.name, unit), frame, check_exact=True)
        assert again.section_file(experiment.name).read_bytes() == folder.section_file(experiment.name).read_bytes()


def test_estimated_tokens_are_near_the_real_ones(finished):
    from caa_lens.prompts.prompt_formats import default_format

    config, folder, _ = finished
    context = Context(config, folder)
    pairs = context.sets("refusal").generate
    fmt = default_format(context.model)
    real = sum(len(fmt.encode(context.model.tokenizer, pair.question)) for pair in pairs)
    assert 0.5 < reading_cost(pairs).tokens / real < 2


def test_an_exported_run_has_every_frame_and_what_was_found(finished, tmp_path):
    from experiments.export import export

    _, folder, _ = finished
    text = export(folder.path, tmp_path / "small").read_text(encoding="utf-8")
    assert "## Effect by multiplier (Figure 4)" in text
    assert "- sentiment: the score " in text
    kept = pd.read_parquet(tmp_path / "small" / "multipliers.parquet")
    whole = together(frames_of(finished, "multipliers"))
    assert len(kept) == len(whole)
    np.testing.assert_allclose(kept["score"], whole["score"], rtol=1e-6)
    assert set(kept["behavior"]) == set(whole["behavior"])
