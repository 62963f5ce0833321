"""The other tools, and one model in both libraries."""

import importlib
import os

import pytest
import torch


def needs(name: str):
    """Import another tool: absent, it skips the test, but fails it under `make interop`, which installs them all."""
    if os.environ.get("CAA_LENS_INTEROP"):
        return importlib.import_module(name)
    return pytest.importorskip(name, reason=f"{name} is not installed: run `make interop`")


def log_probabilities(model, tokens, *vectors, multiplier=1.0):
    """Ours, of the next token after each row, with vectors added at every position."""
    from caa_lens.steering.steered_block import steer

    with torch.no_grad(), steer(model, *vectors, start=0, multiplier=multiplier):
        return model(torch.as_tensor(tokens))[:, -1].float().log_softmax(-1)
