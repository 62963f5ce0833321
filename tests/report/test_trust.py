"""The panel on trust: every sentence and table says what the results say, and nothing is computed anew."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.models import random_vectors
from helpers.planted_pairs import planted

import caa_lens as cl
from caa_lens.contrast.sets import ContrastSet
from caa_lens.measures.agreement.reliabilities import reliability
from caa_lens.measures.elsewhere.neutral import REPORTING
from caa_lens.measures.elsewhere.refusals import HARMLESS
from caa_lens.measures.question_slopes import steerability
from caa_lens.measures.sweeps import Sweep
from caa_lens.provenance import Provenance
from caa_lens.report import trust
from caa_lens.report.page import write_report
from caa_lens.report.runs import load_section, save_section


def made_up_sweep(slopes):
    rows = [
        {"behavior": "b", "layer": layer, "multiplier": m, "question": q, "margin": slope * m + 0.01 * m**2}
        for layer in (3, 7)
        for q, slope in enumerate(slopes)
        for m in (-1.0, 0.0, 1.0)
    ]
    return Sweep(frame=pd.DataFrame(rows), metric="margin", provenance={"vectors": Provenance(behavior="b")})


@pytest.fixture(scope="module")
def agreement():
    return reliability(planted(20, size=0.8, layers=(3, 7)), progress=False)


@pytest.fixture(scope="module")
def slopes():
    return steerability(made_up_sweep([1.0, 0.5, -0.25, 0.75, 0.1, -0.5, 1.5, 0.2]))


def test_the_verdict_of_a_layer_is_told_with_the_numbers_behind_it(agreement):
    row = agreement.frame[agreement.frame["layer"] == 7].iloc[0]
    assert trust.agreement_told(agreement, 7) == f"Layer 7: {row['verdict']} ({row['because']})."
    section = trust.reliability_section(agreement)
    surest = agreement.frame.sort_values("low", ascending=False).iloc[0]
    assert section.found[0].startswith(f"Layer {surest['layer']}: {surest['verdict']}")
    ((_, table),) = section.captioned_tables()
    np.testing.assert_allclose(table["split_half"], agreement.frame["split_half"], atol=5e-4)


def test_each_other_verdict_is_told_of_its_surest_layer():
    strong, nothing = planted(20, size=1.0, layers=(3,), n_layers=1), planted(20, layers=(3,), n_layers=1, seed=5)
    values = torch.cat([strong.values, nothing.values], dim=2)
    both = replace(strong, values=values, norms=values.norm(dim=-1), layers=(3, 9))
    found = reliability(both, progress=False)
    told = [trust.agreement_told(found, layer).split(" (")[0] for layer in trust.told_layers(found)]
    assert told == ["Layer 3: consistent", "Layer 9: nothing to steer with"]


def test_questions_that_move_the_wrong_way_are_counted_and_listed(slopes):
    told = trust.slopes_told(slopes, 7)
    row = slopes.summary().set_index("layer").loc[7]
    assert told.startswith(f"At layer 7 the score changes by {row['mean']:+.3f} a multiplier")
    assert "2 of 8 questions move the wrong way (25%" in told
    ((caption, table),) = trust.slopes_section(slopes, 7).captioned_tables()
    assert "wrong way" in caption
    assert table["question"].tolist() == [5, 2]


@pytest.fixture(scope="module")
def vector_set(tiny_chat):
    return random_vectors(tiny_chat, layers=(1, 3), scale=0.5)


def test_a_calibrations_section_shows_the_choice_every_layer_and_what_it_costs(tiny_chat, vector_set):
    pairs = ContrastSet.load("sentiment").sample(16, seed=0)
    found = cl.calibrate(tiny_chat, vector_set, pairs, 0.5, test=8, multipliers=[-1, 1], progress=False)
    section = trust.calibration_section(found)
    assert list(section.found) == [found.text]
    best, costs = section.captioned_tables()
    assert best[1]["layer"].tolist() == found.summary()["layer"].tolist()
    assert costs[1]["multiplier"].tolist() == found.costs_frame()["multiplier"].tolist()


def test_side_effects_are_told_beside_random_directions(tiny_chat, vector_set):
    how = {"neutral": REPORTING[:8], "requests": HARMLESS[:8], "n_tokens": 3, "n_random": 2, "progress": False}
    found = cl.side_effects(tiny_chat, vector_set[3], 2.0, **how)
    kl = found.frame[found.frame["measure"] == "KL"].iloc[0]
    section = trust.side_effects_section(found)
    assert section.found[0] == (
        f"Mean divergence on neutral questions: {kl['change']:.3f} nats a token [{kl['low']:.3f}, {kl['high']:.3f}]; "
        f"2 random directions of the same norm {kl['random']:.3f}."
    )
    changed = found.summary().query("reading.str.startswith('changed')")
    named = section.found[1]
    assert named.count(";") + named.startswith("Changed") == len(changed)
    ((_, table),) = section.captioned_tables()
    assert len(table) == len(found.frame)


def test_sections_are_saved_and_read_and_make_a_page(agreement, slopes, tmp_path):
    sections = [trust.reliability_section(agreement), trust.slopes_section(slopes, 3)]
    for i, section in enumerate(sections):
        again = load_section(save_section(section, tmp_path / f"{i}.json"))
        assert list(again.found) == list(section.found)
        assert len(again.figures) == 1
    page = write_report(tmp_path / "page.html", title="t", lead="l", sections=sections, settings={})
    text = page.read_text(encoding="utf-8")
    assert "Do the pairs agree?" in text
    assert "Which questions move?" in text
