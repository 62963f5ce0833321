"""What Python shows of a long job that was stopped."""

import traceback

import pytest
from helpers.models import random_vectors

from caa_lens.contrast.sets import ContrastSet
from caa_lens.measures.sweeps import sweep
from caa_lens.stops import NOTHING, kept_if_stopped
from caa_lens.transfers.across_layers import transfer_layers
from caa_lens.vectors.extraction import extract

pytestmark = pytest.mark.one_kind


def stop(*_, **__):
    raise KeyboardInterrupt


def test_the_outermost_block_says_what_is_kept_and_notes_of_others_stay():
    error = KeyboardInterrupt()
    error.add_note("of somebody else")
    with pytest.raises(KeyboardInterrupt) as found, kept_if_stopped(lambda: "all of it"), kept_if_stopped():
        raise error
    assert found.value.__notes__ == ["of somebody else", "stopped: all of it"]


def test_other_errors_pass_without_a_note():
    with pytest.raises(ValueError, match="other") as found, kept_if_stopped():
        raise ValueError("another")
    assert not hasattr(found.value, "__notes__")


@pytest.mark.parametrize("job", ["sweep", "transfer", "extract"])
def test_a_stopped_job_says_under_the_traceback_that_nothing_is_kept(tiny_chat, monkeypatch, job):
    pairs = ContrastSet.load("sentiment").sample(8, seed=0)
    vectors = random_vectors(tiny_chat, layers=[1, 3])
    monkeypatch.setattr("caa_lens.measures.answers._score_as_rows", stop)
    monkeypatch.setattr("caa_lens.vectors.extraction._streaming_mean_difference", stop)
    jobs = {
        "sweep": lambda: sweep(tiny_chat, pairs, vectors, progress=False),
        "transfer": lambda: transfer_layers(tiny_chat, pairs, vectors, progress=False),
        "extract": lambda: extract(tiny_chat, pairs, progress=False),
    }
    with pytest.raises(KeyboardInterrupt) as found:
        jobs[job]()
    assert "".join(traceback.format_exception(found.value)).rstrip().endswith(f"KeyboardInterrupt\nstopped: {NOTHING}")
