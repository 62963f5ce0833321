"""Both kinds of models are taken; what is neither is refused by name, by every public function, before it runs."""

import inspect
import warnings
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from helpers.models import KINDS, random_vectors, tiny_model

import caa_lens as cl
from caa_lens.measures.open_ended.text_measures import answer_logp
from caa_lens.models.checks import check_model
from caa_lens.models.loading.bridges import boot
from caa_lens.models.loading.demo_model import demo_model_path
from caa_lens.vectors.steering_vectors import SteeringVector

PAIRS = cl.ContrastSet.from_pairs([("How are you?", "Well.", "Ill."), ("Is it late?", "Yes.", "No.")])
OTHERS = cl.ContrastSet.from_pairs([("Where are you?", "Here.", "There."), ("Is it cold?", "Yes.", "No.")])
MANY = cl.ContrastSet.from_pairs([(f"Is {n} late?", "Yes.", "No.") for n in range(8)])
ELSEWHERE = {"neutral": ["Why?"], "requests": [], "capability": {}, "n_tokens": 2, "n_random": 1}
COMPARED = {"words": ("Up.", "Down."), "layers": [1], "neutral": (["Why?"], ["How?"]), "n_tokens": 2}
PROMPT = cl.prompts.Prompt.from_tokens([1, 2, 3])
# As of `tiny_model()`.
VECTORS = random_vectors(SimpleNamespace(cfg=SimpleNamespace(n_layers=5, d_model=32, model_name="tiny-random-llama")))
QUIET = {"progress": False}


def open_and_close(model):
    with cl.steer(model, VECTORS[1], start=0):
        pass


# Every public function that takes a model; what they do with a right one is tested elsewhere.
CALLS = {
    "attribute_logits": lambda model: cl.interpretation.attribute_logits(model, [(PROMPT, 1, 2)], VECTORS[1], **QUIET),
    "answered": lambda model: cl.measures.answered(model, [PROMPT], **QUIET),
    "calibrate": lambda model: cl.calibrate(model, VECTORS, MANY, layers=[1], multipliers=[-1, 1], **QUIET),
    "compare": lambda model: cl.compare(model, PAIRS, OTHERS[:1], ["CAA"], validation=OTHERS[1:], **COMPARED, **QUIET),
    "token_kl": lambda model: cl.measures.token_kl(model, [replace(PROMPT, answer_start=2)], [()], **QUIET),
    "encode_chat": lambda model: cl.evaluation.encode_chat(model, [{"role": "user", "content": "How are you?"}]),
    "explore": lambda model: cl.explore(model, VECTORS),
    "extract": lambda model: cl.extract(model, PAIRS, **QUIET),
    "generate": lambda model: cl.generate(model, PROMPT, max_new_tokens=2),
    "generate_stream": lambda model: list(cl.generate_stream(model, PROMPT, max_new_tokens=2)),
    "generate_tokens": lambda model: list(cl.steering.generate_tokens(model, [PROMPT], max_new_tokens=2)),
    "logit_lens": lambda model: cl.logit_lens(model, VECTORS),
    "measure_texts": lambda model: cl.measures.measure_texts(model, [("How are you?", "Well.")], **QUIET),
    "pair_activations": lambda model: cl.engine.pair_activations(model, PAIRS, **QUIET),
    "read_residuals": lambda model: list(cl.engine.read_residuals(model, [PROMPT])),
    "residual_lens": lambda model: cl.residual_lens(model, PROMPT),
    "score_answers": lambda model: cl.measures.score_answers(model, PAIRS, [()], **QUIET),
    "side_effects": lambda model: cl.side_effects(model, VECTORS[1], **ELSEWHERE, **QUIET),
    "steer": open_and_close,
    "sweep": lambda model: cl.sweep(model, PAIRS, VECTORS, **QUIET),
    "token_similarity": lambda model: cl.token_similarity(model, PROMPT, VECTORS),
    "transfer_behaviors": lambda model: cl.transfer_behaviors(model, {"a": PAIRS}, {"a": VECTORS}, layer=1, **QUIET),
    "transfer_layers": lambda model: cl.transfer_layers(model, PAIRS, VECTORS, **QUIET),
    "transfer_models": lambda model: cl.transfer_models(model, PAIRS, VECTORS, VECTORS, **QUIET),
    "transfer_prompts": lambda model: cl.transfer_prompts(
        model, PAIRS, PAIRS, {"a": cl.transfers.PromptSetting()}, layer=1, **QUIET
    ),
    "word_ranks": lambda model: cl.word_ranks(model, VECTORS, ["good"]),
    "Prompt.of": lambda model: cl.prompts.Prompt.of(model, "How are you?"),
    "text_measures.answer_logp": lambda model: answer_logp(model, [PROMPT], **QUIET),
}


SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def of_transformers():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def bridge_over(hf):
    return boot(hf, "another", None, "", check=False)


def bridge_over_an_encoder():
    from transformers import BertConfig, BertForMaskedLM

    return bridge_over(BertForMaskedLM(BertConfig(**SHAPE)))


def bridge_over_an_encoder_with_a_decoder():
    from transformers import T5Config, T5ForConditionalGeneration

    return bridge_over(
        T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))
    )


def bridge_with_dropout():
    from transformers import GPT2Config, GPT2LMHeadModel

    return bridge_over(GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4))).train()


def bridge_without_blocks():
    model = tiny_model(kind="bridge")
    model.blocks = torch.nn.ModuleList()
    return model


def bridge_without_a_module():
    """As over a model that another program runs."""
    model = tiny_model(kind="bridge")
    model.__class__ = type("Elsewhere", (type(model),), {"original_model": property(lambda self: None)})
    return model


def bridge_on_meta():
    model = tiny_model(kind="bridge")
    model.original_model.to("meta")
    return model


def encoder():
    from transformer_lens import HookedEncoder

    return HookedEncoder(tiny_model().cfg)


class Wrapper(torch.nn.Module):
    """What has all that a model has, and is none, as tools that trace models make them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "model" else getattr(self.model, name)


def encoder_decoder():
    """No whole T5, whose shape does not matter here."""
    from transformer_lens import HookedEncoderDecoder

    return HookedEncoderDecoder.__new__(HookedEncoderDecoder)


def on_meta():
    model = tiny_model()
    torch.nn.Module.to(model, "meta")
    return model


def parallel(kind):
    # On the CPU, also where a test has set up a card that is not there.
    with patch("torch.nn.parallel.data_parallel._get_available_device_type", return_value=None):
        return torch.nn.DataParallel(tiny_model(kind=kind))


def with_dropout():
    model = tiny_model()
    model.blocks[1].drop = torch.nn.Dropout(0.1)
    return model.train()


# What cannot be taken, of no kind and of each: how it is made, and what is said of it.
OF_NO_KIND = {
    "transformers": (
        of_transformers,
        TypeError,
        "got a model of transformers: give load_model its hub id, or the folder",
    ),
    "name": (lambda: "demo", TypeError, "got the str 'demo'"),
}
OF_BOTH = {
    "wrapper": (
        lambda kind: Wrapper(tiny_model(kind=kind)),
        TypeError,
        "a HookedTransformer or a TransformerBridge itself",
    ),
    "compiled": (
        lambda kind: torch.compile(tiny_model(kind=kind)),
        ValueError,
        "the model is compiled, and torch.compile drops hooks",
    ),
    "parallel": (parallel, TypeError, "give the model inside, wrapper.module"),
    "class": (
        lambda kind: type(tiny_model(kind=kind)),
        TypeError,
        "expected a model from caa_lens.load_model, got type",
    ),
}
OF_HOOKED = {
    "encoder": (encoder, TypeError, "got a HookedEncoder, which writes no text"),
    "encoder and decoder": (encoder_decoder, TypeError, "got a HookedEncoderDecoder, whose prompt and answer are two"),
    "not loaded": (on_meta, ValueError, r"weights are not loaded \(they are on the device 'meta'\)"),
    "dropout": (with_dropout, ValueError, r"in training mode and has dropout, .*: call model.eval\(\)"),
}
OF_BRIDGE = {
    "encoder": (bridge_over_an_encoder, TypeError, "the bridge 'another' is an encoder, whose tokens see those behind"),
    "encoder and decoder": (
        bridge_over_an_encoder_with_a_decoder,
        TypeError,
        "'another' is an encoder with a decoder, whose prompt and answer are two streams: take a decoder alone",
    ),
    "no blocks": (
        bridge_without_blocks,
        TypeError,
        "has no list of blocks, expected one stack of them: LlamaFor",
    ),
    "elsewhere": (bridge_without_a_module, TypeError, "runs its model elsewhere, expected one whose modules are here"),
    "not loaded": (bridge_on_meta, ValueError, r"weights are not loaded \(model.embed_tokens.weight is on .* 'meta'\)"),
    "dropout": (
        bridge_with_dropout,
        ValueError,
        r"in training mode and has dropout \(attn_pdrop, embd_pdrop, resid_pdrop.*\), which .*: call model.eval\(\)",
    ),
}
WRONG = {
    **{(kind, name): (partial(made[0], kind), *made[1:]) for kind in KINDS for name, made in OF_BOTH.items()},
    **{("hooked", name): made for name, made in OF_HOOKED.items()},
    **{("bridge", name): made for name, made in OF_BRIDGE.items()},
    **{("", name): made for name, made in OF_NO_KIND.items()},
}


@cache
def wrong_model(wrong):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return WRONG[wrong][0]()


def public_functions():
    """By name, those of the package's top and of its rooms."""
    top = {name: getattr(cl, name) for name in cl.__all__}
    rooms = [room for room in top.values() if inspect.ismodule(room)]
    assert len(rooms) > 5
    every = top | {name: getattr(room, name) for room in rooms for name in room.__all__}
    return {name: one for name, one in every.items() if inspect.isfunction(one)}


def test_these_are_all_public_functions_that_take_a_model():
    takes = {name for name, one in public_functions().items() if "model" in inspect.signature(one).parameters}
    named_only = {"judge_texts", "read_vectors", "published"}  # `model` is a name there
    parts = {"check_model", "resolve_format", "final_logits"}  # of the others, which have checked before
    assert takes - named_only - parts == {name for name in CALLS if "." not in name}


# A block of steer runs compiled code as it is written.
REFUSED = [
    pytest.param(
        call, wrong, id=f"{call}-{' '.join(wrong).strip()}", marks=[getattr(pytest.mark, wrong[0] or "bridge")]
    )
    for wrong in WRONG
    for call in CALLS
    if (wrong[1], call) != ("compiled", "steer")
]


@pytest.mark.parametrize(("call", "wrong"), REFUSED)
def test_every_function_refuses_it_by_name_before_anything_runs(call, wrong):
    model, (_, kind, message) = wrong_model(wrong), WRONG[wrong]
    ran = []
    counter = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, given: ran.append(module))
    try:
        with pytest.raises(kind, match=message):
            CALLS[call](model)
    finally:
        counter.remove()
    assert not ran


@pytest.mark.filterwarnings("ignore::caa_lens.measures.training_pairs.TrainingPairsWarning")
@pytest.mark.parametrize("call", CALLS)
def test_every_function_takes_both_kinds(call, tiny_chat):
    CALLS[call](tiny_chat)


@pytest.mark.bridge
def test_a_bridge_is_taken_whoever_booted_it_and_a_vectors_hook_finds_its_stream():
    from transformer_lens.model_bridge import TransformerBridge

    folder = str(demo_model_path())  # for its tokenizer
    booted = TransformerBridge.boot_transformers(folder, hf_model=of_transformers(), device="cpu")
    check_model(booted)
    vector, tokens = SteeringVector.from_direction(torch.ones(32), 1), torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        plain = booted(tokens)
        with booted.hooks(fwd_hooks=[vector.hook(start=2)]):
            steered = booted(tokens)
    assert torch.equal(steered[:, :2], plain[:, :2])
    assert not torch.equal(steered[:, 2], plain[:, 2])


def test_a_hook_of_a_vector_says_that_the_model_has_no_such_hook_point_not_that_it_lacks_the_layer():
    point, names = "blocks.1.hook_resid_post", SteeringVector.from_direction(torch.ones(32), 1).hook(start=0)[0]
    for name in ("embed.hook_in", "blocks.1.hook_in", "blocks.2.hook_in"):
        assert not names(name)
    with pytest.raises(ValueError, match=rf"has no hook point '{point}'.*one of TransformerLens'"):
        names("unembed.hook_in")


def test_a_class_that_is_made_of_a_models_own_is_taken(tiny):
    class Mine(type(tiny)):
        """As SAELens' HookedSAETransformer is a HookedTransformer."""

    tiny.train()  # without dropout this changes nothing
    check_model(tiny)
    tiny.__class__ = Mine
    check_model(tiny)
