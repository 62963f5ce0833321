"""The shared-prefix engine against its slow twin: one full forward of TransformerLens per condition."""

import itertools
import re

import pytest
import torch
from helpers.device import device
from helpers.models import random_vectors
from helpers.steering import plain_hook, streams
from torch.testing import assert_close

from caa_lens.engine import shared_prefix
from caa_lens.engine.edits import Edit
from caa_lens.engine.staircase import Staircase

TEXTS = [[5, 9, 2, 40, 33, 8, 21], [1, 2, 3], [50, 12, 7, 7, 7, 19, 4, 60, 31, 2, 11]]


def edit_of(vector, operator="add", multiplier=1.0):
    """What is done with a vector in the engine's suffixes, of which everything is steered."""
    where = {"layer": vector.layer, "positions": (0, None)}
    return Edit(direction=vector.direction, multiplier=multiplier, operator=operator, **where)


def twin_residual(model, tokens, condition=(), start=0):
    """`resid_post` of the last block for one text, steered by plain hooks from `start` on, uncached."""
    hooks = [plain_hook(one.layer, one.direction, start, one.multiplier, one.operator) for one in condition]
    with model.hooks(fwd_hooks=hooks):
        return streams(model, [tokens])[-1, 0]


@pytest.mark.parametrize("n_key_value_heads", [None, 2, 1])
def test_suffixes_behind_a_prefix_equal_whole_texts(n_key_value_heads, tiny_model):
    model = tiny_model(n_key_value_heads=n_key_value_heads)
    splits = [3, 0, 10]
    suffixes = [[text[n:], [*text[n:], 17, 18]] for text, n in zip(TEXTS, splits, strict=True)]
    seen, which = {}, []

    def record(layer, resid):
        questions, rows = (range(3)[which[0]], range(2)[which[1]])
        for (question, row), stream in zip(itertools.product(questions, rows), resid.flatten(0, 1), strict=True):
            seen[layer, question, row] = stream
        return resid

    def coming(*question_and_row):
        which[:] = question_and_row

    with torch.inference_mode():
        prefix = shared_prefix.prefill(model, [text[:n] for text, n in zip(TEXTS, splits, strict=True)])
        out = shared_prefix.run_suffixes(model, prefix, suffixes, record, coming=coming)
    for i, (text, n) in enumerate(zip(TEXTS, splits, strict=True)):
        for row, whole in enumerate([text, [*text, 17, 18]]):
            own = streams(model, [whole])[:, 0]
            length = len(whole) - n
            for layer in range(model.cfg.n_layers):
                assert_close(seen[layer, i, row][:length], own[layer, n:], atol=2e-5, rtol=1e-5)
            assert_close(out[i, row, :length], own[-1, n:], atol=2e-5, rtol=1e-5)


def test_a_batch_of_empty_prefixes_is_a_plain_forward(tiny, model_kind):
    with torch.inference_mode():
        prefix = shared_prefix.prefill(tiny, [[], [], []])  # not as many as key heads
        out = shared_prefix.run_suffixes(tiny, prefix, [[text] for text in TEXTS[:3]], lambda layer, resid: resid)
    if model_kind == "hooked":
        assert prefix.keys[0].shape == (3, 2, 8, 0)
        assert prefix.values[0].shape == (3, 2, 0, 8)
    else:
        assert [one.get_seq_length() for one in prefix] == [0, 0, 0]
    assert_close(out[0, 0, :7], twin_residual(tiny, TEXTS[0]), atol=2e-5, rtol=1e-5)
    assert_close(out[1, 0, :3], twin_residual(tiny, TEXTS[1]), atol=2e-5, rtol=1e-5)


def conditions_for(model):
    vectors, others = random_vectors(model, seed=1), random_vectors(model, seed=2)
    last = model.cfg.n_layers - 1
    return [
        (),
        (edit_of(vectors[0], multiplier=1.5),),
        (edit_of(vectors[last], multiplier=-1.0),),
        (edit_of(vectors[2], multiplier=0.0),),
        (edit_of(vectors[2], multiplier=2.0),),
        (edit_of(vectors[1], multiplier=1.0), edit_of(others[3], multiplier=-2.0)),
        (edit_of(vectors[1], multiplier=1.0), edit_of(others[1], multiplier=-2.0)),
        (edit_of(vectors[2], operator="ablate"),),
        (edit_of(vectors[2], operator="set", multiplier=3.0),),
        (edit_of(vectors[2], operator="set", multiplier=0.0),),
        (edit_of(vectors[1], multiplier=1.0), edit_of(others[3], multiplier=-2.0)),
    ]


@pytest.mark.parametrize("branches", [1, 2])
def test_the_staircase_gives_every_condition_its_own_numbers(tiny, branches):
    conditions = conditions_for(tiny)
    starts = [len(text) - 2 for text in TEXTS]
    tails = [[], [30, 31, 32]][:branches]
    stairs = Staircase(conditions, device())
    with torch.inference_mode():
        prefix = shared_prefix.prefill(tiny, [text[:n] for text, n in zip(TEXTS, starts, strict=True)])
        out = shared_prefix.run_suffixes(
            tiny,
            prefix,
            [[text[n:] + tail for tail in tails] for text, n in zip(TEXTS, starts, strict=True)],
            stairs,
        ).unflatten(1, (-1, branches))
    groups = stairs.condition_groups()
    for i, (text, start) in enumerate(zip(TEXTS, starts, strict=True)):
        for c, condition in enumerate(conditions):
            for branch, tail in enumerate(tails):
                expected = twin_residual(tiny, text + tail, condition, start)[start:]
                assert_close(out[i, groups[c], branch, : len(expected)], expected, atol=3e-5, rtol=1e-5)


def test_conditions_with_the_same_history_share_their_rows(tiny):
    vectors = random_vectors(tiny)
    conditions = [(edit_of(vectors[layer], multiplier=m),) for layer in range(5) for m in (-1.0, 0.0, 1.0)]
    stairs = Staircase(conditions, device())
    with torch.inference_mode():
        prefix = shared_prefix.prefill(tiny, [TEXTS[0]])
        out = shared_prefix.run_suffixes(tiny, prefix, [[[3, 4]]], stairs)
    assert out.shape[1] == 1 + 5 * 2  # all multipliers 0 are one row


def test_rows_that_no_condition_needs_any_more_are_dropped(tiny):
    vectors = random_vectors(tiny)
    stairs = Staircase([(edit_of(vectors[0]),), (edit_of(vectors[1]),)], device())
    with torch.inference_mode():
        prefix = shared_prefix.prefill(tiny, [TEXTS[0]])
        out = shared_prefix.run_suffixes(tiny, prefix, [[[3, 4]]], stairs)
    assert out.shape[1] == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_float32_than_a_plain_forward_is(dtype, tiny_model):
    exact = tiny_model()
    model = tiny_model(dtype=dtype)
    model.load_state_dict({k: v.to(dtype) if v.is_floating_point() else v for k, v in exact.state_dict().items()})
    vector = random_vectors(exact, scale=0.5)[2]
    condition = (edit_of(vector, multiplier=2.0),)
    plain, fast = [], []
    for text in TEXTS[::2]:
        start = len(text) - 2
        reference = twin_residual(exact, text, condition, start)[-1]
        stairs = Staircase([condition], device())
        with torch.inference_mode():
            prefix = shared_prefix.prefill(model, [text[:start]])
            out = shared_prefix.run_suffixes(model, prefix, [[text[start:]]], stairs)
        assert out.dtype == dtype
        plain.append((twin_residual(model, text, condition, start)[-1].float() - reference).abs().mean())
        fast.append((out[0, 0, -1].float() - reference).abs().mean())
    assert sum(fast) <= 1.5 * sum(plain)


@pytest.mark.hooked  # the table is of TransformerLens
def test_positions_past_the_precomputed_rotary_table_are_right(tiny_model):
    model = tiny_model(n_ctx=4096)
    torch.manual_seed(0)
    text = torch.randint(0, 64, (2060,)).tolist()
    with torch.inference_mode():
        prefix = shared_prefix.prefill(model, [text[:2045]], n_layers=2)
        out = shared_prefix.run_suffixes(model, prefix, [[text[2045:]]], lambda layer, resid: resid, n_layers=2)
        expected = model(torch.tensor([text]), stop_at_layer=2)[0, 2045:]
    assert_close(out[0, 0], expected, atol=2e-5, rtol=1e-4)


def test_a_model_with_hooks_of_its_own_is_not_supported(tiny):
    assert shared_prefix.unsupported(tiny) is None
    with tiny.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda resid, hook: None)]):
        assert re.search(r"hooks of your own at blocks\.1\.hook_(resid_post|out)$", shared_prefix.unsupported(tiny))


@pytest.mark.hooked  # a bridge is any architecture
def test_a_model_of_another_architecture_is_not_supported(tiny):
    tiny.cfg.parallel_attn_mlp = True
    assert "not a plain Llama-family model" in shared_prefix.unsupported(tiny)


def test_the_kv_cost_of_a_row_is_the_formula_of_the_docs(tiny_model):
    model = tiny_model(n_layers=3, n_key_value_heads=2)
    assert shared_prefix.kv_bytes(model, 150) == 2 * 3 * 2 * 8 * 150 * 4


def test_the_token_budget_shrinks_with_the_free_memory(tiny, monkeypatch):
    monkeypatch.setattr(shared_prefix, "free_memory", lambda device: 10_000_000)
    small = shared_prefix.token_budget(tiny, 100, 4)
    monkeypatch.setattr(shared_prefix, "free_memory", lambda device: 20_000_000)
    assert shared_prefix.token_budget(tiny, 100, 4) == pytest.approx(2 * small, abs=1)
    monkeypatch.setattr(shared_prefix, "free_memory", lambda device: 0)
    assert shared_prefix.token_budget(tiny, 100, 4) == 4  # always room for one row
