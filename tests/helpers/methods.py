"""Small data that methods are fitted on, and what every fitted method must do."""

from dataclasses import fields

import torch

from caa_lens.contrast.sets import ContrastSet

PAIRS = ContrastSet.from_pairs(
    [
        ("How was it?", "Lovely, thank you.", "Bad, and so long."),
        ("And the weather?", "Sun all day.", "It rained and rained."),
        ("Food?", "Tasty and warm.", "Cold and stale."),
        ("Would you go there again?", "Gladly, tomorrow.", "Never."),
    ],
    name="trip",
)


def assert_comes_back(fitted, path):
    """Saved and read again it is the same to the bit, and one line when printed."""
    again = type(fitted).load(fitted.save(path))
    for one in fields(fitted):
        kept, read = getattr(fitted, one.name), getattr(again, one.name)
        if isinstance(kept, torch.Tensor):
            assert kept.dtype == read.dtype
            assert torch.equal(kept, read)
        else:
            assert (dict(kept) if one.name == "settings" else kept) == (dict(read) if one.name == "settings" else read)
    assert repr(again) == repr(fitted)
    assert "\n" not in repr(fitted)
    assert len(repr(fitted)) < 200
