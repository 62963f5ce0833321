"""Extracted vectors are the paper's: mean differences of the model's own activations, whatever is batched or kept."""

import functools
import warnings
import weakref

import pytest
import torch
from helpers.models import SHARED, demo_hugging_face

from caa_lens.contrast.pair import ContrastPair
from caa_lens.contrast.sets import ContrastSet, LetterBalanceWarning
from caa_lens.engine.activations import read_pairs
from caa_lens.engine.shared_prefix import SharedPrefixWarning
from caa_lens.prompts.pair_prompts import encode_pairs
from caa_lens.prompts.prompt_formats import LLAMA2_BASE, resolve_format
from caa_lens.vectors import extraction
from caa_lens.vectors.extraction import SHORT_NAMES, extract, logistic_probe, mean_difference, pca_of_differences

MYOPIC_REWARD = SHARED / "data" / "mwe" / "myopic-reward.jsonl"


@pytest.fixture(scope="module")
def hugging_face():
    """The demo model as transformers itself runs it: nothing of ours or of TransformerLens' in it."""
    return demo_hugging_face()


@pytest.fixture
def read_calls(monkeypatch):
    """The lists of prompts that `extract` asked the model about."""
    calls = []

    def reader(model, pairs, **kwargs):
        calls.append(pairs)
        return read_pairs(model, pairs, **kwargs)

    monkeypatch.setattr(extraction, "read_pairs", reader)
    return calls


def small(name, n, seed=1):
    return ContrastSet.load(name).sample(n, seed=seed)


def ab_set(letters, name="letters"):
    """An A/B set whose positive answers are these letters; made without the warning that `from_pairs` gives."""
    pairs = [
        ContrastPair(
            question=f"Question {i}?\n\nChoices:\n (A) One\n (B) Two",
            positive=f"({letter})",
            negative=f"({'BA'['AB'.index(letter)]})",
        )
        for i, letter in enumerate(letters)
    ]
    return ContrastSet(name=name, pairs=tuple(pairs))


def swapped_sides(pairs):
    flipped = (ContrastPair(question=p.question, positive=p.negative, negative=p.positive) for p in pairs)
    return ContrastSet(name=pairs.name, pairs=tuple(flipped))


def independent_mean_difference(hugging_face, hooked, pairs):
    """The method with other means: a prompt at a time, unpadded, `hidden_states[layer + 1]`, a float64 sum.

    Hugging Face's last entry is behind the final norm, so the last layer is TransformerLens' own hook.
    """
    tokenizer, n_layers = hooked.tokenizer, hooked.cfg.n_layers
    total = torch.zeros(n_layers, hooked.cfg.d_model, dtype=torch.float64)
    for pair in pairs:
        for answer, sign in [(pair.positive, 1), (pair.negative, -1)]:
            chat = [{"role": "user", "content": pair.question}]
            question = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            question_ids = tokenizer(question, add_special_tokens=False)["input_ids"]
            answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([question_ids + answer_ids])
            read = slice(-2, -1) if pair.is_ab else slice(len(question_ids), None)
            with torch.no_grad():
                hidden = hugging_face.model(ids, output_hidden_states=True).hidden_states
                _, last = hooked.run_with_cache(
                    ids, names_filter=f"blocks.{n_layers - 1}.hook_resid_post", stop_at_layer=n_layers
                )
            layers = [*hidden[1:-1], last["resid_post", n_layers - 1]]
            total += sign * torch.stack([resid[0, read].double().mean(0) for resid in layers])
    return (total / len(pairs)).float()


def relative_error(found, expected):
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


# ---- against another implementation ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["refusal", "sentiment"])
def test_vectors_are_those_of_hugging_faces_hidden_states(name, demo_model, hugging_face):
    pairs = small(name, 4)
    vectors = extract(demo_model, pairs, batch_size=3)
    expected = independent_mean_difference(hugging_face, demo_model, pairs)
    assert vectors.layers == tuple(range(demo_model.cfg.n_layers))
    assert relative_error(vectors.directions, expected) < 1e-4
    # No neighbouring layer's vector would have passed for a layer's own.
    steps = (expected[1:] - expected[:-1]).norm(dim=-1) / expected[1:].norm(dim=-1)
    assert float(steps.min()) > 0.01


# ---- laws -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sycophancy", "sentiment"])
def test_batch_size_does_not_matter(name, tiny_chat):
    pairs = small(name, 6)
    alone = extract(tiny_chat, pairs, batch_size=1).directions
    for batch_size in (2, 4, 16):
        assert relative_error(extract(tiny_chat, pairs, batch_size=batch_size).directions, alone) < 1e-5


@pytest.mark.parametrize("name", ["sycophancy", "sentiment"])
def test_the_order_of_pairs_does_not_matter(name, tiny_chat):
    pairs = small(name, 6)
    backwards = ContrastSet(name=name, pairs=pairs.pairs[::-1])
    forwards = extract(tiny_chat, pairs, batch_size=4).directions
    assert relative_error(extract(tiny_chat, backwards, batch_size=4).directions, forwards) < 1e-5


@pytest.mark.parametrize("estimator", [mean_difference, pca_of_differences, logistic_probe])
def test_swapping_the_sides_negates_the_vectors(estimator, tiny_chat):
    pairs = small("sentiment", 6)
    vectors = extract(tiny_chat, pairs, estimator=estimator)
    flipped = extract(tiny_chat, swapped_sides(pairs), estimator=estimator)
    assert relative_error(flipped.directions, -vectors.directions) < 1e-3


def test_two_sets_together_give_the_mean_of_both_weighted_by_their_pairs(tiny_chat):
    pairs = small("sentiment", 6)
    parts = [extract(tiny_chat, part).directions for part in (pairs[:2], pairs[2:])]
    together = extract(tiny_chat, pairs).directions
    assert relative_error((2 * parts[0] + 4 * parts[1]) / 6, together) < 1e-5


def test_some_layers_are_those_of_the_full_run_and_keep_their_numbers(tiny_chat):
    pairs = small("refusal", 4)
    full = extract(tiny_chat, pairs)
    for estimator in (mean_difference, lambda p, n: mean_difference(p, n)):
        some = extract(tiny_chat, pairs, layers=[3, 1], estimator=estimator)
        assert some.layers == (1, 3)
        for layer in (1, 3):
            assert relative_error(some[layer].direction, full[layer].direction) < 1e-5
        assert 0 not in some


def test_streaming_is_the_mean_difference_of_kept_activations(tiny_chat):
    pairs = small("refusal", 6)
    kept = extract(tiny_chat, pairs, batch_size=4, estimator=lambda p, n: mean_difference(p, n))
    assert relative_error(extract(tiny_chat, pairs, batch_size=4).directions, kept.directions) < 1e-5


def test_callers_hooks_are_felt_by_the_vectors(tiny_chat):
    pairs = small("refusal", 4)
    plain = extract(tiny_chat, pairs)
    triple = ("blocks.2.hook_resid_post", lambda resid, hook: 3.0 * resid)
    with tiny_chat.hooks(fwd_hooks=[triple]), pytest.warns(SharedPrefixWarning):
        hooked = extract(tiny_chat, pairs)
    assert relative_error(hooked[1].direction, plain[1].direction) < 1e-4
    assert relative_error(hooked[2].direction, 3.0 * plain[2].direction) < 1e-4


def test_the_format_decides_what_is_read(tiny_chat):
    pairs = small("refusal", 4)
    base = extract(tiny_chat, pairs, prompt_format=LLAMA2_BASE)
    by_name = extract(tiny_chat, pairs, prompt_format="llama2-base")
    chat = extract(tiny_chat, pairs)
    torch.testing.assert_close(base.directions, by_name.directions, rtol=0, atol=0)
    assert relative_error(base.directions, chat.directions) > 0.1
    assert [v.provenance.prompt_format for v in (base, chat)] == ["llama2-base", "chat-template"]


# ---- estimators -----------------------------------------------------------------------------------------------


def planted(n=40, d_model=24, seed=0):
    """Two sides whose difference is 5 along one axis, with the largest spread, 3, along another."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(d_model, 2, generator=generator)).Q.T
    shift, spread = axes[0], axes[1]
    common = 4 * torch.randn(n, d_model, generator=generator)
    noise = 0.1 * torch.randn(n, d_model, generator=generator)
    differences = 5 * shift + 3 * torch.randn(n, 1, generator=generator) * spread + noise
    return common + differences, common, shift, spread


@pytest.mark.parametrize("seed", range(4))
def test_pca_finds_the_shift_that_pairs_share_with_its_sign_and_size(seed):
    positive, negative, shift, spread = planted(seed=seed)
    for sign, sides in [(1, (positive, negative)), (-1, (negative, positive))]:
        found = pca_of_differences(*sides)
        assert torch.cosine_similarity(found, sign * shift, dim=0) > 0.9
        torch.testing.assert_close(found.norm(), torch.tensor(5.0), rtol=0.1, atol=0)
    # Centred, as PCA usually is, it finds the spread instead: the shift is the mean that centring takes away.
    differences = positive - negative
    centred = torch.linalg.svd(differences - differences.mean(0), full_matrices=False).Vh[0]
    assert abs(centred @ spread) > 0.95
    assert abs(centred @ shift) < 0.2


def test_pca_of_equal_differences_is_their_mean():
    generator = torch.Generator().manual_seed(0)
    negative, shift = torch.randn(9, 16, generator=generator), torch.randn(16, generator=generator)
    torch.testing.assert_close(pca_of_differences(negative + shift, negative), shift, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_a_probe_separates_planted_clusters_better_than_the_mean_difference_and_points_to_the_positive(seed):
    # Both sides share one loud axis, and their means differ along it too: only the probe discounts it.
    generator = torch.Generator().manual_seed(seed)
    n, d_model = 150, 12
    loud, quiet = torch.eye(d_model)[3], torch.eye(d_model)[7]

    def side(sign):
        at = sign * (2 * loud + quiet) + 0.2 * torch.randn(n, d_model, generator=generator)
        return at + 10 * torch.randn(n, 1, generator=generator) * loud

    positive, negative = side(1), side(-1)

    def accuracy(direction):
        threshold = torch.cat([positive, negative]).mean(0) @ direction
        right = torch.cat([positive @ direction > threshold, negative @ direction < threshold])
        return float(right.float().mean())

    probe = logistic_probe(positive, negative)
    assert torch.cosine_similarity(probe, quiet, dim=0) > 0.9
    assert accuracy(probe) > 0.99
    assert accuracy(mean_difference(positive, negative)) < 0.9
    torch.testing.assert_close(probe.norm(), mean_difference(positive, negative).norm(), rtol=1e-5, atol=0)
    torch.testing.assert_close(logistic_probe(negative, positive), -probe, rtol=1e-2, atol=1e-2)


def test_a_probe_does_not_mind_the_scale_of_a_feature():
    # Residual streams have a few dimensions that are hundreds of times larger than the others.
    generator = torch.Generator().manual_seed(0)
    quiet = torch.eye(8)[5]
    clusters = [0.2 * torch.randn(60, 8, generator=generator) + sign * quiet for sign in (1, -1)]
    scale = torch.tensor([1.0, 1, 500, 1, 1, 1, 1, 1])
    plain, found = logistic_probe(*clusters), logistic_probe(clusters[0] * scale, clusters[1] * scale)
    # w x = (w / scale) (x scale): the same classifier in other units.
    assert torch.cosine_similarity(found * scale, plain, dim=0) > 0.9999
    assert torch.cosine_similarity(plain, quiet, dim=0) > 0.8


def test_an_estimator_of_your_own_gets_each_layers_activations_in_the_order_of_the_set(tiny_chat):
    pairs = small("sentiment", 6, seed=4)
    prompts = encode_pairs(tiny_chat, pairs, resolve_format(tiny_chat, None))
    read = sorted(range(6), key=lambda i: -len(prompts[i][0]))  # the order of reading, longest first
    back = sorted(range(6), key=read.__getitem__)
    # Neither the reading order itself nor the same reordering once more, in place of its inverse, may pass.
    assert read != list(range(6)) != back != read
    seen = []

    def last_pair(positive, negative):
        seen.append((positive, negative))
        return positive[-1] - negative[-1]

    vectors = extract(tiny_chat, pairs, layers=[3, 1], estimator=last_pair, batch_size=2)
    assert len(seen) == 2
    for (positive, negative), layer in zip(seen, (1, 3), strict=True):
        for side, found in enumerate((positive, negative)):
            expected = []
            for pair in prompts:
                prompt = pair[side]
                with torch.no_grad():
                    _, cache = tiny_chat.run_with_cache(torch.tensor([prompt.tokens]))
                expected.append(cache["resid_post", layer][0, slice(*prompt.read)].mean(0))
            assert relative_error(found, torch.stack(expected)) < 1e-5
        torch.testing.assert_close(vectors[layer].direction, positive[-1] - negative[-1], rtol=1e-6, atol=1e-6)
    assert vectors.provenance.method == "last_pair"


@pytest.mark.parametrize("estimator", [mean_difference, pca_of_differences, logistic_probe])
def test_an_estimator_by_its_name_is_its_function_bit_for_bit(tiny_chat, estimator):
    pairs, name = small("refusal", 6), estimator.__name__
    by_name, by_function = (extract(tiny_chat, pairs, estimator=given) for given in (name, estimator))
    assert torch.equal(by_name.directions, by_function.directions)
    assert by_name.provenance == by_function.provenance
    assert by_name.provenance.method == name
    assert torch.equal(extract(tiny_chat, pairs).directions, by_name.directions) == (estimator is mean_difference)


@pytest.mark.parametrize(("short", "name"), SHORT_NAMES.items())
def test_estimators_have_short_names(tiny_chat, short, name):
    pairs = small("refusal", 6)
    by_short = extract(tiny_chat, pairs, estimator=short)
    assert torch.equal(by_short.directions, extract(tiny_chat, pairs, estimator=name).directions)
    assert by_short.provenance.method == name


def test_a_name_of_no_estimator_is_refused_before_anything_is_read(tiny_chat, read_calls):
    for name in ("svd", "", "Mean_difference"):
        expected = (
            f"unknown estimator {name!r}: expected mean_difference, pca_of_differences, logistic_probe .*, or a fun"
        )
        with pytest.raises(ValueError, match=expected):
            extract(tiny_chat, small("refusal", 4), estimator=name)
    assert read_calls == []


def test_any_callable_is_an_estimator(tiny_chat):
    class Doubled:
        def __call__(self, positive, negative):
            return 2 * mean_difference(positive, negative)

    pairs = small("refusal", 4)
    expected = 2 * extract(tiny_chat, pairs).directions
    vectors = extract(tiny_chat, pairs, estimator=Doubled())
    assert relative_error(vectors.directions, expected) < 1e-5
    assert vectors.provenance.method == "Doubled"
    weighted = functools.partial(lambda p, n, scale: scale * mean_difference(p, n), scale=2.0)
    assert relative_error(extract(tiny_chat, pairs, estimator=weighted).directions, expected) < 1e-5


# ---- letters --------------------------------------------------------------------------------------------------


def test_unbalanced_letters_are_warned_of_and_balanced_ones_are_not(tiny_chat):
    with pytest.warns(LetterBalanceWarning, match="positive answers are .*8.*balance_letters"):
        extract(tiny_chat, ab_set("AAAABAAABA"), layers=[0])
    extract(tiny_chat, ab_set("AABBABABAB"), layers=[0])  # a warning would be an error


@pytest.mark.skipif(
    not MYOPIC_REWARD.exists(), reason="needs ../shared/data/mwe/myopic-reward.jsonl beside the project"
)
def test_with_unbalanced_letters_the_vector_is_mostly_the_letter(demo_model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LetterBalanceWarning)  # some of these sets are uneven on purpose
        every = ContrastSet.load(MYOPIC_REWARD)
    # The shortest questions, for speed.
    by_letter = {
        letter: sorted((pair for pair in every if pair.positive == letter), key=lambda pair: len(pair.question))
        for letter in ("(A)", "(B)")
    }

    def norm(n_a, n_b):
        pairs = tuple(by_letter["(A)"][:n_a] + by_letter["(B)"][:n_b])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LetterBalanceWarning)
            return extract(demo_model, ContrastSet(name="myopic-reward", pairs=pairs), layers=[12])[12].norm

    assert norm(40, 20) > 2 * norm(30, 30)


# ---- results --------------------------------------------------------------------------------------------------


def test_provenance_says_what_a_vector_was_computed_from(tiny_chat):
    letters, completions = small("refusal", 4), small("sentiment", 5)
    p = extract(tiny_chat, letters, layers=[2]).provenance
    assert (p.model, p.behavior, p.method) == ("tiny-random-llama", "refusal", "mean_difference")
    assert (p.prompt_format, p.token_position, p.n_pairs) == ("chat-template", "answer letter", 4)
    assert (p.dataset_hash, p.normalisation, p.expression) == (letters.content_hash, "none", "refusal")
    assert p.details["model_dtype"] == "float32"
    assert p.details["torch"] == torch.__version__
    assert set(p.details) >= {"caa_lens", "transformer_lens"}
    q = extract(tiny_chat, completions, estimator=pca_of_differences).provenance
    assert (q.method, q.token_position, q.n_pairs) == ("pca_of_differences", "mean over the completion", 5)
    assert q.dataset_hash == completions.content_hash != p.dataset_hash


@pytest.mark.parametrize("estimator", [mean_difference, pca_of_differences, lambda p, n: (p - n).mean(0).double()])
def test_vectors_are_float32_on_the_cpu_and_can_be_trained_on(estimator, tiny_chat):
    directions = extract(tiny_chat, small("refusal", 4), estimator=estimator).directions
    assert directions.dtype == torch.float32
    assert directions.device.type == "cpu"
    assert not directions.requires_grad
    weight = torch.ones_like(directions, requires_grad=True)
    (weight * directions).sum().backward()  # of an inference tensor, nothing can be saved for this
    torch.testing.assert_close(weight.grad, directions, rtol=0, atol=0)


def test_a_half_precision_model_gives_float32_vectors_finer_than_its_own_numbers(demo_tokenizer, tiny_model):
    model = tiny_model(d_vocab=len(demo_tokenizer), n_ctx=512, tokenizer=demo_tokenizer, dtype=torch.bfloat16)
    vectors = extract(model, small("sentiment", 4))
    assert vectors.directions.dtype == torch.float32
    assert not torch.equal(vectors.directions, vectors.directions.bfloat16().float())
    assert vectors.provenance.details["model_dtype"] == "bfloat16"


class Alive:
    """Wraps a reader of batches and notes how many earlier batches live on when the next is asked for."""

    def __init__(self):
        self.most = 0

    def __call__(self, model, pairs, **kwargs):
        earlier = []
        for sides, indices in read_pairs(model, pairs, **kwargs):
            earlier.append(weakref.ref(sides))
            yield sides, indices
            del sides
            self.most = max(self.most, sum(ref() is not None for ref in earlier))


@pytest.mark.cpu("what it counts is kept where it was read; from another device copies come down")
def test_memory_does_not_grow_with_the_pairs_unless_an_estimator_needs_them_all(tiny_chat, monkeypatch):
    def most_alive(n, estimator):
        alive = Alive()
        monkeypatch.setattr(extraction, "read_pairs", alive)
        extract(tiny_chat, small("sentiment", n), layers=[0], batch_size=1, estimator=estimator)
        return alive.most

    assert most_alive(3, mean_difference) == most_alive(12, mean_difference) == 1
    assert most_alive(12, pca_of_differences) == 12


# ---- errors, before anything runs -----------------------------------------------------------------------------


def test_an_empty_set_is_refused(tiny_chat, read_calls):
    empty = ab_set("AB")
    object.__setattr__(empty, "pairs", ())  # a ContrastSet does not let itself be made without pairs
    with pytest.raises(ValueError, match="the contrast set is empty: expected at least one pair"):
        extract(tiny_chat, empty)
    assert read_calls == []


def test_a_pair_longer_than_the_context_is_refused_before_anything_runs(tiny_chat, read_calls):
    question = "Tell me about the sea. " * 120
    pairs = ContrastSet.from_pairs([("Why?", "So.", "No."), (question, "Yes.", "No.")])
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens, but the model's context is 512: shorten it"):
        extract(tiny_chat, pairs)
    assert read_calls == []


@pytest.mark.parametrize(
    ("layers", "said"), [([0, 5], "layer 5 is out of range"), ([-1], "not -1"), ([], "no layers given")]
)
def test_layers_that_the_model_does_not_have_are_refused(layers, said, tiny_chat, read_calls):
    with pytest.raises(ValueError, match=said):
        extract(tiny_chat, small("refusal", 2), layers=layers)
    assert read_calls == []


@pytest.mark.parametrize("estimator", [mean_difference, pca_of_differences, logistic_probe])
def test_activations_that_overflow_are_refused_with_a_remedy(estimator, demo_tokenizer, tiny_model):
    model = tiny_model(d_vocab=len(demo_tokenizer), n_ctx=512, tokenizer=demo_tokenizer, dtype=torch.float16)
    model.blocks[1].mlp.W_out.data.fill_(6e4)
    with pytest.raises(ValueError, match=r"are not finite in torch\.float16: load the model in bfloat16 or float32"):
        extract(model, small("refusal", 2), estimator=estimator)


def test_the_set_and_the_model_are_left_as_they_were(tiny_chat):
    pairs = small("sentiment", 4)
    before, weights = pairs.content_hash, {k: v.clone() for k, v in tiny_chat.state_dict().items()}
    extract(tiny_chat, pairs)
    assert pairs.content_hash == before
    assert all(torch.equal(value, weights[name]) for name, value in tiny_chat.state_dict().items())
    assert not any(point.fwd_hooks for point in tiny_chat.hook_points())


@pytest.mark.parametrize("form", [lambda d: d.numpy(), lambda d: d.tolist(), lambda d: d.double(), lambda d: d.half()])
def test_an_estimator_may_return_numpy_a_list_or_another_precision(tiny_chat, form):
    pairs = small("sentiment", 3)

    def estimator(positive, negative):
        return form(mean_difference(positive, negative))

    found = extract(tiny_chat, pairs, estimator=estimator, progress=False).directions
    assert found.dtype == torch.float32
    assert relative_error(found, extract(tiny_chat, pairs, progress=False).directions) < 1e-3


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "returned NoneType at layer 0, expected a tensor"),
        ("no", "returned the str 'no' at layer 0"),
        (torch.ones(2, 32), r"returned shape \(2, 32\) at layer 0, expected \(32,\), one direction"),
        (torch.ones(31), r"returned shape \(31,\)"),
        (torch.ones(32, dtype=torch.complex64), "expected real numbers"),
        (torch.ones(32, dtype=torch.bool), "returned torch.bool"),
        (torch.full((32,), float("nan")), "returned NaN or infinite numbers at layer 0"),
        (torch.full((32,), 1e300, dtype=torch.float64), "returned NaN or infinite numbers at layer 0"),
    ],
)
def test_an_estimator_that_returns_no_direction_is_told_of_with_the_layer(tiny_chat, returned, message):
    with pytest.raises((TypeError, ValueError), match=message):
        extract(tiny_chat, small("sentiment", 3), estimator=lambda *sides: returned, progress=False)
