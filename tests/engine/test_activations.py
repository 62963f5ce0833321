"""Activations are those of the model itself, one prompt at a time, whatever is batched, padded or shared."""

import warnings

import pytest
import torch
from helpers.steering import hook_counts, streams

from caa_lens.engine.activations import read_pairs, read_residuals
from caa_lens.engine.shared_prefix import SharedPrefixWarning
from caa_lens.prompts.prompt_formats import Prompt, chat_template_format, encode_answer

PAIRS = [
    ("Is it so?\n\nChoices:\n (A) Yes\n (B) No", "(A)", "(B)"),
    ("Why?", "Because I love this so very much indeed.", "No."),
    ("Tell me all that you know of the sea, the sky and the mountains, and then some more.", "Fine!", "I won't do it."),
    ("Shall we?\n\nChoices:\n (A) No\n (B) Yes", "(B)", "(A)"),
    ("How was the journey to the coast?", "It was lovely.", "It was dreadful, cold and far too long."),
]


def prompt_of(tokens, read=None):
    tokens = tuple(int(token) for token in tokens)
    read = read or (len(tokens) - 1, len(tokens))
    return Prompt(text="made of ids", tokens=tokens, steer_start=0, answer_start=read[0], read=read)


def random_ids(n, seed, d_vocab=64):
    return torch.randint(d_vocab, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def random_prompts(lengths, *, span=1):
    """Prompts of random ids that read their last `span` tokens but one, as a letter answer does."""
    return [prompt_of(random_ids(n, seed), (max(0, n - 1 - span), n - 1)) for seed, n in enumerate(lengths)]


def one_by_one(model, prompts, layers=None):
    """The oracle: what the blocks give for each prompt alone, without padding, `[prompt layer d_model]`."""
    layers = range(model.cfg.n_layers) if layers is None else layers
    rows = []
    for prompt in prompts:
        own = streams(model, [prompt.tokens])[:, 0, slice(*prompt.read)]
        rows.append(torch.stack([own[layer].float().mean(0) for layer in layers]))
    return torch.stack(rows)


def pairs_one_by_one(model, pairs, layers=None):
    return torch.stack([one_by_one(model, [pair[side] for pair in pairs], layers) for side in (0, 1)], dim=1)


def collect(model, pairs, **kwargs):
    """What `read_pairs` yields, in the order that the pairs were given."""
    batches = list(read_pairs(model, pairs, **kwargs))
    order = [i for _, indices in batches for i in indices]
    assert sorted(order) == list(range(len(pairs)))
    return torch.cat([sides for sides, _ in batches])[torch.tensor(order).argsort()]


def assert_same(found, expected, rel=1e-5):
    """Equal up to `rel` of each activation's own norm, pair by pair and layer by layer."""
    assert found.shape == expected.shape
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(error.max()) < rel, f"largest relative error {float(error.max()):.2e}"


def encoded_pairs(tokenizer):
    fmt = chat_template_format(tokenizer)
    return [
        (encode_answer(fmt, tokenizer, q, positive), encode_answer(fmt, tokenizer, q, negative))
        for q, positive, negative in PAIRS
    ]


# ---- any prompts ----------------------------------------------------------------------------------------------


def test_residuals_are_the_caches_at_the_read_tokens(tiny_chat):
    prompts = [prompt for pair in encoded_pairs(tiny_chat.tokenizer) for prompt in pair]
    found = torch.cat(list(read_residuals(tiny_chat, prompts, batch_size=1)))
    torch.testing.assert_close(found, one_by_one(tiny_chat, prompts), rtol=1e-5, atol=1e-5)


def test_a_letters_residual_is_not_that_of_its_neighbours(tiny_chat):
    # Off by one would not be seen if neighbouring tokens had nearly the same activations.
    prompt = encoded_pairs(tiny_chat.tokenizer)[0][0]
    (found,) = read_residuals(tiny_chat, [prompt])
    own = streams(tiny_chat, [prompt.tokens])[:, 0]
    for layer in range(tiny_chat.cfg.n_layers):
        at = own[layer]
        distance = (at - found[0, layer]).norm(dim=-1)
        assert int(distance.argmin()) == len(prompt) - 2
        assert float(distance.sort().values[1]) > 0.1 * float(at.norm(dim=-1).mean())


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_batching_and_padding_change_nothing(tiny, batch_size):
    prompts = random_prompts([9, 40, 3, 17, 64, 17, 5], span=3)
    found = torch.cat(list(read_residuals(tiny, prompts, batch_size=batch_size)))
    assert_same(found, one_by_one(tiny, prompts))


def test_a_span_is_averaged_and_one_token_stands_for_itself(tiny):
    ids = random_ids(12, seed=3)
    singles = [prompt_of(ids, (pos, pos + 1)) for pos in range(4, 10)]
    (span,) = read_residuals(tiny, [prompt_of(ids, (4, 10))])
    each = torch.cat(list(read_residuals(tiny, singles)))
    torch.testing.assert_close(span[0], each.mean(0), rtol=1e-5, atol=1e-5)
    assert (each - span).norm(dim=-1).min() > 0.1  # else any one token would pass for the mean


def test_a_span_is_averaged_in_float32_in_a_half_precision_model(tiny_model):
    model = tiny_model(dtype=torch.bfloat16)
    prompt = prompt_of(random_ids(30, seed=1), (2, 29))
    (found,) = read_residuals(model, [prompt])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, one_by_one(model, [prompt]), rtol=1e-6, atol=1e-6)
    assert not torch.equal(found, found.bfloat16().float())  # finer than bfloat16 can hold


def test_some_layers_are_those_of_the_full_run_in_ascending_order(tiny):
    prompts = random_prompts([9, 21, 4])
    (full,) = read_residuals(tiny, prompts)
    for layers in ([3], [1, 3], [3, 1], [4, 0, 4], [2, 3, 4]):
        (found,) = read_residuals(tiny, prompts, layers=layers)
        torch.testing.assert_close(found, full[:, sorted(set(layers))], rtol=1e-5, atol=1e-5)


def test_callers_hooks_are_felt_and_kept(tiny):
    prompts = random_prompts([9, 21, 4])
    (plain,) = read_residuals(tiny, prompts)
    tiny.add_hook("blocks.2.hook_mlp_out", lambda out, hook: out * 1.5)
    before = hook_counts(tiny)
    (found,) = read_residuals(tiny, prompts)
    assert hook_counts(tiny) == before == {"blocks.2.hook_mlp_out": 1}
    assert_same(found, one_by_one(tiny, prompts))
    torch.testing.assert_close(found[:, :2], plain[:, :2], rtol=1e-5, atol=1e-5)
    assert ((found - plain)[:, 2:].norm(dim=-1) > 0.1).all()


# ---- pairs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_pairs_are_both_their_prompts(tiny_chat, batch_size):
    pairs = encoded_pairs(tiny_chat.tokenizer)
    found = collect(tiny_chat, pairs, batch_size=batch_size)
    for side in (0, 1):
        apart = torch.cat(list(read_residuals(tiny_chat, [pair[side] for pair in pairs])))
        assert_same(found[:, side], apart)
    assert_same(found, pairs_one_by_one(tiny_chat, pairs))


@pytest.mark.parametrize("n_key_value_heads", [None, 1, 2])
def test_pairs_of_every_shape_are_read_as_if_alone(n_key_value_heads, tiny_model):
    model = tiny_model(n_key_value_heads=n_key_value_heads)
    start = random_ids(40, seed=9)

    def pair(shared, positive, negative, read=None):
        a, b = random_ids(positive, seed=positive), random_ids(negative, seed=100 + negative)
        b[0] = (a[0] + 1) % 64  # the first tokens that are not shared differ
        sides = [prompt_of(start[:shared] + own, read or (shared, shared + len(own))) for own in (a, b)]
        return sides[0], sides[1]

    pairs = [
        pair(40, 1, 1),  # one token each
        pair(3, 30, 1),  # one side much longer than the other
        pair(2, 1, 25),
        pair(0, 7, 7),  # nothing shared
        pair(1, 12, 9),
        pair(20, 10, 6, read=(24, 26)),  # they differ before what is read
        (prompt_of(start, (10, 12)), prompt_of([*start[:12], 5, 6], (13, 14))),  # one is read early
        (prompt_of([7]), prompt_of([8])),  # nothing but the answer
    ]
    found = collect(model, pairs, batch_size=3)
    assert_same(found, pairs_one_by_one(model, pairs))
    assert ((found[:, 0] - found[:, 1]).norm(dim=-1) > 1e-3).all()


def test_equal_prompts_read_at_different_places_keep_their_own_places(tiny):
    ids = random_ids(15, seed=2)
    pairs = [(prompt_of(ids, (3, 4)), prompt_of(ids, (9, 14))), (prompt_of(ids, (8, 9)), prompt_of(ids, (2, 3)))]
    assert_same(collect(tiny, pairs), pairs_one_by_one(tiny, pairs))


def test_some_layers_of_pairs_are_those_of_the_full_run(tiny_chat):
    pairs = encoded_pairs(tiny_chat.tokenizer)
    full = collect(tiny_chat, pairs)
    for layers in ([3], [3, 1], [0, 4], [2]):
        found = collect(tiny_chat, pairs, layers=layers)
        torch.testing.assert_close(found, full[:, :, sorted(layers)], rtol=1e-5, atol=1e-5)


def test_the_longest_pairs_come_first(tiny):
    pairs = [(prompt, prompt_of([*prompt.tokens[:-1], 1])) for prompt in random_prompts([9, 40, 3, 17])]
    order = [i for _, indices in read_pairs(tiny, pairs, batch_size=2) for i in indices]
    assert order == [1, 3, 0, 2]


def test_hooks_of_the_callers_are_felt_by_pairs_and_kept(tiny_chat):
    pairs = encoded_pairs(tiny_chat.tokenizer)
    plain = collect(tiny_chat, pairs)
    with tiny_chat.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda resid, hook: resid + 2.0)]):
        before = hook_counts(tiny_chat)
        with pytest.warns(SharedPrefixWarning, match=r"hooks of your own at blocks\.1\.hook_(resid_post|out)$"):
            found = collect(tiny_chat, pairs, batch_size=2)
        expected = pairs_one_by_one(tiny_chat, pairs)
        assert hook_counts(tiny_chat) == before == {"blocks.1.hook_resid_post": 1}
    assert_same(found, expected)
    torch.testing.assert_close(found[:, :, 0], plain[:, :, 0], rtol=1e-4, atol=1e-4)
    # Hooks on one hook point run in the order they were added: ours sees what the caller's returned.
    torch.testing.assert_close(found[:, :, 1], plain[:, :, 1] + 2.0, rtol=1e-4, atol=1e-4)
    assert ((found - plain)[:, :, 2:].norm(dim=-1) > 0.1).all()
    assert_same(collect(tiny_chat, pairs), plain)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
def test_half_precision_is_close_to_float32(dtype, rel, tiny_model):
    half, full = tiny_model(dtype=dtype), tiny_model()
    full.load_state_dict({name: value.to(full.state_dict()[name].dtype) for name, value in half.state_dict().items()})
    pairs = [(prompt, prompt_of([*prompt.tokens[:-2], 1, 2])) for prompt in random_prompts([9, 40, 17, 23])]
    found, expected = collect(half, pairs, batch_size=3), collect(full, pairs, batch_size=3)
    assert found.dtype == torch.float32
    assert_same(found, expected, rel=rel)
    # The shared prefix costs no more accuracy than half precision itself does.
    own_error = (pairs_one_by_one(half, pairs) - expected).norm()
    assert (found - expected).norm() < 2 * own_error


# ---- what must not happen -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([2, 5], "layer 5 is out of range: tiny-random-llama has layers 0 to 4$"),
        ([-1], "layer -1 is out of range.*the last is 4, not -1"),
        ([], "no layers given: expected at least one"),
    ],
)
def test_layers_that_the_model_does_not_have_are_refused(tiny, layers, said):
    (prompt,) = random_prompts([9])
    with pytest.raises(ValueError, match=said):
        next(read_residuals(tiny, [prompt], layers=layers))
    with pytest.raises(ValueError, match=said):
        next(read_pairs(tiny, [(prompt, prompt)], layers=layers))


def test_no_hook_is_left_while_a_reader_waits_or_after_it_fails(tiny):
    prompts = random_prompts([9, 21, 4])
    waiting = read_residuals(tiny, prompts, batch_size=1)
    next(waiting)
    assert hook_counts(tiny) == {}
    assert len(list(waiting)) == 2

    def fail(resid, hook):
        raise RuntimeError("stop here")

    tiny.add_hook("blocks.3.hook_resid_pre", fail)
    for reader in (read_residuals(tiny, prompts), read_pairs(tiny, [(prompts[0], prompts[2])])):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SharedPrefixWarning)
            with pytest.raises(RuntimeError, match="stop here"):
                next(reader)
    assert hook_counts(tiny) == {"blocks.3.hook_resid_pre": 1}


def test_reading_leaves_the_model_and_the_prompts_as_they_were(tiny):
    weights = {name: value.clone() for name, value in tiny.state_dict().items()}
    prompts = random_prompts([9, 40, 3])
    pairs = [(prompt, prompt_of([*prompt.tokens[:-1], 1])) for prompt in prompts]
    copies = list(prompts), list(pairs)
    first = collect(tiny, pairs)
    list(read_residuals(tiny, prompts))
    assert (prompts, pairs) == copies  # the order too, though pairs are read longest first
    assert hook_counts(tiny) == {}
    assert all(torch.equal(value, weights[name]) for name, value in tiny.state_dict().items())
    torch.testing.assert_close(collect(tiny, pairs), first, rtol=0, atol=0)
