"""Scores under named positions, gates and edits inside of blocks: as of one full forward each, with hooks by hand."""

from dataclasses import replace

import pytest
import torch
from helpers.family import intervention_of, parameters_of, plain_hook_of, range_of
from helpers.models import random_vectors
from torch.testing import assert_close

from caa_lens.contrast.sets import ContrastSet
from caa_lens.engine import shared_prefix
from caa_lens.engine.operators import OPERATORS
from caa_lens.engine.shared_prefix import SharedPrefixWarning
from caa_lens.measures import answers
from caa_lens.measures.answers import score_answers
from caa_lens.measures.placed_conditions import PlacedConditions
from caa_lens.prompts.prompt_formats import Prompt, default_format, encode_answer, encode_letters
from caa_lens.steering.interventions import Gate, Intervention

AB = ContrastSet.from_pairs(
    [
        ("Is it good?\n\nChoices:\n (A) Yes\n (B) No", "(A)", "(B)"),
        ("Would you say so, if it were longer?\n\nChoices:\n (A) Yes\n (B) No", "(B)", "(A)"),
        ("Which?\n\nChoices:\n (A) This\n (B) That", "(A)", "(B)"),
    ]
)
TEXT = ContrastSet.from_pairs(
    [
        ("How was it?", "Lovely, thank you.", "Bad."),
        ("And the weather on the day that you came back?", "Sun.", "It rained all day long."),
        ("Food?", "Tasty and warm.", "Cold and stale."),
    ]
)


def slow_score(model, pair, hooks_at):
    """One pair from the model's own forward over the whole text of each side."""
    fmt = default_format(model)
    if pair.is_ab:
        prompt, ids = encode_letters(fmt, model.tokenizer, pair.question, (pair.positive[1], pair.negative[1]))
        with torch.no_grad():
            logits = model.run_with_hooks(torch.tensor([prompt.tokens]), fwd_hooks=hooks_at(prompt))[0, -1]
        return logits[list(ids)].softmax(-1)[0]
    means = []
    for answer in (pair.positive, pair.negative):
        prompt = encode_answer(fmt, model.tokenizer, pair.question, answer)
        with torch.no_grad():
            logits = model.run_with_hooks(torch.tensor([prompt.tokens]), fwd_hooks=hooks_at(prompt))[0]
        targets = torch.tensor(prompt.tokens[prompt.answer_start :])
        logp = logits[prompt.answer_start - 1 : -1].log_softmax(-1)
        means.append(logp.gather(-1, targets[:, None]).mean())
    return means[0] - means[1]


@pytest.mark.parametrize("pairs", [AB, TEXT], ids=["letters", "completions"])
def test_every_operator_scores_as_hooks_by_hand(tiny_chat, pairs):
    family = parameters_of(32, scale=2.0)
    conditions = [(), *[(intervention_of(operator, family[operator], 2),) for operator in OPERATORS]]
    found = score_answers(tiny_chat, pairs, conditions, progress=False).values
    for row, pair in enumerate(pairs):
        for column, operator in enumerate(OPERATORS, start=1):

            def hooks_at(prompt, operator=operator):
                places = range_of("caa", prompt, len(prompt))
                return [plain_hook_of(operator, family[operator], 2, 0.8, places)]

            assert_close(found[row, column], slow_score(tiny_chat, pair, hooks_at), atol=2e-5, rtol=1e-4)
    assert float((found[:, 1:] - found[:, :1]).abs().max(0).values.min()) > 1e-4


@pytest.mark.parametrize("pairs", [AB, TEXT], ids=["letters", "completions"])
def test_every_named_position_scores_as_hooks_by_hand_after_one_warning(tiny_chat, pairs):
    parameters = parameters_of(32, scale=2.0)["affine"]
    names = ["caa", "all", "after_first", "prompt", "answer", "last"]
    conditions = [
        (),
        *[(intervention_of("affine", parameters, layer, positions=n),) for n in names for layer in (1, 3)],
    ]
    with pytest.warns(SharedPrefixWarning) as told:
        found = score_answers(tiny_chat, pairs, conditions, progress=False).values
    assert [str(one.message) for one in told] == [
        "the prompt that conditions share is run once for each of them, because 6 of 13 conditions change the prompt "
        "before the end of its instruction"
    ]
    for row, pair in enumerate(pairs):
        for column, (name, layer) in enumerate(((n, layer) for n in names for layer in (1, 3)), start=1):

            def hooks_at(prompt, name=name, layer=layer):
                return [plain_hook_of("affine", parameters, layer, 0.8, range_of(name, prompt, len(prompt)))]

            assert_close(found[row, column], slow_score(tiny_chat, pair, hooks_at), atol=2e-5, rtol=1e-4)


def test_what_shares_the_prompt_takes_no_run_of_its_own(tiny_chat, monkeypatch):
    def refuse(*given):
        raise AssertionError("ran in full")

    monkeypatch.setattr(answers, "_score_plainly", refuse)
    v = random_vectors(tiny_chat)[2]
    conditions = [(), *[(Intervention(vector=v, positions=name),) for name in ("caa", "answer", "last")]]
    score_answers(tiny_chat, TEXT, conditions, progress=False)  # warnings are errors here


@pytest.mark.filterwarnings("ignore::caa_lens.engine.shared_prefix.SharedPrefixWarning")
@pytest.mark.parametrize("max_tokens", [None, 1, 90])
def test_what_changes_prompts_alike_runs_as_rows_of_one_batch_whatever_fits(tiny_chat, monkeypatch, max_tokens):
    block = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    vectors = random_vectors(tiny_chat)
    front = Intervention(
        parameters={"direction": block}, by_position={"direction"}, layer=1, multiplier=2.0, positions="front"
    )
    conditions = [
        (),
        *[(Intervention(vector=vectors[layer], multiplier=m, positions="all"),) for layer in (0, 3) for m in (-1, 1)],
        (Intervention(vector=vectors[2], positions="after_first"), Intervention(vector=vectors[1], positions="last")),
        (front,),
        (Intervention(vector=vectors[2]),),
    ]
    slow = torch.cat([score_answers(tiny_chat, TEXT, [one], progress=False).values for one in conditions], dim=1)

    def refuse(*given):
        raise AssertionError("ran by itself")

    monkeypatch.setattr(answers, "_score_plainly", refuse)
    found = score_answers(tiny_chat, TEXT, conditions, max_tokens=max_tokens, progress=False).values
    assert_close(found, slow, atol=2e-5, rtol=1e-4)
    for column, hook in ((1, -1.0), (4, 1.0)):
        layer = 0 if column == 1 else 3
        hooks = [(f"blocks.{layer}.hook_resid_post", lambda r, hook, v=hook * vectors[layer].direction: r + v)]
        for row, pair in enumerate(TEXT):
            assert_close(
                found[row, column], slow_score(tiny_chat, pair, lambda prompt, hooks=hooks: hooks), atol=2e-5, rtol=1e-4
            )


def test_what_is_elsewhere_in_one_answers_text_than_in_the_others_runs_by_itself(tiny_chat):
    v = random_vectors(tiny_chat)[2]
    prompt = Prompt.of(tiny_chat, "Food?")
    longer = replace(prompt, tokens=(*prompt.tokens, 5), answer_start=len(prompt) + 1)
    names = ("caa", "all", "prompt", "last", "answer")
    conditions = [(Intervention(vector=v, positions=name),) for name in names]
    alike, unlike = PlacedConditions(tiny_chat, conditions, [(prompt, prompt), (prompt, longer)]).together([0, 1])
    assert [names[i] for i in alike.shared.columns] == ["caa", "last", "answer"]
    assert [names[i] for i in alike.whole.columns] == ["all", "prompt"]
    assert (alike.pairs, alike.alone, unlike.pairs) == ([0], [], [1])
    assert [names[i] for i in unlike.shared.columns] == ["caa"]
    assert [names[i] for i in unlike.whole.columns] == ["all"]
    assert [names[i] for i in unlike.alone] == ["prompt", "last", "answer"]


def test_an_edit_inside_of_a_block_is_scored_in_full_and_told(tiny_chat):
    factor = torch.linspace(-2, 2, 48)
    order = Intervention(operator="scale", parameters={"factor": factor}, layer=2, site="mlp.hook_post")
    with pytest.warns(SharedPrefixWarning, match="1 of 2 conditions act inside of a block"):
        found = score_answers(tiny_chat, TEXT, [(), (order,)], progress=False).values
    for row, pair in enumerate(TEXT):

        def hooks_at(prompt):
            def scaled(post, hook):
                s = prompt.steer_start
                return torch.cat([post[:, :s], post[:, s:] * (1 + factor)], dim=1)

            return [("blocks.2.mlp.hook_post", scaled)]

        assert_close(found[row, 1], slow_score(tiny_chat, pair, hooks_at), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("place", [None, "all"])
@pytest.mark.filterwarnings("ignore::caa_lens.engine.shared_prefix.SharedPrefixWarning")
def test_a_gate_steers_the_pairs_that_open_it_and_leaves_the_others_bit_for_bit(tiny_chat, place):
    v = random_vectors(tiny_chat, scale=2.0)[2]
    states = []
    for pair in TEXT:
        _, cache = tiny_chat.run_with_cache(torch.tensor([Prompt.of(tiny_chat, pair.question).tokens]))
        states.append(cache["resid_post", 1][0, -1])
    direction = states[1] - (states[0] + states[2]) / 2
    projections = [float(state @ direction) for state in states]
    gate = Gate(direction=direction, bias=-(projections[1] + max(projections[0], projections[2])) / 2, layer=1)
    gated, free = ((Intervention(vector=v, gate=gate, positions=place),), (Intervention(vector=v, positions=place),))
    found = score_answers(tiny_chat, TEXT, [(), gated, free], progress=False).values
    assert torch.equal(found[[0, 2], 1], found[[0, 2], 0])
    assert_close(found[1, 1], found[1, 2], atol=1e-5, rtol=1e-5)
    assert abs(float(found[1, 1] - found[1, 0])) > 1e-4


def test_everything_runs_in_full_where_the_engine_cannot_stand_in(tiny_chat, monkeypatch):
    v = random_vectors(tiny_chat)[2]
    conditions = [(), (Intervention(vector=v),), (Intervention(vector=v, positions="last"),)]
    fast = score_answers(tiny_chat, TEXT, conditions, progress=False).values
    monkeypatch.setattr(shared_prefix, "unsupported", lambda model: "it is a test")
    with pytest.warns(SharedPrefixWarning, match="because it is a test"):
        slow = score_answers(tiny_chat, TEXT, conditions, progress=False).values
    assert_close(slow, fast, atol=2e-5, rtol=1e-4)
