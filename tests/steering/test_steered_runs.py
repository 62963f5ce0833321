"""What a block tells of its runs: which vector was not added, in how many of them, and why; and nothing untrue."""

import warnings

import pytest
import torch
from helpers.device import device
from helpers.models import random_vectors
from helpers.steering import Kept

from caa_lens.models.checks import check_model
from caa_lens.prompts.batches import left_pad
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.steering.generation import generate
from caa_lens.steering.interventions import Intervention
from caa_lens.steering.steered_block import steer
from caa_lens.steering.steered_runs import NothingSteeredWarning, OtherPromptWarning, VisiblePaddingWarning

TOKENS = torch.arange(14).reshape(2, 7)
GREEDY = {"do_sample": False, "stop_at_eos": False, "verbose": False}


def told(model, run, *vectors, **steering):
    """The warnings of a block, as (class, text), but for names that transformers has given up."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.no_grad(), steer(model, *vectors, **steering):
            run()
    return [(one.category, str(one.message)) for one in caught if one.category is not FutureWarning]


# ---- runs that a vector was not added in ------------------------------------------------------------------------


def test_hooks_that_were_reset_are_told_of_with_the_runs_they_missed(tiny, model_kind):
    vectors = random_vectors(tiny)

    def reset_after_one():
        tiny(TOKENS)
        tiny.reset_hooks()
        tiny(TOKENS)
        tiny(TOKENS)

    ((kind, text),) = told(tiny, reset_after_one, vectors[2], vectors[4], start=0)
    assert kind is NothingSteeredWarning
    assert text.startswith("nothing was steered in 2 of 3 runs: the block's hooks did not run. model.reset_hooks()")
    assert told(tiny, tiny.reset_hooks, vectors[2], start=0) == []  # nothing ran without them

    def remove_one():
        tiny.hook_dict["blocks.2.hook_resid_post"].remove_hooks()
        tiny(TOKENS)

    ((_, text),) = told(tiny, remove_one, vectors[2], vectors[4], start=0)
    assert text.startswith("the vector at layer 2 was not added: the block's hooks did not run")

    def hide():
        place = "hook_resid_post" if model_kind == "hooked" else "hook_out"
        setattr(tiny.blocks[2], place, torch.nn.Identity())  # as a SAE is put in a hook point's place
        tiny(TOKENS)

    ((_, text),) = told(tiny, hide, vectors[2], start=0)
    assert "a module put in the place of a hook point hides it" in text


@pytest.mark.parametrize(
    ("run", "layers", "expected"),
    [
        (lambda m, h: m(TOKENS, stop_at_layer=2), [2], "nothing was steered: what ran stopped after block 1: let it"),
        (lambda m, h: m(TOKENS, stop_at_layer=3), [2], None),
        (lambda m, h: m(TOKENS, stop_at_layer=3), [1, 4], "the vector at layer 4 was not added: what ran stopped"),
        (lambda m, h: m(TOKENS, stop_at_layer=1), [0, 3, 4], "the vectors at layers 3 and 4 were not added: what ran"),
    ],
)
def test_runs_that_stop_before_a_vectors_layer_are_told_of(tiny, run, layers, expected):
    assert_told(tiny, run, layers, expected)


def assert_told(tiny, run, layers, expected):
    vectors = random_vectors(tiny)
    with torch.no_grad():
        half = tiny(TOKENS, stop_at_layer=3)
    found = told(tiny, lambda: run(tiny, half), *[vectors[layer] for layer in layers], start=0)
    assert [text.startswith(expected) for _, text in found] == ([] if expected is None else [True])
    assert all(kind is NothingSteeredWarning for kind, _ in found)


@pytest.mark.hooked  # a bridge of TransformerLens 3 cannot start at a layer
@pytest.mark.parametrize(
    ("run", "layers", "expected"),
    [
        (lambda m, h: m(h, start_at_layer=3), [2], "nothing was steered: what ran started at block 3, above layer 2"),
        (lambda m, h: m(h, start_at_layer=3), [3], None),
        (lambda m, h: m(h, start_at_layer=3), [2, 3], "the vector at layer 2 was not added: what ran started at block"),
        (lambda m, h: m(h, start_at_layer=-2), [2], "nothing was steered: what ran started at block 3, above layer 2"),
        (lambda m, h: (m(TOKENS), m(h, start_at_layer=3)), [2], "nothing was steered in 1 of 2 runs: what ran started"),
        (lambda m, h: m.blocks[4](m.blocks[3](h)), [2], "nothing was steered: what ran started at block 3, above"),
        (lambda m, h: m.run_with_cache(TOKENS, stop_at_layer=1), [2], "nothing was steered: what ran stopped after"),
    ],
)
def test_parts_of_runs_without_a_vectors_layer_are_told_of(tiny, run, layers, expected):
    assert_told(tiny, run, layers, expected)


@pytest.mark.hooked  # a bridge of TransformerLens 3 cannot start at a layer
def test_a_run_in_two_halves_is_one_run(tiny):
    """Stopped at a layer, looked at or changed, and gone on with: once, or several times."""
    vectors = random_vectors(tiny)

    def halves():
        half = tiny(TOKENS, stop_at_layer=2)
        for scale in (1, 2, 3):
            tiny(scale * half, start_at_layer=2)

    assert told(tiny, halves, vectors[1], vectors[4], start=0) == []

    def the_same_half_thrice():
        half = tiny(TOKENS, stop_at_layer=2)
        for _ in range(3):
            tiny(half, start_at_layer=2)

    assert told(tiny, the_same_half_thrice, vectors[1], vectors[4], start=0) == []

    def reset_between():
        half = tiny(TOKENS, stop_at_layer=2)
        tiny(half, start_at_layer=2)
        tiny.reset_hooks()
        tiny(half, start_at_layer=2)  # the vector below is in it, the one above is not

    ((_, text),) = told(tiny, reset_between, vectors[1], vectors[4], start=0)
    assert text.startswith("the vector at layer 4 was not added in 1 of 2 runs: the block's hooks did not run")

    def thirds():
        tiny(tiny(tiny(TOKENS, stop_at_layer=1), start_at_layer=1, stop_at_layer=3), start_at_layer=3)

    assert told(tiny, thirds, *vectors, start=0) == []

    def another_shape():
        tiny(TOKENS, stop_at_layer=2)
        tiny(torch.zeros(2, 6, 32), start_at_layer=2)

    found = told(tiny, another_shape, vectors[1], vectors[4], start=0)
    assert [text.split(":")[0] for _, text in found] == [
        "the vector at layer 4 was not added in 1 of 2 runs",
        "the vector at layer 1 was not added in 1 of 2 runs",
    ]


def test_each_vector_with_a_place_of_its_own_is_told_of_by_itself(tiny):
    v, w = random_vectors(tiny)[1], random_vectors(tiny)[3]
    far = Intervention(vector=w, start=20)
    ((_, text),) = told(tiny, lambda: tiny(TOKENS), v, far, start=0)
    assert text.startswith(
        "the vector at layer 3 was not added: what the model ran has 7 tokens, and steering starts at"
    )
    span = Intervention(vector=w, positions=(2, 4))
    assert told(tiny, lambda: tiny(TOKENS), v, span, start=0) == []


def test_two_caches_in_turn_are_two_runs(tiny):
    v, one = random_vectors(tiny)[2], torch.ones(1, 1, dtype=torch.long)

    def caches(*lengths):
        made = [Kept(tiny) for _ in lengths]
        for step in range(max(lengths)):
            for kept, length in zip(made, lengths, strict=True):
                if step < length:
                    kept(one)

    assert told(tiny, lambda: caches(8, 9), v, start=7) == []
    ((_, text),) = told(tiny, lambda: caches(8, 3), v, start=7)
    assert text.startswith("nothing was steered in 1 of 2 runs: what the model ran has 3 tokens")

    def behind_the_span():
        kept = Kept(tiny)
        with steer(tiny, v, start=0):
            kept(torch.ones(1, 6, dtype=torch.long))
        return kept

    kept = behind_the_span()
    ((_, text),) = told(tiny, lambda: kept(one), v, positions=(2, 4))
    assert text == "nothing was steered: what ran begins at position 6, behind what is steered, at positions 2 to 3"


def test_a_run_that_failed_is_not_counted(tiny):
    v = random_vectors(tiny)[3]

    def fail(resid, hook):
        raise ZeroDivisionError

    def fail_and_go_on():
        for layer in (1, 4):
            with pytest.raises(ZeroDivisionError):
                tiny.run_with_hooks(TOKENS, fwd_hooks=[(f"blocks.{layer}.hook_mlp_out", fail)])
        tiny(TOKENS)

    assert told(tiny, fail_and_go_on, v, start=0) == []


def test_nothing_of_a_block_is_left_on_the_model(tiny):
    def hooks_of(model):
        return [(len(one._forward_hooks), len(one._forward_pre_hooks)) for one in model.modules()]

    check_model(tiny)  # a bridge is prepared once
    before = hooks_of(tiny)
    with steer(tiny, *random_vectors(tiny), start=0):
        tiny(TOKENS)
        assert hooks_of(tiny) != before
    assert hooks_of(tiny) == before
    with steer(tiny, start=0):  # no vectors: nothing is followed
        assert hooks_of(tiny) == before


# ---- other prompts: tokens are compared, not embeddings ---------------------------------------------------------


@pytest.mark.parametrize("change", ["hook", "forward hook"])
def test_an_embedding_that_was_hooked_is_no_other_prompt(demo_tokenizer, change, tiny_model):
    assert_no_other_prompt(demo_tokenizer, change, tiny_model)


@pytest.mark.hooked  # its modules are patched
@pytest.mark.parametrize("change", ["scaled", "normed"])
def test_an_embedding_that_was_changed_is_no_other_prompt(demo_tokenizer, change, tiny_model):
    assert_no_other_prompt(demo_tokenizer, change, tiny_model)


def assert_no_other_prompt(demo_tokenizer, change, tiny_model):
    model = tiny_model(d_vocab=len(demo_tokenizer), n_ctx=256, n_layers=3, tokenizer=demo_tokenizer)
    prompt, other = Prompt.of(model, "How was your day?"), Prompt.of(model, "Who was the first to be there, and why?")
    if change == "hook":
        model.add_hook("hook_embed", lambda embed, hook: 3 * embed)
    elif change == "forward hook":
        model.embed.register_forward_hook(lambda module, given, embed: embed + 1)
    elif change == "scaled":  # as Gemma scales it
        forward = model.embed.forward
        model.embed.forward = lambda tokens: 7 * forward(tokens)
    else:  # as BLOOM norms it
        from transformer_lens.components import LayerNorm

        model.embed.ln, model.embed.cfg.post_embedding_ln = LayerNorm(model.cfg).to(device()), True
    v = random_vectors(model)[1]

    def run(prompt, how):
        tokens = torch.tensor([prompt.tokens])
        return lambda: model(tokens) if how == "forward" else model.generate(tokens, max_new_tokens=2, **GREEDY)

    for how in ("forward", "generate"):
        assert told(model, run(prompt, how), v, prompt=prompt) == []
        ((kind, _),) = told(model, run(other, how), v, prompt=prompt)
        assert kind is OtherPromptWarning


# ---- padding ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def padded(tiny_chat):
    prompts = [Prompt.of(tiny_chat, text) for text in ("Why?", "Is it right to lie to a friend who asks for it?")]
    return prompts, left_pad(prompts, n_ctx=tiny_chat.cfg.n_ctx, device=device())


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_that_sees_the_padding_is_told_of_and_is_another_text(
    tiny_chat, padded, monkeypatch, use_cache, model_kind
):
    """TransformerLens#1005: its `generate` guesses the mask from the pad token, at the tokenizer's own padding side."""
    prompts, batch = padded
    v = random_vectors(tiny_chat, scale=2.0)[2]
    ours = generate(tiny_chat, prompts, [v], max_new_tokens=5)
    tokenizer = tiny_chat.tokenizer
    with_pads = torch.where(batch.attention_mask, batch.tokens, tokenizer.pad_token_id)
    for tokens, side, is_right in (
        (batch.tokens, "right", False),
        (batch.tokens, "left", False),
        (with_pads, "right", False),
        (with_pads, "left", model_kind == "hooked"),  # a bridge guesses no mask
    ):
        monkeypatch.setattr(tokenizer, "padding_side", side)
        texts = []

        def run(tokens=tokens, texts=texts):
            made = tiny_chat.generate(tokens, max_new_tokens=5, use_past_kv_cache=use_cache, **GREEDY)
            texts.extend(tokenizer.decode(row[batch.tokens.shape[1] :]) for row in made)

        found = told(tiny_chat, run, v, prompt=prompts)
        assert (texts == ours) == is_right
        assert [kind for kind, _ in found] == ([] if is_right else [VisiblePaddingWarning])
        assert is_right or "use caa_lens.generate(model, prompts, vectors=[...])" in found[0][1]


def test_a_forward_is_told_of_only_if_its_mask_lets_padding_through(tiny_chat, padded):
    prompts, batch = padded
    v, mask = random_vectors(tiny_chat)[2], batch.attention_mask
    for given, expected in (
        (mask, []),
        (mask.long(), []),
        (None, [VisiblePaddingWarning]),
        (torch.ones_like(mask), [VisiblePaddingWarning]),
    ):
        found = told(tiny_chat, lambda given=given: tiny_chat(batch.tokens, attention_mask=given), v, prompt=prompts)
        assert [kind for kind, _ in found] == expected
    # Without padding there is nothing to see, and our own generation masks it.
    for prompt in (prompts[0], [prompts[0], prompts[0]]):
        tokens = torch.tensor([prompts[0].tokens] * 2)
        assert told(tiny_chat, lambda tokens=tokens: tiny_chat(tokens), v, prompt=prompt) == []
    assert told(tiny_chat, lambda: generate(tiny_chat, prompts, max_new_tokens=2), v, prompt=prompts) == []
