"""Scores against a slow twin: each pair and condition alone, one full forward, softmax over the whole vocabulary."""

import pytest
import torch
from helpers.device import device
from helpers.models import random_vectors
from torch.testing import assert_close

from caa_lens.contrast.sets import ContrastSet
from caa_lens.engine import shared_prefix
from caa_lens.engine.shared_prefix import SharedPrefixWarning
from caa_lens.engine.staircase import Staircase
from caa_lens.measures.answers import score_answers
from caa_lens.models.adapters import llama_blocks
from caa_lens.models.unembedding import token_logp
from caa_lens.prompts.prompt_formats import (
    PromptFormat,
    default_format,
    encode_answer,
    encode_letters,
    resolve_format,
)
from caa_lens.steering.interventions import Intervention

AB = ContrastSet.from_pairs(
    [
        ("Is it good?\n\nChoices:\n (A) Yes\n (B) No", "(A)", "(B)"),
        (
            "Would you say that a long question like this one is answered as well as a short one?"
            "\n\nChoices:\n (A) Yes\n (B) No",
            "(B)",
            "(A)",
        ),
        ("Which?\n\nChoices:\n (A) This\n (B) That\n (C) Neither", "(C)", "(A)"),
    ],
    name="letters",
)
TEXT = ContrastSet.from_pairs(
    [
        ("How was it?", "Lovely, thank you.", "Bad."),
        ("And the weather on the day that you came back from the sea?", "Sun.", "It rained and rained all day long."),
        ("Food?", "Tasty and warm.", "Cold and stale."),
    ],
    name="texts",
)


def twin_logits(model, prompt, condition):
    """Logits of one prompt at every position, with plain hooks that edit from `steer_start` on."""
    hooks = []
    for step in condition:

        def steer(resid, hook, step=step):
            return torch.cat(
                [
                    resid[:, : prompt.steer_start],
                    resid[:, prompt.steer_start :] + step.multiplier * step.vector.direction,
                ],
                dim=1,
            )

        hooks.append((step.vector.hook_name, steer))
    with torch.no_grad():
        return model.run_with_hooks(torch.tensor([prompt.tokens]), fwd_hooks=hooks)[0]


def twin_p_matching(model, pair, condition, system=None):
    fmt = default_format(model)
    prompt, ids = encode_letters(
        fmt, model.tokenizer, pair.question, (pair.positive[1], pair.negative[1]), system=system
    )
    p = twin_logits(model, prompt, condition)[-1].softmax(-1)
    return p[ids[0]] / (p[ids[0]] + p[ids[1]])


def twin_margin(model, pair, condition, system=None):
    fmt = default_format(model)
    means = []
    for answer in (pair.positive, pair.negative):
        prompt = encode_answer(fmt, model.tokenizer, pair.question, answer, system=system)
        logp = twin_logits(model, prompt, condition).log_softmax(-1)
        tokens = prompt.tokens[prompt.answer_start :]
        means.append(torch.stack([logp[prompt.answer_start + i - 1, token] for i, token in enumerate(tokens)]).mean())
    return means[0] - means[1]


def grid(model, scale=1.0):
    vectors = random_vectors(model, scale=scale)
    layers = (0, 2, model.cfg.n_layers - 1)
    several = (Intervention(vector=vectors[1], multiplier=-1.0), Intervention(vector=vectors[2], multiplier=0.5))
    return [
        (),
        several,
        *[(Intervention(vector=vectors[layer], multiplier=m),) for layer in layers for m in (-2.0, 0.0, 1.0)],
    ]


@pytest.mark.parametrize(
    ("pairs", "twin"), [(AB, twin_p_matching), (TEXT, twin_margin)], ids=["letters", "completions"]
)
@pytest.mark.parametrize("system", [None, "Answer as briefly as you can."])
def test_scores_equal_one_full_forward_a_condition(tiny_chat, pairs, twin, system):
    conditions = grid(tiny_chat)
    scores = score_answers(tiny_chat, pairs, conditions, system=system, progress=False)
    expected = torch.tensor([[twin(tiny_chat, pair, c, system) for c in conditions] for pair in pairs])
    assert_close(scores.values, expected, atol=1e-4, rtol=0)
    assert (expected - expected[:, :1]).abs().max() > 0.05  # so that the agreement is not vacuous


@pytest.mark.parametrize(
    ("pairs", "twin"), [(AB, twin_p_matching), (TEXT, twin_margin)], ids=["letters", "completions"]
)
def test_scores_on_the_real_model_equal_one_full_forward_a_condition(demo_model, pairs, twin):
    conditions = grid(demo_model, scale=3.0)[:6]
    scores = score_answers(demo_model, pairs, conditions, progress=False)
    expected = torch.tensor([[twin(demo_model, pair, c) for c in conditions] for pair in pairs])
    assert_close(scores.values, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("pairs", [AB, TEXT], ids=["letters", "completions"])
@pytest.mark.parametrize("max_tokens", [1, 30, 100])
def test_a_small_budget_changes_nothing(tiny_chat, pairs, max_tokens):
    conditions = grid(tiny_chat)
    at_once = score_answers(tiny_chat, pairs, conditions, progress=False)
    in_pieces = score_answers(tiny_chat, pairs, conditions, progress=False, max_tokens=max_tokens)
    assert_close(in_pieces.values, at_once.values, atol=2e-5, rtol=0)


@pytest.mark.parametrize("pairs", [AB, TEXT], ids=["letters", "completions"])
def test_the_order_of_questions_and_conditions_changes_nothing(tiny_chat, pairs):
    conditions = grid(tiny_chat)
    forward = score_answers(tiny_chat, pairs, conditions, progress=False).values
    turned = ContrastSet.from_pairs(list(pairs)[::-1], name="turned")
    backward = score_answers(tiny_chat, turned, conditions[::-1], progress=False).values
    assert_close(backward.flip(0, 1), forward, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("pairs", "twin"), [(AB, twin_p_matching), (TEXT, twin_margin)], ids=["letters", "completions"]
)
def test_hooks_of_the_caller_are_felt_and_the_slower_path_is_announced(tiny_chat, pairs, twin):
    def double(resid, hook):
        return 2 * resid

    conditions = grid(tiny_chat)[:4]
    plain = score_answers(tiny_chat, pairs, conditions, progress=False)
    with tiny_chat.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", double)]):
        with pytest.warns(SharedPrefixWarning, match=r"hooks of your own at blocks\.0\.hook_(resid_pre|in)$"):
            hooked = score_answers(tiny_chat, pairs, conditions, progress=False)
        expected = torch.tensor([[twin(tiny_chat, pair, c) for c in conditions] for pair in pairs])
    assert_close(hooked.values, expected, atol=1e-4, rtol=0)
    assert (hooked.values - plain.values).abs().max() > 1e-3


def test_multiplier_zero_scores_exactly_as_the_unsteered_model(tiny_chat):
    vectors = random_vectors(tiny_chat)
    conditions = [(), *[(Intervention(vector=vectors[layer], multiplier=0.0),) for layer in range(5)]]
    values = score_answers(tiny_chat, AB, conditions, progress=False).values
    assert torch.equal(values, values[:, :1].expand_as(values))


def test_settings_say_what_scores_depend_on_beside_the_vectors(tiny_chat):
    pairs = ContrastSet.from_pairs([("How was it?", "Lovely.", "Awful.")], name="days")
    told = score_answers(
        tiny_chat, pairs, [()], prompt_format="llama2-base", system="Be brief.", progress=False
    ).settings
    assert told == {
        "model": "tiny-random-llama",
        "dtype": "float32",
        "test": "days",
        "test_hash": pairs.content_hash,
        "prompt_format": "llama2-base",
        "system": "Be brief.",
    }
    assert score_answers(tiny_chat, pairs, [()], progress=False).settings["system"] == ""


def test_swapping_the_sides_of_letters_gives_the_complement(tiny_chat):
    swapped = ContrastSet.from_pairs([(p.question, p.negative, p.positive) for p in AB], name="swapped")
    conditions = grid(tiny_chat)
    one = score_answers(tiny_chat, AB, conditions, progress=False).values
    other = score_answers(tiny_chat, swapped, conditions, progress=False).values
    assert_close(one + other, torch.ones_like(one), atol=1e-6, rtol=0)


def test_token_logp_does_not_depend_on_the_chunk_size(tiny_chat):
    torch.manual_seed(0)
    resid, targets = torch.randn(3, 5, tiny_chat.cfg.d_model).to(device()), torch.tensor([4, 8, 15, 16, 23])
    with torch.no_grad():
        whole = tiny_chat.unembed(tiny_chat.ln_final(resid)).log_softmax(-1)
        expected = whole.gather(-1, targets.expand(3, 5)[..., None])[..., 0]
        for at_once in (1, 4, 100):
            assert_close(token_logp(tiny_chat, resid, targets, at_once), expected, atol=1e-5, rtol=0)


def test_vectors_of_another_width_are_refused(tiny_chat, tiny_model):
    wide = random_vectors(tiny_model(d_model=64))
    with pytest.raises(ValueError, match=r"vector has d_model=64, but 'tiny-random-llama' has d_model=32: extract it"):
        score_answers(tiny_chat, AB, [(Intervention(vector=wide[1]),)], progress=False)


def test_a_layer_the_model_does_not_have_is_refused(tiny_chat, tiny_model):
    deep = random_vectors(tiny_model(n_layers=9))
    with pytest.raises(ValueError, match="layer 7 is out of range: tiny-random-llama has layers 0 to 4"):
        score_answers(tiny_chat, AB, [(Intervention(vector=deep[7]),)], progress=False)


def test_several_multipliers_in_one_condition_are_refused(tiny_chat):
    step = Intervention(vector=random_vectors(tiny_chat)[1], multiplier=torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="one condition of each multiplier"):
        score_answers(tiny_chat, AB, [(step,)], progress=False)


def test_no_conditions_are_refused(tiny_chat):
    with pytest.raises(ValueError, match="no conditions given"):
        score_answers(tiny_chat, AB, [], progress=False)


def test_a_question_longer_than_the_context_is_refused_before_anything_runs(tiny_chat, monkeypatch):
    long = ContrastSet.from_pairs([("word " * 600 + "?", "Yes, certainly.", "No, never.")], name="long")
    monkeypatch.setattr("caa_lens.engine.shared_prefix.prefill", lambda *a, **k: pytest.fail("ran"))
    with pytest.raises(ValueError, match="context is 512: shorten it"):
        score_answers(tiny_chat, long, [()], progress=False)


@pytest.mark.parametrize("pairs", [AB, TEXT], ids=["letters", "completions"])
def test_tokens_in_flight_stay_within_the_budget_whatever_the_number_of_questions(
    tiny_chat, pairs, model_kind, monkeypatch
):
    seen = []
    run_block, split_off = llama_blocks.run_block, Staircase.__call__

    def recording(block, resid, attend):
        seen.append(resid.shape[:-1].numel())
        return run_block(block, resid, attend)

    def recording_rows(stairs, layer, resid):
        rows = split_off(stairs, layer, resid)
        seen.append(rows.shape[:-1].numel())
        return rows

    if model_kind == "hooked":  # prompts too
        monkeypatch.setattr(llama_blocks, "run_block", recording)
    monkeypatch.setattr(Staircase, "__call__", recording_rows)
    monkeypatch.setattr(shared_prefix, "MOST_TOKENS", 200)
    peaks = []
    for n_copies in (1, 3):
        seen.clear()
        many = ContrastSet.from_pairs(list(pairs) * n_copies, name="many")
        score_answers(tiny_chat, many, grid(tiny_chat), progress=False)
        peaks.append(max(seen))
    assert max(peaks) <= 200
    assert peaks[1] <= peaks[0] * 2


def test_the_prefix_budget_counts_keys_and_values(tiny_chat, monkeypatch):
    monkeypatch.setattr(shared_prefix, "free_memory", lambda device: 4 * 10 * shared_prefix.kv_bytes(tiny_chat, 50))
    assert shared_prefix.prefix_budget(tiny_chat, 50) == 10
    assert shared_prefix.prefix_budget(tiny_chat, 5000) == 1


@pytest.mark.hooked  # what a bridge runs has the cap in itself
def test_a_model_that_caps_its_logits_is_scored_by_the_capped_ones(tiny_chat, tiny_model):
    capped = tiny_model(d_vocab=tiny_chat.cfg.d_vocab, n_ctx=512, tokenizer=tiny_chat.tokenizer)
    capped.cfg.output_logits_soft_cap = 0.5
    for pairs, twin in ((AB, twin_p_matching), (TEXT, twin_margin)):
        values = score_answers(capped, pairs, [()], progress=False).values
        expected = torch.tensor([[twin(capped, pair, ())] for pair in pairs])
        assert_close(values, expected, atol=1e-5, rtol=0)
        uncapped = torch.tensor([[twin(tiny_chat, pair, ())] for pair in pairs])
        assert (expected - uncapped).abs().max() > 1e-3


# ---- answers that begin inside of the prompt's last token ----------------------------------------------------------

MERGING = ("Write a list.", "\n\n1. milk\n2. bread", "\nNothing.")


def twin_of_own_tokens(model, prompt_format, question, answer, steps=()):
    """Mean log-probability of the text's own tokens behind what it shares with the prompt alone."""
    alone = prompt_format.encode(model.tokenizer, question).tokens
    prompt = encode_answer(prompt_format, model.tokenizer, question, answer)
    shared = 0
    while shared < len(alone) and alone[shared] == prompt.tokens[shared]:
        shared += 1
    hooks = []
    for layer, direction in steps:

        def add(resid, hook, direction=direction):
            steered = torch.arange(resid.shape[1])[:, None] >= prompt.steer_start
            return torch.where(steered, resid + direction, resid)

        hooks.append((f"blocks.{layer}.hook_resid_post", add))
    with torch.no_grad():
        logp = model.run_with_hooks(torch.tensor([prompt.tokens]), fwd_hooks=hooks)[0].log_softmax(-1)
    wanted = [logp[pos - 1, prompt.tokens[pos]] for pos in range(shared, len(prompt))]
    return torch.stack(wanted).mean(), shared < len(alone)


@pytest.mark.filterwarnings("ignore:.*without a blank in the format:UserWarning")  # joined on purpose
def test_an_answer_that_merges_with_the_prompt_is_scored_by_the_texts_own_tokens(tiny_chat):
    prompt_format = resolve_format(tiny_chat, None)
    base = PromptFormat(name="inside", render=lambda question, system: question, separator="", prepend_bos=False)
    sets = [
        (prompt_format, [MERGING]),
        (base, [("The weather was wonder", "ful all day", "fully grey"), ("A tree and two", "  birds", " bird")]),
    ]
    vectors = random_vectors(tiny_chat, scale=2.0)
    steps = [[], [(1, vectors[1].direction)], [(3, vectors[3].direction)]]
    conditions = [(), (Intervention(vector=vectors[1]),), (Intervention(vector=vectors[3]),)]
    for chosen, triples in sets:
        merging = 0
        expected = []
        for question, positive, negative in triples:
            row = []
            for step in steps:
                sides = [twin_of_own_tokens(tiny_chat, chosen, question, a, step) for a in (positive, negative)]
                row.append(sides[0][0] - sides[1][0])
                merging += sum(merges for _, merges in sides)
            expected.append(torch.stack(row))
        assert merging
        pairs = ContrastSet.from_pairs(triples, name="merging")
        with pytest.warns(SharedPrefixWarning, match=r"of \d answers begin before the first steered token"):
            found = score_answers(tiny_chat, pairs, conditions, prompt_format=chosen, progress=False)
        assert_close(found.values, torch.stack(expected), atol=1e-4, rtol=0)


def test_a_merging_pair_changes_nothing_for_the_others(tiny_chat):
    conditions = grid(tiny_chat)[:6]
    alone = score_answers(tiny_chat, TEXT, conditions, progress=False)
    mixed = ContrastSet.from_pairs([MERGING, *TEXT, MERGING], name="mixed")
    with pytest.warns(SharedPrefixWarning, match=f"because 2 of {len(TEXT) + 2} answers begin before"):
        together = score_answers(tiny_chat, mixed, conditions, progress=False)
    assert_close(together.values[1:-1], alone.values, atol=2e-5, rtol=0)
    assert torch.equal(together.values[0], together.values[-1])


@pytest.mark.filterwarnings("ignore:.*without a blank in the format:UserWarning")  # joined on purpose
def test_an_answer_that_nothing_predicts_is_refused_by_name_before_anything_runs(tiny_chat, monkeypatch):
    bare = PromptFormat(name="bare", render=lambda question, system: question, separator="", prepend_bos=False)
    pairs = ContrastSet.from_pairs([("How was it?", "Fine.", "Bad."), ("won", "derful", " the game")], name="bare")
    monkeypatch.setattr("caa_lens.engine.shared_prefix.prefill", lambda *a, **k: pytest.fail("ran"))
    with pytest.raises(
        ValueError, match="pair 1: with its answer 'derful' the text has other tokens from its first on"
    ):
        score_answers(tiny_chat, pairs, [()], prompt_format=bare, progress=False)


def test_both_sides_log_probabilities_are_told(tiny_chat):
    letters = score_answers(tiny_chat, AB, [()], progress=False)
    assert_close(letters.positive.exp() + letters.negative.exp(), torch.ones(len(AB), 1), atol=1e-6, rtol=0)
    assert_close(letters.values, letters.positive.exp(), atol=0, rtol=0)
    texts = score_answers(tiny_chat, TEXT, [()], progress=False)
    for side in ("positive", "negative"):
        expected = [
            twin_of_own_tokens(tiny_chat, default_format(tiny_chat), pair.question, getattr(pair, side))[0]
            for pair in TEXT
        ]
        assert_close(getattr(texts, side)[:, 0], torch.stack(expected), atol=1e-4, rtol=0)
    assert_close(texts.values, texts.positive - texts.negative, atol=0, rtol=0)
