"""Fixtures that several test modules share."""

import os

# No test may reach for a model hub: set before anything imports huggingface_hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
# Tests run in parallel processes, each on one core, and so do the programs that they start: threads that wait for each
# other would only slow them down.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from functools import partial

import pytest
import torch
from helpers import device
from helpers.models import SHARED, TOKENIZER, demo_folder, kinds_here
from helpers.models import tiny_model as make_tiny_model

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        help="where the tests' models lie: cpu, cuda, mps, or card, a second device that computes on the CPU",
    )


def pytest_configure(config):
    try:
        device.choose(config.getoption("--device"))
    except (ValueError, RuntimeError) as error:
        raise pytest.UsageError(str(error)) from error
    there = device.running_there()
    there.__enter__()
    config.add_cleanup(lambda: there.__exit__(None, None, None))


def pytest_ignore_collect(collection_path):
    """Tests that count on a card of their own, without values, have nothing to do on another device."""
    if device.device().type != "cpu" and collection_path.suffix == ".py":
        return "helpers.fake_gpu" in collection_path.read_text(encoding="utf-8") or None
    return None


def pytest_generate_tests(metafunc):
    """Whatever asks for a small model runs once a kind; what is marked `hooked`, on a HookedTransformer alone."""
    if "model_kind" in metafunc.fixturenames:
        kinds = kinds_here()
        if metafunc.definition.get_closest_marker("one_kind"):
            kinds = kinds[:1]
        if metafunc.definition.get_closest_marker("hooked"):
            kinds = ("hooked",)
        metafunc.parametrize("model_kind", kinds, indirect=True, scope="session")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The half of a test that is about a bridge is what `-m bridge` chooses; what costs much, only if it says so."""
    for item in items:
        dear = item.get_closest_marker("one_kind") and not item.get_closest_marker("both_versions")
        if hasattr(item, "callspec") and item.callspec.params.get("model_kind") == "bridge" and not dear:
            item.add_marker(pytest.mark.bridge)
        if item.get_closest_marker("hooked") and "hooked" not in kinds_here():
            item.add_marker(pytest.mark.skip(reason="is about HookedTransformer, which TransformerLens 4 has not"))
        about_the_cpu = item.get_closest_marker("cpu")
        if about_the_cpu and device.device().type != "cpu":
            item.add_marker(pytest.mark.skip(reason=f"is about the CPU alone: {about_the_cpu.args[0]}"))
        if item.get_closest_marker("second_device") and device.device().type == "cpu":
            item.add_marker(pytest.mark.skip(reason="needs a device beside the CPU: --device cuda, or --device card"))


@pytest.fixture(scope="session")
def model_kind(request):
    """Which of TransformerLens' two kinds the test's small models are: "hooked" or "bridge"."""
    return request.param


@pytest.fixture(scope="session")
def tiny_model(model_kind):
    """Makes small random Llamas of the kind that the test is run for."""
    return partial(make_tiny_model, kind=model_kind)


@pytest.fixture(scope="session")
def demo_model():
    """SmolLM2-135M-Instruct from 4 bits, the real model; downloaded once into the user's cache."""
    if TOKENIZER:
        pytest.skip("needs the demo model, of which only the tokenizer is here")
    from caa_lens.models.loading.load import load_model

    if device.device().type in ("cpu", "cuda", "mps"):
        return load_model("demo", device=device.device())
    return load_model("demo", device="cpu").to(device.device())


@pytest.fixture(scope="session")
def demo_tokenizer():
    """The real model's tokenizer without the model, which takes a while to load."""
    from caa_lens.models.loading.tokenizers import folder_tokenizer

    return folder_tokenizer(demo_folder())


@pytest.fixture
def tiny(tiny_model):
    """A fresh random Llama with grouped queries and no tokenizer."""
    return tiny_model()


@pytest.fixture(scope="session")
def tiny_chat(demo_tokenizer, tiny_model):
    """A small random Llama behind the real tokenizer: fast, and prompts are real."""
    return tiny_model(d_vocab=len(demo_tokenizer), n_ctx=512, tokenizer=demo_tokenizer)


@pytest.fixture(scope="session")
def llama2_tokenizer():
    """The real Llama 2 tokenizer as `load_model` reads it from a bare tokenizer.model, where that is at hand."""
    file = SHARED / "llama2_tokenizer" / "tokenizer.model"
    if not file.exists():
        pytest.skip("needs ../shared/llama2_tokenizer/tokenizer.model beside the project")
    from caa_lens.models.loading.tokenizers import sentencepiece_tokenizer

    return sentencepiece_tokenizer(file)
