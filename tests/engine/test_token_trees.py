"""Texts that begin alike as one row: every token once, and the numbers of each text by itself."""

import pytest
import torch
from helpers.models import random_vectors
from helpers.twins import twin_score
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from caa_lens.contrast.sets import ContrastSet
from caa_lens.engine import shared_prefix
from caa_lens.engine.edits import Edit
from caa_lens.engine.staircase import Staircase, Staircases
from caa_lens.engine.token_trees import TokenTree
from caa_lens.measures.answers import score_answers
from caa_lens.models.adapters import llama_blocks
from caa_lens.models.adapters.hooked import Hooked
from caa_lens.steering.interventions import Intervention

# Answers that share their first words, one that is the beginning of the other, and two that share nothing.
ALIKE = ContrastSet.from_pairs(
    [
        ("How was it?", "It was a lovely day, thank you.", "It was a bad one."),
        ("And the weather on the day that you came back?", "It rained", "It rained and rained all day long."),
        ("Food?", "Tasty and warm.", "Cold."),
    ],
    name="alike",
)


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=4))
def test_a_tree_holds_the_texts_and_what_they_share_once(texts):
    tree = TokenTree.of(texts)
    assert [[tree.tokens[i] for i in place] for place in tree.places] == texts
    for place in tree.places:
        assert [tree.parents[i] for i in place] == [-1, *place[:-1]]
    assert all(parent < token for token, parent in enumerate(tree.parents))
    assert len(set(zip(tree.parents, tree.tokens, strict=True))) == len(tree)
    assert len(tree) == len({tuple(text[:n]) for text in texts for n in range(1, len(text) + 1)})


@pytest.mark.hooked
def test_every_text_of_a_tree_has_the_numbers_of_its_own_run_under_every_condition(tiny):
    questions = [
        ([5, 9, 2, 7], [[3, 4, 8, 1], [3, 4, 6]]),
        ([11], [[2, 2, 2], [2, 2, 2, 9, 1]]),
        ([], [[7], [8, 7]]),
    ]
    vectors = random_vectors(tiny, seed=1)
    conditions = [()] + [
        (Edit(direction=vectors[layer].direction, layer=layer, positions=(0, None), multiplier=m, operator=operator),)
        for layer, m, operator in ((0, 1.5, "add"), (2, -1.0, "add"), (2, 1.0, "ablate"), (4, 2.0, "set"))
    ]
    trees, stairs = [TokenTree.of(texts) for _, texts in questions], Staircase(conditions)
    with torch.inference_mode():
        prefix = shared_prefix.prefill(tiny, [before for before, _ in questions])
        found = shared_prefix.run_suffixes(
            tiny, prefix, [[tree.tokens] for tree in trees], stairs, parents=[tree.parents for tree in trees]
        )
        for i, ((before, texts), tree) in enumerate(zip(questions, trees, strict=True)):
            for text, place in zip(texts, tree.places, strict=True):
                for condition, group in zip(conditions, stairs.condition_groups().tolist(), strict=True):
                    hooks = []
                    start = len(before)
                    for edit in condition:

                        def act(resid, hook, edit=edit, start=start):
                            return torch.cat([resid[:, :start], edit.apply(resid[:, start:], 0)], dim=1)

                        hooks.append((f"blocks.{edit.layer}.hook_resid_post", act))
                    with tiny.hooks(fwd_hooks=hooks):
                        tokens = torch.tensor([[*before, *text]])
                        own = tiny(tokens, attention_mask=torch.ones_like(tokens), stop_at_layer=tiny.cfg.n_layers)
                    assert_close(found[i, group, list(place)], own[0, start:], atol=3e-5, rtol=1e-5)


def conditions_of(model):
    vectors = random_vectors(model, scale=2.0)
    return [
        (),
        *[(Intervention(vector=vectors[layer], multiplier=m),) for layer in (0, 2, 4) for m in (-2.0, 0.0, 1.0)],
    ]


@pytest.mark.hooked
@pytest.mark.parametrize("max_tokens", [None, 40])
def test_scores_of_trees_equal_those_of_rows(tiny_chat, max_tokens, monkeypatch):
    conditions, runs = conditions_of(tiny_chat), []
    run_suffixes = llama_blocks.run_suffixes

    def recording(model, prefix, suffixes, *rest):
        runs.append(sum(len(row) for rows in suffixes for row in rows))
        return run_suffixes(model, prefix, suffixes, *rest)

    shared_prefix.unsupported(tiny_chat)  # what is compared once a model
    monkeypatch.setattr(llama_blocks, "run_suffixes", recording)
    together = score_answers(tiny_chat, ALIKE, conditions, progress=False, max_tokens=max_tokens)
    of_trees = sum(runs)
    runs.clear()
    monkeypatch.setattr(Hooked, "takes_trees", False)
    apart = score_answers(tiny_chat, ALIKE, conditions, progress=False, max_tokens=max_tokens)
    assert_close(together.positive, apart.positive, atol=2e-5, rtol=0)
    assert_close(together.negative, apart.negative, atol=2e-5, rtol=0)
    assert (together.values - together.values[:, :1]).abs().max() > 0.05
    if max_tokens is None:
        assert of_trees < sum(runs)


def test_scores_of_answers_that_begin_alike_are_the_models_own(tiny_chat):
    conditions = conditions_of(tiny_chat)
    found = score_answers(tiny_chat, ALIKE, conditions, progress=False)
    steps = [[(one.vector.layer, one.multiplier * one.vector.direction) for one in c] for c in conditions]
    expected = torch.stack([twin_score(tiny_chat, ALIKE, some) for some in steps], dim=1)
    assert_close(found.values, expected, atol=1e-4, rtol=0)


def test_multiplier_zero_of_completions_is_the_unsteered_model_and_no_other_condition_is(tiny_chat):
    conditions = conditions_of(tiny_chat)
    values = score_answers(tiny_chat, ALIKE, conditions, progress=False).values
    for column, condition in enumerate(conditions):
        unsteered = not condition or condition[0].multiplier == 0
        assert torch.equal(values[:, column], values[:, 0]) == unsteered


def test_what_looks_at_several_positions_at_once_is_not_given_a_tree(tiny_chat):
    """A formula of the user's may take a mean over the text that is in front of it, which a tree would mix."""

    def centre(stream, parameters, strength):
        return stream - strength * stream.cumsum(-2) / torch.arange(1, stream.shape[-2] + 1)[:, None]

    vector = random_vectors(tiny_chat)[2]
    assert not Staircases([(Edit(layer=2, positions=(0, None), operator=centre),)]).act_alike
    assert not Staircases([(Edit(direction=vector.direction, layer=2, positions=(0, 3)),), ()]).act_alike
    assert Staircases([(Edit(direction=vector.direction, layer=2, positions=(0, None)),), ()]).act_alike
    conditions = [(), (Intervention(vector=vector, multiplier=0.5, operator=centre),)]
    found = score_answers(tiny_chat, ALIKE, conditions, progress=False).values
    one_by_one = [
        score_answers(tiny_chat, ContrastSet.from_pairs([pair], name="one"), [c], progress=False, max_tokens=1).values
        for pair in ALIKE
        for c in conditions
    ]
    assert_close(found.flatten(), torch.cat(one_by_one).flatten(), atol=2e-5, rtol=0)


@pytest.mark.hooked
def test_a_tree_whose_texts_see_each_other_is_noticed_before_it_is_used(tiny_model, monkeypatch):
    model = tiny_model()
    assert shared_prefix.unsupported(model) is None
    tree = llama_blocks._tree

    def in_line(parents, n_pos, device):
        depth, _ = tree(parents, n_pos, device)
        return depth, tree(None, n_pos, device)[1]

    monkeypatch.setattr(llama_blocks, "_tree", in_line)
    assert "differ on a short prompt" in shared_prefix.unsupported(tiny_model())


@pytest.mark.hooked
def test_an_mlp_that_takes_some_tokens_at_a_time_gives_the_same_numbers(tiny_chat, monkeypatch):
    conditions = conditions_of(tiny_chat)
    whole = score_answers(tiny_chat, ALIKE, conditions, progress=False)
    monkeypatch.setattr(llama_blocks, "TOKENS_AT_ONCE", 7)
    pieces = score_answers(tiny_chat, ALIKE, conditions, progress=False)
    assert_close(pieces.values, whole.values, atol=2e-5, rtol=0)
