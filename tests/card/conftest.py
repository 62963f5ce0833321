"""The fake GPU's models, made once; all is skipped where there can be no fake GPU."""

from pathlib import Path

import pytest
import torch
from helpers.fake_gpu import SHAPES, fake_gpu, llama, why_not

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    reason = why_not()
    for item in items:
        if HERE in item.path.parents:
            # A fake tensor has no place in memory, which a hook asks for to notice that its numbers were replaced.
            item.add_marker(pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning"))
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def card_model(demo_tokenizer):
    """Makes Llamas of Llama 2's widths on the fake card, each once; its tokenizer is the demo model's."""
    made = {}

    def make(shape, n_layers=None, dtype=torch.bfloat16, device="cuda"):
        key = shape, n_layers, dtype, device
        if key not in made:
            sizes = SHAPES[shape] if n_layers is None else {**SHAPES[shape], "n_layers": n_layers}
            with fake_gpu():
                made[key] = llama(device, **sizes, dtype=dtype, tokenizer=demo_tokenizer)
        return made[key]

    return make
