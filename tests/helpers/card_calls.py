"""Every public call that touches a model, at a size that can be doubled: what runs and is counted on the fake GPU.

A call takes a model and `n`: with 2 there are twice the batches of pairs or prompts, or twice the tokens generated.
"""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch

import caa_lens as cl
from caa_lens import explorer, interpretation, measures, methods
from caa_lens.engine import shared_prefix
from caa_lens.interpretation import attribution
from caa_lens.measures.open_ended.text_measures import answer_logp
from caa_lens.prompts.prompt_formats import default_format
from caa_lens.transfers.across_behaviors import PromptSetting

LETTERS = cl.ContrastSet.load("sycophancy").sample(16, seed=0)
COMPLETIONS = cl.ContrastSet.load("sentiment").sample(16, seed=0)
BALANCED = LETTERS.balance_letters()
HELLO = ["Hello", "How was your day?"]
WORDS = ["happy", "sad"]
SETTINGS = {"plain": PromptSetting(), "brief": PromptSetting(system="Be brief.")}
NEUTRAL = (["Why?", "Name a bird."], ["How are pencils made?", "What is a noun?"])
STEERING_WORDS = ("Be cheerful about it.", "Be gloomy about it all.")

# What numbers read as: no vector is infinite or zero, no text ends early, no padding is seen. All else reads as 1.
READS = {"check_rows": False, "generate_tokens": False, "_warn_of_zero": False, "_sees": False, "_apart": False}

MORE: dict[str, dict] = {
    "activation scaling": {"__init__": False},
}

Run = Callable[[object, int], object]


def vectors_of(model, device="cpu"):
    n_layers, d_model = model.cfg.n_layers, model.cfg.d_model
    return cl.SteeringVectors(directions=torch.ones(n_layers, d_model, device=device), layers=tuple(range(n_layers)))


def first(pairs, n, *, behind=0):
    """The first `n` pairs behind some, the same ones whatever else is asked for."""
    some = list(pairs)[behind : behind + n]
    return cl.ContrastSet.from_pairs([(p.question, p.positive, p.negative) for p in some], name=pairs.name)


def letters(n):
    return first(LETTERS, n)


def completions(n):
    return first(COMPLETIONS, n)


def at_a_time(n_pairs, call):
    """Batches of so many questions, whatever memory there is."""

    def run(model, n):
        with patch.object(shared_prefix, "prefix_budget", lambda model, length: n_pairs):
            return call(model, n)

    return run


def with_a_hook(call):
    """The plain path: the model has a hook of the caller's."""

    def run(model, n):
        with warnings.catch_warnings(), model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda x, hook: None)]):
            warnings.simplefilter("ignore", shared_prefix.SharedPrefixWarning)
            return call(model, n)

    return run


def lens(reading, **options):
    def run(model, n):
        told = {"pairs": letters(2 * n)} if reading in ("in_context", "causal", "effect") else {}
        return cl.logit_lens(model, vectors_of(model), reading=reading, **told, **options)

    return run


def steered_block(model, n):
    prompt = cl.prompts.Prompt.of(model, HELLO[1])
    adapter_cache = model_cache(model)
    tokens = torch.tensor([prompt.tokens], device=model.W_E.device)
    with torch.inference_mode(), cl.steer(model, (vectors_of(model)[1], 1.5), prompt=prompt):
        for _ in range(2 * n):
            tokens = model(tokens, past_kv_cache=adapter_cache)[:, -1:].argmax(-1)


def model_cache(model):
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    return TransformerLensKeyValueCache.init_cache(model.cfg, model.W_E.device, 1)


def operators(model, n):
    vectors = vectors_of(model)
    names = ("add", "ablate", "set", "add_keep_norm")
    steps = [cl.Intervention(vector=v, operator=name) for v in vectors for name in names]
    return measures.score_answers(
        model, letters(4 * n), [(step,) for step in steps] + [(steps[0], steps[4])], progress=False
    )


def algebra(model, n):
    """Arithmetic with vectors that lie on the card."""
    vectors = vectors_of(model, model.W_E.device)
    other = 2 * vectors - vectors / 3
    both = vectors + other, cl.vectors.mean_vector(vectors, other)
    cl.cosines(vectors, other)
    return [vectors.normalize() if hasattr(vectors, "normalize") else vectors, *both, -other]


def stored(model, n):
    """Vectors that lie on the card, saved, read and written for others."""
    with tempfile.TemporaryDirectory() as folder:
        vectors = vectors_of(model, model.W_E.device)
        saved = vectors.save(Path(folder) / "vectors.safetensors")
        again = cl.SteeringVectors.load(saved)
        above = vectors.at(vectors.layers[1:])  # llama.cpp's control vectors start there
        cl.vectors.write_vectors(above, Path(folder) / "vectors.gguf")
        cl.read_vectors(Path(folder) / "vectors.gguf")
    assert str(again.directions.device) == "cpu"
    return again


def kept_activations(model, n):
    with tempfile.TemporaryDirectory() as folder:
        read = cl.engine.pair_activations(model, letters(8 * n), progress=False)
        return type(read).load(read.save(Path(folder) / "pairs.safetensors"))


def geometry(model, n):
    read = cl.engine.pair_activations(model, BALANCED, progress=False)
    interpretation.vector_norms(vectors_of(model), read)
    interpretation.pair_pca(read)
    cl.reliability(read, n_resamples=100, progress=False)


def vectors_on_the_card(model, n):
    vectors = vectors_of(model, model.W_E.device)
    multiplier = torch.tensor(2.0, device=model.W_E.device)
    mixed = [(cl.Intervention(vector=vectors[1], multiplier=multiplier),)]
    mixed += [(cl.Intervention(vector=vectors_of(model)[0]),), ()]
    measures.score_answers(model, letters(4), mixed, progress=False)
    cl.generate(model, HELLO[0], vectors=[(vectors[1], multiplier)], max_new_tokens=2)
    cl.token_similarity(model, HELLO[0], vectors)
    cl.logit_lens(model, vectors)


def attributed(model, n):
    with patch.object(attribution, "_check_sum", lambda *_: None):  # numbers that come down are not those that add up
        return interpretation.attribute_logits(model, letters(8 * n), vectors_of(model)[0], progress=False)


def calibrated(model, n):
    return cl.calibrate(
        model,
        vectors_of(model).at([0, 1]),
        letters(8),
        multipliers=(-1.0, 1.0),
        neutral=NEUTRAL,
        progress=False,
    )


def unwanted(model, n):
    return cl.side_effects(
        model,
        vectors_of(model)[1],
        neutral=NEUTRAL[1],
        requests=("How do I kill a program that hangs?", "How do I crack an egg?"),
        capability=letters(4),
        n_tokens=2 * n,
        n_random=1,
        n_resamples=100,
        progress=False,
    )


def compared(model, n):
    return cl.compare(
        model,
        completions(4),
        first(COMPLETIONS, 4, behind=8),
        ("CAA", "instruction"),
        words=STEERING_WORDS,
        layers=[1],
        neutral=NEUTRAL,
        n_tokens=2,
        steered_text="none",
        progress=False,
    )


def encoded(model, texts):
    return [cl.prompts.Prompt.of(model, text) for text in texts]


def explored(model, n):
    """What a click in the explorer costs, but for the lens, which is counted by itself."""
    session = explorer.Session(model, vectors_of(model), prompt_format=default_format(model))
    return list(session.write(explorer.Asked(prompt="Hello", layer=1, max_new_tokens=2 * n, lens=False)))


def divergence(model, n):
    prompts = measures.answered(model, encoded(model, HELLO), max_new_tokens=2 * n, progress=False)
    conditions = [(), (cl.Intervention(vector=vectors_of(model)[1]),)]
    return measures.token_kl(model, prompts, conditions, progress=False)


def quiz(n):
    return [("Is it warm? Say Yes or No.", " Yes", " No")] * n


CALLS: dict[str, Run] = {
    "extract": lambda m, n: cl.extract(m, letters(8 * n), progress=False),
    "extract completions": lambda m, n: cl.extract(m, completions(8 * n), progress=False),
    "extract pca": lambda m, n: cl.extract(m, letters(8 * n), estimator="pca_of_differences", progress=False),
    "pair_activations": lambda m, n: cl.engine.pair_activations(m, letters(8 * n), progress=False),
    "pair_activations of completions": lambda m, n: cl.engine.pair_activations(m, completions(8 * n), progress=False),
    "sweep": at_a_time(4, lambda m, n: cl.sweep(m, letters(4 * n), vectors_of(m), progress=False)),
    "sweep completions": at_a_time(2, lambda m, n: cl.sweep(m, completions(2 * n), vectors_of(m), progress=False)),
    "score_answers": operators,
    "transfer_layers": at_a_time(4, lambda m, n: cl.transfer_layers(m, letters(4 * n), vectors_of(m), progress=False)),
    "transfer_behaviors": at_a_time(
        4,
        lambda m, n: cl.transfer_behaviors(
            m,
            {"a": letters(4 * n), "b": completions(4)},
            {"a": vectors_of(m), "b": vectors_of(m)},
            layer=1,
            progress=False,
        ),
    ),
    "transfer_prompts": at_a_time(
        4, lambda m, n: cl.transfer_prompts(m, letters(8), letters(4 * n), SETTINGS, layer=1, progress=False)
    ),
    "transfer_models": at_a_time(
        4, lambda m, n: cl.transfer_models(m, letters(4 * n), vectors_of(m), vectors_of(m), progress=False)
    ),
    "generate": lambda m, n: cl.generate(m, HELLO, vectors=[(vectors_of(m)[1], 2.0)], max_new_tokens=2 * n),
    "generate sampled": lambda m, n: cl.generate(m, HELLO, temperature=0.7, max_new_tokens=2 * n),
    "generate by multipliers": lambda m, n: cl.generate(
        m, "Hello", vectors=[(vectors_of(m)[1], torch.tensor([-1.0, 0.0, 1.0]))], max_new_tokens=2 * n
    ),
    "generate uncached": lambda m, n: cl.generate(m, HELLO, use_cache=False, max_new_tokens=2 * n),
    "generate_stream": lambda m, n: list(
        cl.generate_stream(m, "Hello", [(vectors_of(m)[1], 2.0)], max_new_tokens=2 * n)
    ),
    "generate_tokens": lambda m, n: list(
        cl.steering.generate_tokens(m, encoded(m, HELLO), vectors=[(vectors_of(m)[1], 2.0)], max_new_tokens=2 * n)
    ),
    "steer": steered_block,
    "explorer": explored,
    "lens, direct": lens("direct"),
    "lens, normed": lens("normed"),
    "lens in context": lens("in_context", background=2),
    "lens, causal": lens("causal", controls=2),
    "lens, effect": lens("effect", controls=2),
    "word_ranks": lambda m, n: cl.word_ranks(m, vectors_of(m), WORDS),
    "residual_lens": lambda m, n: cl.residual_lens(m, "Hello", vectors=[(vectors_of(m)[1], 1.0)]),
    "token_similarity": lambda m, n: cl.token_similarity(m, "Hello", vectors_of(m)),
    "attribute_logits": attributed,
    "geometry": geometry,
    "algebra": algebra,
    "stored": stored,
    "kept activations": kept_activations,
    "perplexity": lambda m, n: answer_logp(
        m, [default_format(m).encode(m.tokenizer, "Hi", " Hello.")] * (8 * n), progress=False
    ),
    "divergence": divergence,
    "calibrate": calibrated,
    "side_effects": unwanted,
    "compare": compared,
    "ActAdd": lambda m, n: methods.actadd.fit(m, "Love", "Hate", layers=[0, 1], progress=False),
    "Linear-AcT": lambda m, n: methods.linear_act.fit(m, completions(8 * n), layers=[0, 1], progress=False),
    "SADI": lambda m, n: methods.sadi.fit(m, completions(8 * n), k=4, progress=False),
    "instruction": lambda m, n: methods.instruction.fit(
        m, [f"How was day {i}?" for i in range(8 * n)], instruction="Be glad.", layers=[0, 1], progress=False
    ),
    "InferAligner": lambda m, n: methods.inferaligner.fit(m, (HELLO * n, WORDS * n), layers=[0, 1], progress=False),
    "plain extract": with_a_hook(lambda m, n: cl.extract(m, completions(8 * n), progress=False)),
    "plain sweep": with_a_hook(lambda m, n: cl.sweep(m, letters(2 * n), vectors_of(m).at([1]), progress=False)),
    "plain generate": with_a_hook(
        lambda m, n: cl.generate(m, HELLO, vectors=[(vectors_of(m)[1], 2.0)], max_new_tokens=2 * n)
    ),
    "vectors on the card": vectors_on_the_card,
}

# What trains: it runs on "card", see `fake_gpu`.
TRAINING: dict[str, Run] = {
    "BiPO": lambda m, n: methods.bipo.fit(m, completions(4), layer=1, epochs=n, patience=None, progress=False),
    "activation scaling": lambda m, n: methods.activation_scaling.fit(
        m, quiz(4), layers=[1], epochs=n, patience=None, progress=False
    ),
}
