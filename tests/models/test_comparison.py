"""A bridge beside the module of Hugging Face that it was made of, as a whole and part by part."""

import copy

import pytest
import torch
from helpers.models import random_llama

import caa_lens as cl
from caa_lens.models import comparison
from caa_lens.models.loading import bridges

pytestmark = pytest.mark.bridge


@pytest.fixture
def bridge(tmp_path):
    return bridges.boot(random_llama(tmp_path), "tiny-llama", None, "", check=False)


def logp_of(model, tokens):
    with torch.no_grad():
        return model(tokens)[0].log_softmax(-1)


def test_numbers_of_the_module_are_found_and_told_in_one_line(bridge):
    tokens = torch.tensor([[5, 9, 2, 40, 33, 8]])
    said = comparison.check_against(bridge, tokens, logp_of(bridge, tokens))
    assert "\n" not in said
    assert said.startswith("tiny-llama: compared with the untouched Hugging Face module on 6 tokens")
    assert said.endswith("with and without its key-value cache")


def test_a_shift_of_one_token_is_refused(bridge):
    tokens = torch.tensor([[5, 9, 2, 40, 33, 8]])
    with pytest.raises(ValueError, match="does not give the numbers of its own Hugging Face module"):
        comparison.check_against(bridge, tokens, logp_of(bridge, tokens).roll(1, 0))


def test_a_model_whose_tokens_see_those_behind_them_is_refused(bridge, monkeypatch):
    tokens = torch.tensor([[5, 9, 2, 40, 33, 8]])
    adapter = comparison.adapter_of(bridge)
    run = type(adapter).run

    def sees_the_end(self, model, tokens, *given, **options):
        return run(self, model, tokens, *given, **options) + 0.1 * tokens.sum()

    monkeypatch.setattr(type(adapter), "run", sees_the_end)
    told = comparison.final_logits(bridge, adapter.run(bridge, tokens)[0]).log_softmax(-1)
    with pytest.raises(ValueError, match="sees the tokens behind a token"):
        comparison.check_against(bridge, tokens, told)


def test_a_cache_that_gives_other_numbers_is_told(bridge, monkeypatch):
    tokens = torch.tensor([[5, 9, 2, 40, 33, 8]])
    adapter = comparison.adapter_of(bridge)
    run = type(adapter).run

    def worse_with_a_cache(self, model, tokens, *given, cache=None, **options):
        resid = run(self, model, tokens, *given, cache=cache, **options)
        return resid if cache is None else resid.flip(-1)

    monkeypatch.setattr(type(adapter), "run", worse_with_a_cache)
    said = comparison.check_against(bridge, tokens, logp_of(bridge, tokens))
    assert "without its key-value cache only (with it they differ by" in said


@pytest.mark.parametrize("part", ["attn", "mlp", "ln2"])
def test_a_part_that_transformer_lens_computes_otherwise_is_refused_by_name_also_in_a_bridge_that_somebody_booted(
    bridge, part, monkeypatch
):
    kind = type(getattr(bridge.blocks[1], part))
    own = kind.forward

    def otherwise(self, *given, **options):
        out = own(self, *given, **options)
        return (1.001 * out[0], *out[1:]) if isinstance(out, tuple) else 1.001 * out

    monkeypatch.setattr(kind, "forward", otherwise)
    with pytest.raises(ValueError, match=r"computes blocks.0.\w+ of tiny-llama otherwise than transformers"):
        cl.models.check_model(bridge)
    monkeypatch.setattr(kind, "forward", own)
    cl.models.check_model(bridge)


def test_hooks_of_the_users_are_not_run_by_the_comparison_and_are_there_afterwards(bridge):
    runs = []
    bridge.add_hook("blocks.1.hook_out", lambda resid, hook: runs.append("theirs"))
    handle = bridge.blocks[0].register_forward_hook(lambda *given: runs.append("torch's"))
    cl.models.check_model(bridge)
    assert runs == []
    bridge(torch.tensor([[5, 9, 2]]))
    assert sorted(runs) == ["theirs", "torch's"]
    handle.remove()


def test_a_copy_of_a_bridge_counts_its_own_runs(bridge):
    cl.models.check_model(bridge)
    other = copy.deepcopy(bridge)
    cl.models.check_model(other)
    vector = cl.SteeringVector.from_direction(torch.ones(32), layer=1)
    tokens = torch.tensor([[5, 9, 2, 40]])
    with torch.no_grad():
        bridge(tokens)
        plain = other(tokens)
        steered = other.run_with_hooks(tokens, fwd_hooks=[vector.hook(start=2)])
    torch.testing.assert_close(steered[:, :2], plain[:, :2])
    assert (steered[:, 2:] - plain[:, 2:]).abs().max() > 1e-3
