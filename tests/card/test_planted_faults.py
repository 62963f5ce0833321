"""Faults as they come about in code that only ever ran on a CPU, planted in the library: the fake GPU notices each."""

import pytest
import torch
from helpers.card_calls import READS, at_a_time, letters, vectors_of
from helpers.fake_gpu import fake_gpu

import caa_lens as cl
from caa_lens.engine import activations, edits, shared_prefix, staircase
from caa_lens.measures import answers
from caa_lens.models.adapters import llama_blocks
from caa_lens.steering import generation

pytestmark = [
    pytest.mark.hooked,
    pytest.mark.filterwarnings("ignore::caa_lens.vectors.extraction.ZeroVectorWarning"),
    pytest.mark.filterwarnings("ignore::caa_lens.contrast.sets.LetterBalanceWarning"),
]
MULTIPLIERS = list(range(-20, 21))  # so that answers take more than prompts do
SWEEP = at_a_time(2, lambda m, n: cl.sweep(m, letters(4), vectors_of(m), multipliers=MULTIPLIERS, progress=False))
CALLS = {
    "sweep": lambda model: SWEEP(model, 1),
    "extract": lambda model: cl.extract(model, letters(8), progress=False),
    "generate": lambda model: cl.generate(model, ["Hello", "How are you?"], [vectors_of(model)[1]], max_new_tokens=4),
}


def counts(call, model):
    """Waits, uploads, bytes and operations of a call."""
    from benchmarks.passes import flops

    with fake_gpu(**READS) as gpu:
        before = gpu.now()
        gpu.forget_peak()
        call(model)
    work = flops(lambda: call(model))
    return {"waits": gpu.waits, "uploads": gpu.uploads, "bytes": gpu.peak() - before, "operations": work}


def around(module, name, change):
    """`change(original, *given)` in the place of a function."""

    def plant(monkeypatch):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, **named: change(original, *given, **named))

    return plant


def mask_on_the_cpu(attend, q, k, v, prefix_k, prefix_v, hidden, *rest):
    return attend(q, k, v, prefix_k, prefix_v, torch.zeros(hidden.shape, dtype=torch.bool), *rest)


def cache_copied_for_every_row(attend, q, k, v, prefix_k, prefix_v, hidden, *rest):
    rows = len(q) // len(prefix_k)
    return attend(q, k, v, *(one.repeat_interleave(rows, 0) for one in (prefix_k, prefix_v, hidden)), *rest)


def wide_keys_and_values(prefill, *given, **named):
    found = prefill(*given, **named)
    keys, values = (tuple(one.float() for one in some) for some in (found.keys, found.values))
    return llama_blocks.Prefix(keys=keys, values=values, lengths=found.lengths)


def read_in_the_loop_over_layers(run_block, block, resid, attend):
    assert float(resid.abs().max()) > 0
    return run_block(block, resid, attend)


def rows_read_one_by_one(read, model, resid, items, whole):
    for row in resid:
        row[0, 0, -1, :2].tolist()
    return read(model, resid, items, whole)


def every_position_unembedded(token_logits, model, resid, tokens):
    from caa_lens.models.unembedding import final_logits

    return final_logits(model, resid).gather(-1, tokens.expand(*resid.shape[:-1], 2))


def staircase_for_every_batch(at_most, self, at_once):
    self._built.clear()
    return at_most(self, at_once)


def prompt_run_for_its_output(prefill, model, prefixes, n_layers=None):
    model(torch.tensor([list(prefixes[0])], device=model.W_E.device), stop_at_layer=n_layers or model.cfg.n_layers)
    return prefill(model, prefixes, n_layers)


def drawn_by_a_generator_of_the_cpu(choose, logits, temperature, generator):
    return choose(logits + torch.zeros_like(logits).uniform_(generator=generator), temperature, generator)


def positions_of_the_cpu(chosen, positions, *, behind, n_rows, n_pos, device):
    return chosen(positions, behind=behind, n_rows=n_rows, n_pos=n_pos, device=torch.device("cpu"))


def vector_sent_up_at_every_step(apply, self, resid, behind):
    return apply(self.to(torch.device("cpu")).to(resid.device), resid, behind)


def weights_of_the_cpu(read, model, pairs, layers):
    return read(model, pairs, layers).to("cpu").to(model.W_E.device)


def finished_asked_of_every_row(choose, logits, temperature, generator):
    new = choose(logits, temperature, generator)
    assert all(int(token) >= 0 for token in new)
    return new


FAULTS = {
    "a mask made on the CPU": ("sweep", "raises", around(llama_blocks, "_attend_to_prefix", mask_on_the_cpu)),
    "the cache copied for every row": (
        "sweep",
        "bytes",
        around(llama_blocks, "_attend_to_prefix", cache_copied_for_every_row),
    ),
    "keys and values in float32": ("sweep", "raises", around(shared_prefix, "prefill", wide_keys_and_values)),
    "a number read at every layer": ("sweep", "waits", around(llama_blocks, "run_block", read_in_the_loop_over_layers)),
    "rows read one by one": ("sweep", "waits", around(answers, "_letter_logp", rows_read_one_by_one)),
    "every position unembedded": ("sweep", "operations", around(answers, "token_logits", every_position_unembedded)),
    "vectors sent up for every batch": (
        "sweep",
        "uploads",
        around(staircase.Staircases, "at_most", staircase_for_every_batch),
    ),
    "the prompt run once more": ("sweep", "operations", around(shared_prefix, "prefill", prompt_run_for_its_output)),
    "activations by way of the CPU": (
        "extract",
        "waits",
        around(activations, "_read_with_shared_prefix", weights_of_the_cpu),
    ),
    "noise by a generator of the CPU": (
        "generate",
        "raises",
        around(generation, "_choose", drawn_by_a_generator_of_the_cpu),
    ),
    "the end asked of every row": ("generate", "waits", around(generation, "_choose", finished_asked_of_every_row)),
    "positions on the CPU": ("generate", "raises", around(edits, "chosen", positions_of_the_cpu)),
    "the vector sent up at every step": (
        "generate",
        "uploads",
        around(edits.Edit, "apply", vector_sent_up_at_every_step),
    ),
}


@pytest.fixture(scope="module")
def sound(card_model):
    model = card_model("7B", 4)
    for call in CALLS.values():
        with fake_gpu(**READS):
            call(model)  # what is found out once a model
    return {name: counts(call, model) for name, call in CALLS.items()}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(card_model, sound, monkeypatch, name):
    call, what, plant = FAULTS[name]
    plant(monkeypatch)
    if what == "raises":
        with pytest.raises(RuntimeError, match=r"device|GPU|dtype|CPU|scalar type"):
            counts(CALLS[call], card_model("7B", 4))
        return
    found = counts(CALLS[call], card_model("7B", 4))
    assert found[what] > sound[call][what] * (1.1 if what == "bytes" else 1)


def test_the_sound_library_counts_the_same_again(card_model, sound):
    assert counts(CALLS["sweep"], card_model("7B", 4)) == sound["sweep"]
