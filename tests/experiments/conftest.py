"""The experiments are no installed package: they are imported from the project's root."""

import sys
from pathlib import Path

import pytest
from helpers.models import random_llama

ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of two random Llamas behind the real tokenizer, as `load_model` reads them."""
    from transformers import AutoTokenizer

    from caa_lens.models.loading.demo_model import demo_model_path

    folder = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    for seed, name in enumerate(("chat", "base")):
        random_llama(folder / name, seed=seed, vocab_size=len(tokenizer), max_position_embeddings=512)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def no_data(monkeypatch, tmp_path):
    """A user's cache in which nothing has been fetched."""
    monkeypatch.setenv("CAA_LENS_CACHE", str(tmp_path / "cache"))
    from experiments.running.behavior_sets import behavior_sets

    behavior_sets.cache_clear()
    yield str(tmp_path / "cache")
    behavior_sets.cache_clear()
