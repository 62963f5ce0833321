"""Models over several devices, partly on the disk, or with packed weights: every number is that of the untouched model.

The model is a small random Llama with grouped queries. What its numbers are, `family_twins.Twin` says: torch's own
hooks on a copy that neither TransformerLens nor this package ever saw; of packed weights, on a copy packed alike.
"""

import copy
import logging
import os
import warnings

import pytest
import torch
from helpers import family_checks
from helpers.families import demo_tokenizer, hf_of, transformer_lens
from helpers.family_checks import AB, CHECKS, Case, outcome
from helpers.family_twins import Twin
from helpers.models import random_vectors
from helpers.two_devices import devices, over_devices

import caa_lens as cl
from caa_lens.engine import shared_prefix, stream_responses
from caa_lens.models.adapters.choice import adapter_of
from caa_lens.models.adapters.kept_weights import matrix_of
from caa_lens.models.gradients import check_gradients
from caa_lens.models.loading.load import load_model
from caa_lens.models.loading.quantisation import quantisation_config
from caa_lens.models.placement import device_behind, device_of_tokens, dtype_name
from caa_lens.models.unembedding import final_logits, is_own

pytestmark = pytest.mark.bridge

FIRST, SECOND = "card:0", "card:1"
PLACES = {
    "model.embed_tokens": FIRST,
    "model.rotary_emb": FIRST,
    "model.layers.0": FIRST,
    "model.layers.1": SECOND,
    "model.layers.2": FIRST,
    "model.layers.3": SECOND,
    "model.norm": SECOND,
    "lm_head": FIRST,
}
# What does not fit on two cards stays in the CPU's memory, and is copied to one of them when it runs.
ALSO_IN_MEMORY = PLACES | {"model.layers.1": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
ON_DISK = dict.fromkeys(PLACES, "disk") | dict.fromkeys(("model.rotary_emb", "model.layers.0", "model.layers.2"), "cpu")
# All checks run everywhere where this is set; else each way of keeping weights has those that could see it.
ALL = bool(os.environ.get("CAA_LENS_ALL_FAMILIES"))


def checks(*names):
    chosen = list(CHECKS) if ALL or not names else names
    return pytest.mark.parametrize("check", [CHECKS[name] for name in chosen], ids=chosen)


def plain(**said):
    return hf_of("llama3", intermediate_size=128, **said)  # bitsandbytes packs 64 numbers at a time


@pytest.fixture(scope="module")
def twin():
    return Twin(plain(), demo_tokenizer())


@pytest.fixture(scope="module")
def folder(twin, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    copy.deepcopy(twin.hf).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """bitsandbytes says at every product that numbers go through float16."""
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


# ---- over several devices ----------------------------------------------------------------------------------------


def over(device_map, **said):
    hf = over_devices(plain(**said), device_map)
    return load_model("tiny", hf_model=hf, tokenizer=demo_tokenizer())


@pytest.fixture(scope="module")
def over_two(twin):
    with devices():
        return Case(name="llama3", model=over(PLACES), twin=twin)


@pytest.fixture(scope="module")
def over_two_and_in_memory(twin):
    with devices():
        return Case(name="llama3", model=over(ALSO_IN_MEMORY), twin=twin)


def test_devices_are_told_apart_and_numbers_are_the_cpus():
    with devices():
        one, other = torch.tensor([1.0, 2.0], device=FIRST), torch.tensor([3.0, 4.0]).to(SECOND)
        assert (one + other.to(FIRST)).tolist() == [4.0, 6.0]
        assert torch.equal((other * torch.tensor(2.0)).cpu(), torch.tensor([6.0, 8.0]))
        assert [str(one.device), str(other[:1].device)] == [FIRST, SECOND]
        wrongs = (
            lambda: one + other,
            lambda: one + torch.ones(2),
            lambda: one[torch.tensor([0], device=SECOND)],
            lambda: torch.nn.functional.embedding(torch.tensor([0]), one[None]),
        )
        for wrong in wrongs:
            for mode in (torch.no_grad, torch.inference_mode):
                with mode(), pytest.raises(RuntimeError, match="got tensors on"):
                    wrong()


@checks("extract", "hook", "steer_generate", "generate", "sweep", "residual_lens", "logit_lens", "attribute_logits")
def test_over_two_devices_every_function_gives_the_numbers_of_one(over_two, check):
    with devices():
        check(over_two)


@checks("token_similarity", "steer", "sweep", "generate_stream", "logit_lens")
def test_with_blocks_in_memory_besides_every_function_gives_the_numbers_of_one(over_two_and_in_memory, check):
    with devices():
        check(over_two_and_in_memory)


def test_a_split_model_says_where_things_lie(over_two, over_two_and_in_memory):
    model = over_two.model
    assert (device_of_tokens(model), device_behind(model)) == (torch.device(FIRST), torch.device(FIRST))
    assert (model.cfg.device, model.cfg.n_devices) == (FIRST, 2)
    assert (over_two_and_in_memory.model.cfg.device, over_two_and_in_memory.model.cfg.n_devices) == (FIRST, 3)
    assert over_two.model.original_model.hf_device_map == PLACES


def test_the_shared_prefix_holds_over_two_devices(over_two, over_two_and_in_memory):
    with devices():
        for case in (over_two, over_two_and_in_memory):
            assert shared_prefix.unsupported(case.model) is None
            assert is_own(case.model)


def test_operators_and_conditions_over_two_devices_are_those_of_one(over_two, monkeypatch):
    """By every operator at every layer, by two at once, by vectors and multipliers that lie on either device."""
    with devices():
        vectors = random_vectors(over_two.model, scale=2.0)
        there = [vectors.to(device)[layer] for layer, device in enumerate((SECOND, FIRST, FIRST, SECOND))]
        two = torch.tensor(0.7, device=SECOND)
        steps = [
            cl.Intervention(vector=v, operator=operator, multiplier=two)
            for v in there
            for operator in ("add", "ablate", "set", "add_keep_norm")
        ]
        given = [*((step,) for step in steps), (steps[0], steps[5], steps[14]), ()]
        found = cl.measures.score_answers(over_two.model, AB[:1], given, progress=False).values[0]
    one = load_model("tiny", hf_model=plain(), tokenizer=demo_tokenizer())
    monkeypatch.setattr(shared_prefix, "unsupported", lambda *given, **said: "each by itself")
    monkeypatch.setattr(warnings, "warn", lambda *given, **said: None)
    expected = [
        cl.measures.score_answers(one, AB[:1], [tuple(on_cpu(step, vectors) for step in some)], progress=False)
        for some in given
    ]
    torch.testing.assert_close(found.cpu(), torch.cat([one.values[0] for one in expected]), rtol=0, atol=2e-5)


def on_cpu(step, vectors):
    return cl.Intervention(vector=vectors[step.layer], operator=step.operator, multiplier=0.7)


def test_the_causal_lens_over_two_devices_reads_what_it_reads_on_one(over_two, monkeypatch):
    """By differences: the devices of the tests know no tangents."""

    def no_tangents(run):
        raise NotImplementedError("none")

    monkeypatch.setattr(stream_responses._Run, "forward_mode", no_tangents)
    asked = {"reading": "causal", "prompts": ["Why is it late?"], "progress": False}
    with devices():
        found = cl.logit_lens(over_two.model, random_vectors(over_two.model), **asked).frame
    one = load_model("tiny", hf_model=plain(), tokenizer=demo_tokenizer())
    expected = cl.logit_lens(one, random_vectors(one), **asked).frame
    assert list(found["token_id"]) == list(expected["token_id"])
    torch.testing.assert_close(torch.tensor(found["score"]), torch.tensor(expected["score"]), rtol=1e-4, atol=1e-4)


def test_vectors_of_a_split_model_steer_a_whole_one(over_two, tmp_path):
    one = load_model("tiny", hf_model=plain(), tokenizer=demo_tokenizer())
    with devices():
        vectors = cl.extract(over_two.model, AB, progress=False)
        assert (vectors.directions.device.type, vectors.directions.dtype) == ("cpu", torch.float32)
        vectors.save(tmp_path / "vectors.safetensors")
    loaded = cl.SteeringVectors.load(tmp_path / "vectors.safetensors")
    torch.testing.assert_close(loaded.directions, cl.extract(one, AB, progress=False).directions, rtol=0, atol=1e-5)
    assert loaded.provenance.model == one.cfg.model_name == "tiny"
    cl.generate(one, "Why?", [loaded[1]], max_new_tokens=2)


def test_tied_weights_on_two_devices_are_refused(twin):
    with (
        devices(),
        pytest.raises(ValueError, match=r"puts model.embed_tokens on card:0, and its weights are on card:1"),
    ):
        over(PLACES | {"lm_head": SECOND}, tie_word_embeddings=True)


# ---- on the disk -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_disk(twin, folder):
    return Case(name="llama3", model=load_model(folder, device_map=ON_DISK, tokenizer=demo_tokenizer()), twin=twin)


@checks("extract", "steer_generate", "sweep", "logit_lens", "attribute_logits")
def test_with_weights_on_the_disk_every_function_gives_the_numbers_of_the_whole_model(on_disk, check):
    check(on_disk)


def test_what_lies_on_the_disk_is_read_there_and_never_on_meta(on_disk):
    """The formula of the unembedding is found, as with all weights in memory, and has their numbers."""
    model = on_disk.model
    assert model.unembed.original_component.weight.is_meta
    assert is_own(model)
    W_U, b_U = adapter_of(model).unembedding(model)
    torch.testing.assert_close(W_U.T, on_disk.twin.hf.lm_head.weight, rtol=0, atol=0)
    assert not b_U.any()
    (norm, *_) = adapter_of(model).final_norms(model)
    torch.testing.assert_close(norm.weight, on_disk.twin.hf.model.norm.weight, rtol=0, atol=0)
    assert model.cfg.device == "cpu"


def test_weights_that_nobody_keeps_are_refused_by_name(on_disk):
    model, head = on_disk.model, on_disk.model.unembed.original_component
    kept, head._hf_hook.weights_map = head._hf_hook.weights_map, {}
    try:
        with pytest.raises(ValueError, match="weight of a Linear is on the device 'meta', where there are no numbers"):
            adapter_of(model).unembedding(model)
    finally:
        head._hf_hook.weights_map = kept


# ---- packed weights ----------------------------------------------------------------------------------------------


def packed_case(folder, asked, **options):
    from transformers import AutoModelForCausalLM

    where = {"dtype": "float32", "device": "cpu", "tokenizer": demo_tokenizer()}
    model = load_model(folder, quantised=asked, **where, **options)
    alone = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=quantisation_config(asked, torch.float32),
        dtype=torch.float32,
        device_map={"": "cpu"},
        attn_implementation="eager",
    )
    return Case(name="llama3", model=model, twin=Twin(alone.eval(), demo_tokenizer()))


@pytest.fixture(scope="module")
def nf4(folder):
    return packed_case(folder, "4bit")


@pytest.fixture(scope="module")
def int8(folder):
    return packed_case(folder, "8bit")


@pytest.fixture
def rounded(monkeypatch):
    """bitsandbytes multiplies in bfloat16 on some CPUs, where the last bit of a sum may round the other way."""
    own = family_checks.assert_near

    def assert_near(found, expected, *, relative=1e-5, least=0.0):
        own(found, expected, relative=max(relative, 2e-3), least=max(least, 2e-3))

    monkeypatch.setattr(family_checks, "assert_near", assert_near)


@checks("extract", "hook_generate", "generate", "sweep", "logit_lens", "attribute_logits")
def test_in_4_bits_every_function_gives_the_numbers_of_transformers(nf4, rounded, check):
    assert outcome(nf4, check).slow == ""


@checks("extract", "generate_stream", "sweep", "logit_lens")
def test_in_8_bits_whole_runs_give_the_numbers_of_transformers(int8, rounded, check):
    """Which columns are kept in float16 depends on what else is in a batch, so that rows do not share a prompt."""
    if check.__name__ in ("steer_batch", "attribute_logits"):
        pytest.skip("two rows in one run of the model, which are not those of two runs")
    assert "differ on a short prompt" in outcome(int8, check).slow or check.__name__ not in ("extract", "sweep")


def test_8_bits_without_kept_columns_share_a_prompt(folder):
    from transformers import BitsAndBytesConfig

    case = packed_case(folder, BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0))
    assert shared_prefix.unsupported(case.model) is None
    CHECKS["sweep"](case)


@pytest.mark.parametrize("check", ["sweep", "residual_lens"])
def test_a_packed_unembedding_gives_the_numbers_of_transformers_before_and_after_it_ran(folder, rounded, check):
    """bitsandbytes puts 4 bits into another order at the first run on some CPUs, and unpacks them wrongly then."""
    from transformers import BitsAndBytesConfig

    asked = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32, "llm_int8_skip_modules": []}
    case = packed_case(folder, BitsAndBytesConfig(load_in_4bit=True, **asked), check=False)
    assert type(case.model.unembed.original_component).__name__ == "Linear4bit"
    for _ in range(2):
        CHECKS[check](case)
    with pytest.raises(ValueError, match=r"no formula of a final norm|has no matrix of plain numbers"):
        cl.logit_lens(case.model, case.vectors, reading="direct")


def test_in_half_precision_a_packed_unembedding_is_not_taken_for_its_formula(folder):
    """Where rounding would hide that what is read of it before its first run are other numbers than afterwards."""
    from transformers import BitsAndBytesConfig

    asked = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16, "llm_int8_skip_modules": []}
    packing = BitsAndBytesConfig(load_in_4bit=True, **asked)
    model = load_model(folder, quantised=packing, dtype="bfloat16", tokenizer=demo_tokenizer(), check=False)
    tokens = torch.tensor([[1, 5, 9, 33]])
    for _ in range(2):
        with torch.no_grad():
            found = final_logits(model, adapter_of(model).run(model, tokens)).log_softmax(-1)
            own = model(tokens).float().log_softmax(-1)
        torch.testing.assert_close(found, own, rtol=0, atol=0.05)


def test_what_is_unpacked_is_the_weight_but_for_its_rounding(int8, nf4, twin):
    for name in ("mlp.up_proj", "self_attn.k_proj"):
        weight = twin.hf.model.layers[1].get_submodule(name).weight.detach()
        linear = int8.model.original_model.model.layers[1].get_submodule(name)
        found = matrix_of(linear).float()
        assert 1e-4 < float((found - weight).norm() / weight.norm()) < 0.02
    assert matrix_of(nf4.model.original_model.model.layers[1].mlp.up_proj) is None  # of the CPU nothing is known


def test_packed_weights_are_not_those_of_the_whole_model(nf4, int8, twin):
    """Or else the tests above could compare plain models."""
    text = twin.text("Why?").tokens
    logits = [one.run(text).logits for one in (twin, nf4.twin, int8.twin)]
    for packed in logits[1:]:
        assert 0.003 < float((packed - logits[0]).norm() / logits[0].norm()) < 1
    kinds = {type(part).__name__ for part in nf4.model.original_model.modules()}
    assert "Linear4bit" in kinds


def test_vectors_say_how_the_weights_were_packed_and_are_not_mixed_with_others(nf4, int8, twin, tmp_path):
    one = load_model("tiny", hf_model=copy.deepcopy(twin.hf), tokenizer=demo_tokenizer())
    found = {}
    for name, model in (("nf4", nf4.model), ("plain", one)):
        found[name] = cl.extract(model, AB, progress=False)
    assert (nf4.model.cfg.model_name, int8.model.cfg.model_name) == ("tiny (nf4)", "tiny (int8)")
    assert (dtype_name(nf4.model), dtype_name(int8.model)) == ("float32, weights nf4", "float32, weights int8")
    found["nf4"].save(tmp_path / "nf4.safetensors")
    loaded = cl.SteeringVectors.load(tmp_path / "nf4.safetensors")
    assert loaded.provenance.model == "tiny (nf4)"
    assert loaded.provenance.details["model_dtype"] == "float32, weights nf4"
    assert (found["plain"].provenance.model, found["plain"].provenance.details["model_dtype"]) == ("tiny", "float32")
    assert loaded.directions.dtype == torch.float32
    with pytest.raises(ValueError, match=r"different models, tiny and tiny \(nf4\)"):
        loaded - found["plain"]
    assert float(loaded[2].cosine(found["plain"][2])) > 0.5  # compared they may be, and steer the other model, too
    vectors, test = found["plain"], cl.ContrastSet.load("sycophancy").sample(1, seed=0)
    swept = cl.sweep(nf4.model, test, vectors, layers=[1], multipliers=[1], progress=False)
    assert (swept.settings["model"], swept.settings["dtype"]) == ("tiny (nf4)", "float32, weights nf4")
    assert swept.provenance["vectors"].model == "tiny"


def test_a_stream_of_half_precision_over_packed_weights_keeps_its_type(folder):
    model = load_model(folder, quantised="4bit", dtype="bfloat16", device="cpu", tokenizer=demo_tokenizer())
    vectors = cl.extract(model, AB, layers=[1], progress=False)
    assert vectors.directions.dtype == torch.float32
    assert vectors.provenance.details["model_dtype"] == "bfloat16, weights nf4"
    seen = []
    tokens = torch.tensor([[1, 5, 9, 33]])
    with cl.steer(model, vectors[1], start=0), torch.no_grad():
        hooks = [("blocks.1.hook_out", lambda resid, hook: seen.append(resid.dtype))]
        assert model.run_with_hooks(tokens, fwd_hooks=hooks).dtype == torch.bfloat16
    assert seen == [torch.bfloat16]


# ---- gradients ---------------------------------------------------------------------------------------------------


def test_gradients_through_8_bits_are_derivatives_and_lost_ones_are_refused(nf4, int8, twin):
    """bitsandbytes loses them in 4 bits after the first run on CPUs that multiply in bfloat16; torch only warns."""
    check_gradients(int8.model)
    check_gradients(load_model("tiny", hf_model=copy.deepcopy(twin.hf), tokenizer=demo_tokenizer()))
    linear = nf4.model.original_model.model.layers[0].mlp.up_proj
    given = torch.randn(1, 2, linear.in_features, requires_grad=True)
    with torch.no_grad():
        linear(given.detach())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of it
        (gradient,) = torch.autograd.grad(linear(given).sum(), given, allow_unused=True)
    if gradient is not None:
        pytest.skip("on this CPU bitsandbytes has a backward for 4 bits")
    with pytest.raises(ValueError, match=r"nothing can be learned through tiny \(nf4\) .*use quantised='8bit'"):
        cl.methods.bipo.fit(nf4.model, AB, layer=1, epochs=1, progress=False)


def test_a_backward_that_is_lost_is_noticed_wherever_it_is(int8, monkeypatch):
    from caa_lens.models import gradients

    linear = int8.model.original_model.model.layers[3].mlp.down_proj
    own = type(linear).forward

    def forward(module, x):
        return own(module, x.detach() if module is linear else x)

    monkeypatch.setattr(gradients, "_right", set())
    monkeypatch.setattr(gradients, "_packed", lambda model: [("down_proj", linear)])
    check_gradients(int8.model)
    gradients._right.clear()
    monkeypatch.setattr(type(linear), "forward", forward)
    with pytest.raises(ValueError, match=r"gradient of down_proj .* is not its derivative, by 1 of its size"):
        check_gradients(int8.model)


def test_a_method_learns_through_8_bits(int8):
    found = cl.methods.bipo.fit(int8.model, AB, layer=1, epochs=1, progress=False)
    assert float(found.direction.norm()) > 0
    assert found.provenance.model == "tiny (int8)"


# ---- a real model ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(transformer_lens() == "4" and not ALL, reason="dear, and the small one runs with both versions")
def test_the_demo_model_over_two_devices_gives_the_numbers_of_one():
    from transformers import AutoModelForCausalLM

    from caa_lens.models.loading.demo_model import demo_model_path

    asked = "What is the capital of France?"
    pairs = cl.ContrastSet.load("refusal")[:1]

    def numbers(model):
        vectors = cl.extract(model, pairs, layers=[10, 20], progress=False)
        said = cl.generate(model, asked, [(vectors[10], 1.0), (vectors[20], 1.0)], max_new_tokens=3)
        return vectors.directions, said, cl.residual_lens(model, asked, positions=[36]).frame

    one = load_model("demo", device="cpu", dtype="float32", backend="bridge", check=False)
    expected = numbers(one)
    hf = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32, attn_implementation="eager")
    device_map = {f"model.layers.{layer}": SECOND if layer % 20 >= 10 else FIRST for layer in range(30)}
    ends = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
    with devices():
        two = load_model("demo", hf_model=over_devices(hf, device_map | dict.fromkeys(ends, FIRST)), check=False)
        found = numbers(two)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-4)
    assert found[1] == expected[1]
    assert list(found[2]["top_token_id"]) == list(expected[2]["top_token_id"])
    probability = torch.tensor(expected[2]["probability"])
    torch.testing.assert_close(torch.tensor(found[2]["probability"]), probability, rtol=0, atol=1e-5)
