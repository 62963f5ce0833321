"""SADI's sites in models that are no Llamas: gates or none, other activations, experts, heads of another make.

Held against torch's hooks on a Hugging Face module that nobody has touched.
"""

from functools import partial

import pytest
import torch
from helpers.families import WINDOW, WINDOWED, absent_here, bridge_of, demo_tokenizer, hf_of, wrong_here
from helpers.family_twins import Step, Twin
from helpers.methods import PAIRS
from torch.testing import assert_close

from caa_lens.engine.streams import last_residual
from caa_lens.measures.answers import score_answers
from caa_lens.methods import neurons, sadi
from caa_lens.models.checks import check_model
from caa_lens.models.unembedding import final_logits
from caa_lens.prompts.prompt_formats import Prompt, encode_answer, resolve_format
from caa_lens.steering.interventions import Intervention, as_interventions
from caa_lens.steering.steered_block import steer

pytestmark = [pytest.mark.bridge, pytest.mark.filterwarnings("ignore::caa_lens.engine.SharedPrefixWarning")]
LLAMA = {"heads": "self_attn.o_proj", "neurons": "mlp.act_fn", "scaled": "mlp.down_proj", "hidden": "mlp"}
# Of each family: the module whose input the heads are, whose output the activations are, whose input they are scaled
# at, and the MLP; which function the activation is.
MADE_SO = {
    "llama3": (LLAMA, "silu"),
    "gemma": (LLAMA, "gelu by tanh"),
    "phi3": ({**LLAMA, "neurons": "mlp.activation_fn"}, "silu"),
    "gpt2": ({"heads": "attn.c_proj", "neurons": "mlp.act", "scaled": "mlp.c_proj", "hidden": "mlp"}, None),
    "pythia": (
        {"heads": "attention.dense", "neurons": "mlp.act", "scaled": "mlp.dense_4h_to_h", "hidden": "mlp"},
        None,
    ),
}


class At:
    """A place in a block of an untouched module: read at a text's last token, or scaled there."""

    def __init__(self, blocks, place, end):
        self.blocks, self.place, self.end = blocks, place, end

    def attach(self, layer, change):
        module = self.blocks[layer].get_submodule(self.place)
        if self.end == "in":
            return module.register_forward_pre_hook(lambda m, given: (change(given[0]), *given[1:]))
        return module.register_forward_hook(lambda m, given, out: change(out))


def place_of(twin, family, site, scaled=False):
    places, _ = MADE_SO[family]
    if site == "neurons":
        return At(twin.blocks, places["scaled" if scaled else "neurons"], "in" if scaled else "out")
    return At(twin.blocks, places[site], "in" if site == "heads" else "out")


def read_last(twin, tokens, at):
    rows = {}
    handles = [at.attach(i, lambda out, i=i: rows.setdefault(i, out[0, -1].clone()) is None or out) for i in range(4)]
    try:
        twin.run(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([rows[i].flatten() for i in range(4)])


@pytest.fixture(scope="module", params=MADE_SO)
def family(request):
    bridge = bridge_of(request.param)
    check_model(bridge)
    return request.param, bridge, Twin(hf_of(request.param), demo_tokenizer())


def test_sadi_chooses_and_scales_in_every_family_what_the_module_has_there(family):
    name, bridge, twin = family
    fmt, prompt = resolve_format(bridge, None), Prompt.of(bridge, "And the sea?")
    plain = twin.run(prompt.tokens).logits
    for site in ("heads", "neurons", "hidden"):
        fitted = sadi.fit(bridge, PAIRS, k=3, site=site, progress=False)
        difference = 0
        for pair in PAIRS:
            for answer, sign in ((pair.positive, 1), (pair.negative, -1)):
                tokens = encode_answer(fmt, bridge.tokenizer, pair.question, answer).tokens
                difference = difference + sign * read_last(twin, tokens, place_of(twin, name, site)).double()
        d_head = difference.shape[1] // 4
        scores = difference.unflatten(-1, (4, d_head)).mean(-1) if site == "heads" else difference
        expected = torch.zeros_like(scores)
        expected.view(-1)[scores.flatten().topk(3).indices] = 1
        expected = expected.repeat_interleave(d_head, dim=-1) if site == "heads" else expected
        kept = [i for i in range(4) if expected[i].any()]
        assert fitted.layers == tuple(kept)
        assert torch.equal(fitted.mask.double(), expected[kept])

        def scaled(out, mask):
            out = out.clone()
            out[:, -1] *= 1 + 3.0 * mask.reshape(out.shape[2:])
            return out

        at = place_of(twin, name, site, scaled=True)
        masks = zip(fitted.layers, fitted.mask, strict=True)
        handles = [at.attach(layer, partial(scaled, mask=mask)) for layer, mask in masks]
        try:
            logits = twin.run(prompt.tokens).logits
        finally:
            for handle in handles:
                handle.remove()
        assert float((logits - plain).abs().max()) > 1e-2
        with torch.no_grad(), steer(bridge, *fitted.interventions(3.0, positions="original"), prompt=prompt):
            assert_close(bridge(torch.tensor([prompt.tokens]))[0], logits, atol=3e-4, rtol=1e-4)


def test_the_activation_of_a_gate_is_told_by_numbers(family, monkeypatch):
    name, bridge, twin = family
    told = []
    activation_of = neurons.activation_of
    monkeypatch.setattr(neurons, "activation_of", lambda *given: told.append(activation_of(*given)) or told[-1])
    prompts = [Prompt.of(bridge, "Why?"), Prompt.of(bridge, "How was your day?")]
    found = neurons.read_neurons(bridge, prompts, [0, 2], batch_size=8, what="test", progress=False)
    for row, prompt in zip(found, prompts, strict=True):
        assert_close(row, read_last(twin, prompt.tokens, place_of(twin, name, "neurons"))[[0, 2]], atol=1e-4, rtol=1e-4)
    assert told == ([] if MADE_SO[name][1] is None else [MADE_SO[name][1]])


def test_a_gate_with_a_function_of_its_own_is_refused_with_the_remedy(monkeypatch):
    bridge = bridge_of("gemma")
    for block in bridge.blocks:
        monkeypatch.setattr(block.mlp.original_component.act_fn, "forward", lambda pre: torch.sin(3 * pre))
    with pytest.raises(ValueError, match=r"the gates of 'tiny/gemma' have another activation than silu, .* take site="):
        sadi.fit(bridge, PAIRS, k=3, site="neurons", progress=False)


def test_the_activations_are_told_apart():
    draw = torch.Generator().manual_seed(0)
    pre, linear = (torch.randn(200, generator=draw) for _ in range(2))
    bridge = bridge_of("gpt2")
    for name, act in neurons.ACTIVATIONS.items():
        assert neurons.activation_of(bridge, pre, linear, act(pre) * linear) == name
        if name not in ("gelu", "gelu by tanh"):  # which bfloat16 cannot tell apart, and which are then as good
            rounded = [one.bfloat16().float() for one in (pre, linear, act(pre) * linear)]
            assert neurons.activation_of(bridge, *rounded) == name


@pytest.mark.parametrize(
    "name", [one for one in (*WINDOWED, "llama3", "gpt2", "gemma") if one not in (*wrong_here(), *absent_here())]
)
def test_whole_texts_as_rows_score_as_the_module_by_itself_also_where_they_are_longer_than_a_window(name):
    bridge, twin = bridge_of(name), Twin(hf_of(name), demo_tokenizer())
    draw = torch.Generator().manual_seed(0)
    directions = {layer: 3 * torch.randn(64, generator=draw) for layer in (0, 2)}
    made = [
        (Intervention(parameters={"direction": v}, layer=layer, positions="all"),) for layer, v in directions.items()
    ]
    found = score_answers(bridge, PAIRS, [(), *made], progress=False).values
    for row, pair in enumerate(PAIRS):
        sides = []
        for answer in (pair.positive, pair.negative):
            text = twin.text(pair.question, answer)
            assert len(text.tokens) > WINDOW
            steps = [[], *[[Step(layer, v, 0)] for layer, v in directions.items()]]
            rows = []
            for one in steps:
                logp = twin.run(text.tokens, one).logits.log_softmax(-1)
                first, stop = text.read
                rows.append(float(torch.stack([logp[i - 1, text.tokens[i]] for i in range(first, stop)]).mean()))
            sides.append(rows)
        expected = [above - below for above, below in zip(*sides, strict=True)]
        assert found[row].tolist() == pytest.approx(expected, abs=1e-3)


def test_experts_have_no_neurons_of_the_block_and_other_sites_work():
    bridge = bridge_of("mixtral")
    experts = r"the MLP of layer 0 of 'tiny/mixtral' is made of experts, and its neurons are in them: take another site"
    with pytest.raises(ValueError, match=experts):
        sadi.fit(bridge, PAIRS, k=3, site="neurons", progress=False)
    wrong = Intervention(operator="scale", parameters={"factor": torch.ones(64)}, layer=0, site="mlp.hook_post")
    with pytest.raises(ValueError, match=experts):
        as_interventions(bridge, [wrong])
    for site in ("heads", "hidden"):
        assert sadi.fit(bridge, PAIRS, k=3, site=site, progress=False).mask.sum() == (48 if site == "heads" else 3)


def test_heads_of_another_make_are_refused_as_heads():
    bridge = bridge_of("deepseek3")
    with pytest.raises(ValueError, match=r"gives 64 numbers, and not those of 4 heads of 8, so which belong to a head"):
        sadi.fit(bridge, PAIRS, k=3, site="heads", progress=False)


def test_a_width_that_the_configuration_does_not_know_is_that_of_the_weights():
    bridge = bridge_of("falcon")  # whose configuration has another number in this place
    right, wrong = (
        Intervention(operator="scale", parameters={"factor": torch.ones(n)}, layer=1, site="mlp.hook_post")
        for n in (256, bridge.cfg.d_mlp)
    )
    assert len(as_interventions(bridge, [right])) == 1
    with pytest.raises(ValueError, match=r"factor has 96 numbers, but mlp.hook_post of 'tiny/falcon' has 256"):
        as_interventions(bridge, [wrong])


def test_a_block_that_does_not_come_to_a_site_is_told_where_it_is_edited_and_where_it_is_read():
    bridge = bridge_of("llama3")
    check_model(bridge)
    order = Intervention(operator="scale", parameters={"factor": torch.ones(96)}, layer=1, site="mlp.hook_post")
    tokens = torch.tensor([[1, 5, 9]])
    bridge.blocks[1].mlp.forward = torch.zeros_like
    with pytest.raises(RuntimeError, match=r"did not come to blocks\.1\.mlp\.hook_post in it, so that nothing was"):
        last_residual(bridge, tokens, edits=[order._at((0, None))])
    with pytest.raises(ValueError, match=r"ran block 1, and did not come to mlp\.hook_post in it"):
        neurons.read_last_at_sites(
            bridge, [Prompt.from_tokens([1, 5])], [1], ["mlp.hook_post"], batch_size=1, what="", progress=False
        )
    with torch.no_grad():  # and where the run ends below, nothing is missing
        assert_close(
            last_residual(bridge, tokens, edits=[order._at((0, None))], n_layers=1),
            last_residual(bridge, tokens, n_layers=1),
        )
        assert final_logits(bridge, last_residual(bridge, tokens)).isfinite().all()
