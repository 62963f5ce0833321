"""Models that are no `HookedTransformer` are refused by name, by every public function, before anything runs."""

import inspect
import warnings
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from helpers.models import random_vectors, tiny_model

import caa_lens as cl
from caa_lens.measures.open_ended.text_measures import answer_logp
from caa_lens.models.checks import check_model
from caa_lens.models.loading.demo_model import demo_model_path
from caa_lens.vectors.steering_vectors import SteeringVector

PAIRS = cl.ContrastSet.from_pairs([("How are you?", "Well.", "Ill."), ("Is it late?", "Yes.", "No.")])
PROMPT = cl.prompts.Prompt.from_tokens([1, 2, 3])
# As of `tiny_model()`, which TransformerLens 4 cannot make.
VECTORS = random_vectors(SimpleNamespace(cfg=SimpleNamespace(n_layers=5, d_model=32, model_name="tiny-random-llama")))
QUIET = {"progress": False}
# Every public function that takes a model; what they do with a right one is tested elsewhere.
CALLS = {
    "attribute_logits": lambda model: cl.interpretation.attribute_logits(model, [(PROMPT, 1, 2)], VECTORS[1], **QUIET),
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
    "steer": lambda model: cl.steer(model, VECTORS[1], start=0).__enter__(),
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


def bridge():
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = str(demo_model_path())  # for its tokenizer
    hf = LlamaForCausalLM(LlamaConfig(**SHAPE))
    return TransformerBridge.boot_transformers(folder, hf_model=hf, device="cpu")


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


def parallel():
    # On the CPU, also where a test has set up a card that is not there.
    with patch("torch.nn.parallel.data_parallel._get_available_device_type", return_value=None):
        return torch.nn.DataParallel(tiny_model())


def with_dropout():
    model = tiny_model()
    model.blocks[1].drop = torch.nn.Dropout(0.1)
    return model.train()


WRONG = {
    "bridge": (
        bridge,
        TypeError,
        "got a TransformerBridge, which is not supported yet: load the same model with caa_lens",
    ),
    "transformers": (
        of_transformers,
        TypeError,
        "got a model of transformers: give load_model its hub id, or the folder",
    ),
    "encoder": (encoder, TypeError, "got a HookedEncoder, which writes no text"),
    "encoder and decoder": (encoder_decoder, TypeError, "got a HookedEncoderDecoder, whose prompt and answer are two"),
    "wrapper": (lambda: Wrapper(tiny_model()), TypeError, "a HookedTransformer itself"),
    "compiled": (
        lambda: torch.compile(tiny_model()),
        ValueError,
        "the model is compiled, and torch.compile drops hooks",
    ),
    "parallel": (parallel, TypeError, "give the model inside, wrapper.module"),
    "class": (lambda: type(tiny_model()), TypeError, "expected a model from caa_lens.load_model, got type"),
    "name": (lambda: "demo", TypeError, "got the str 'demo'"),
    "not loaded": (on_meta, ValueError, r"weights are not loaded \(they are on the device 'meta'\)"),
    "dropout": (with_dropout, ValueError, r"in training mode and has dropout, .*: call model.eval\(\)"),
}


@pytest.fixture(scope="module")
def wrong_models():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: make() for name, (make, _, _) in WRONG.items()}


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
@pytest.mark.parametrize(
    ("wrong", "call"), [(wrong, call) for wrong in WRONG for call in CALLS if (wrong, call) != ("compiled", "steer")]
)
def test_every_function_refuses_it_by_name_before_anything_runs(wrong_models, call, wrong):
    _, kind, message = WRONG[wrong]
    ran = []
    counter = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, given: ran.append(module))
    try:
        with pytest.raises(kind, match=message):
            CALLS[call](wrong_models[wrong])
    finally:
        counter.remove()
    assert not ran


def test_a_hook_of_a_vector_says_that_the_model_is_another_kind_not_that_it_lacks_the_layer(wrong_models):
    vector = SteeringVector.from_direction(torch.ones(32), 1)
    with (
        pytest.raises(ValueError, match=r"has no hook point 'blocks.1.hook_resid_post'.*TransformerBridge"),
        wrong_models["bridge"].hooks(fwd_hooks=[vector.hook(start=0)]),
    ):
        pass


def test_what_is_a_hooked_transformer_is_taken(tiny):
    class Mine(type(tiny)):
        """As SAELens' HookedSAETransformer is one."""

    tiny.train()  # without dropout this changes nothing
    check_model(tiny)
    tiny.__class__ = Mine
    check_model(tiny)
