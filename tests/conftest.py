"""Fixtures that several test modules share."""

import os

# No test may reach for a model hub: set before anything imports huggingface_hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
# Tests run in parallel processes, each on one core, and so do the programs that they start: threads that wait for each
# other would only slow them down.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from helpers.models import SHARED, tiny_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_model():
    """SmolLM2-135M-Instruct, the real model; downloaded once into the user's cache."""
    from caa_lens.models.loading.load import load_model

    return load_model("demo", device="cpu")


@pytest.fixture(scope="session")
def demo_tokenizer():
    """The real model's tokenizer without the model, which takes a while to load."""
    from caa_lens.models.loading.demo_model import demo_model_path
    from caa_lens.models.loading.tokenizers import folder_tokenizer

    return folder_tokenizer(demo_model_path())


@pytest.fixture
def tiny():
    """A fresh random Llama with grouped queries and no tokenizer."""
    return tiny_model()


@pytest.fixture(scope="session")
def tiny_chat(demo_tokenizer):
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
