"""One small random Llama, in Hugging Face's form and in ours."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.models import random_llama, random_vectors

sys.path.append(str(Path(__file__).parents[1] / "project"))  # of test_docs, whose pages run here with other tools too


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """The same weights as `hf` and as `ours`, and `vectors` of a size that matters at all five layers."""
    from caa_lens.models.loading.load import load_model

    folder = tmp_path_factory.mktemp("llama")
    hf = random_llama(folder, num_hidden_layers=5)
    ours = load_model(folder, device="cpu")
    return SimpleNamespace(hf=hf, ours=ours, vectors=random_vectors(ours, scale=0.5))
