"""The response of the last block's output to a push, against torch's own derivative of a plain forward."""

import pytest
import torch
from helpers.models import random_llama, random_vectors, tiny_model
from torch.testing import assert_close

from caa_lens.engine import stream_responses
from caa_lens.engine.shared_prefix import SharedPrefixWarning
from caa_lens.engine.stream_responses import NoDerivativeError, ReadPrompt, derivative_method, responses
from caa_lens.prompts.prompt_formats import Prompt

PROMPTS = [
    ReadPrompt(prompt=Prompt.from_tokens(range(3, 15), start=8), first=9, stop=12),
    ReadPrompt(prompt=Prompt.from_tokens([7, 50, 3, 9], start=3), first=3, stop=4),
    ReadPrompt(prompt=Prompt.from_tokens([5, 6, 9, 1, 30, 2], start=0), first=2, stop=5),
]
LAYERS = (0, 2, 4)


def some_steps(model, layers=LAYERS, n=2):
    return random_vectors(model, layers=range(len(layers) * n)).directions.reshape(len(layers), n, -1)


def found(model, steps, layers=LAYERS, **options):
    """`[prompt][step]` of every response, whatever order they came in."""
    options = {"to_first_order": True, "progress": False} | options
    table = [[None] * (steps.shape[0] * steps.shape[1]) for _ in PROMPTS]
    for one in responses(model, PROMPTS, steps, layers, **options):
        for i, after in zip(one.steps.tolist(), one.after, strict=True):
            assert table[one.prompt][i] is None, "a step came twice"
            table[one.prompt][i] = after
    return table


def stream_behind(model, tokens, layer, start, push):
    """The last block's output of a plain forward, with `push` added to a layer's output by hand."""
    resid = model.embed(torch.tensor([tokens]))
    for i, block in enumerate(model.blocks):
        resid = block(resid)
        if i == layer:
            steered = (torch.arange(len(tokens)) >= start)[None, :, None]
            resid = resid + steered * push
    return resid[0]


def expected(model, one, layer, step):
    def run(push):
        return stream_behind(model, one.prompt.tokens, layer, one.prompt.steer_start, push)[one.first : one.stop]

    return torch.func.jvp(run, (torch.zeros_like(step),), (step,))[1].detach()


def assert_exact(table, twin, steps, layers=LAYERS, tolerance=1e-4):
    for one, row in zip(PROMPTS, table, strict=True):
        for i, after in enumerate(row):
            layer, step = layers[i // steps.shape[1]], steps.flatten(0, 1)[i]
            told = expected(twin, one, layer, step)
            assert_close(after.to(told), told, atol=tolerance * float(told.norm()), rtol=0)


@pytest.mark.parametrize("max_tokens", [None, 8])
def test_the_response_is_the_derivative_of_a_plain_forward_at_the_first_the_middle_and_the_last_layer(max_tokens):
    model = tiny_model()
    steps = some_steps(model)
    table = found(model, steps, max_tokens=max_tokens)
    assert derivative_method(model) == "forward mode"
    assert_exact(table, tiny_model(), steps)


def test_the_response_is_the_same_with_the_callers_own_hooks_where_whole_prompts_are_run():
    model = tiny_model()
    steps, plain = some_steps(model), found(tiny_model(), some_steps(tiny_model()))
    heard = []
    model.blocks[1].hook_resid_post.add_hook(lambda resid, hook: heard.append(1))
    with pytest.warns(SharedPrefixWarning):
        table = found(model, steps)
    assert heard
    for one, other in zip(table, plain, strict=True):
        for a, b in zip(one, other, strict=True):
            assert_close(a, b, atol=1e-4 * float(b.norm()), rtol=0)


def test_central_differences_agree_with_the_derivative(monkeypatch):
    model = tiny_model()
    steps = some_steps(model)
    monkeypatch.setattr(stream_responses, "derivative_method", lambda model: "central difference")
    assert_exact(found(model, steps), tiny_model(), steps, tolerance=3e-3)
    double = tiny_model(dtype=torch.float64)
    twin = tiny_model(dtype=torch.float64)
    assert_exact(found(double, steps), twin, steps.double(), tolerance=1e-5)  # steps are kept in float32


def test_a_finite_response_is_that_of_a_plain_forward():
    model = tiny_model()
    steps = some_steps(model)
    for one, row in zip(PROMPTS, found(model, steps, to_first_order=False), strict=True):
        for i, after in enumerate(row):
            push = steps.flatten(0, 1)[i]
            with torch.no_grad():
                told = stream_behind(model, one.prompt.tokens, LAYERS[i // 2], one.prompt.steer_start, push)
            assert_close(after, told[one.first : one.stop], atol=2e-5, rtol=1e-5)


def test_a_bridge_gives_the_same_derivative_as_the_module_of_hugging_face(tmp_path):
    from caa_lens.models.loading.load import load_model

    hf = random_llama(tmp_path)
    bridge = load_model(tmp_path, backend="bridge")
    layers = (0, 1, 2)
    steps = some_steps(bridge, layers)
    assert derivative_method(bridge) == "forward mode"
    for one, row in zip(PROMPTS, found(bridge, steps, layers), strict=True):
        for i, after in enumerate(row):
            layer, step = layers[i // 2], steps.flatten(0, 1)[i].double()

            def run(e, layer=layer, step=step, one=one):
                def add(module, given, out):
                    pushed = (out[0] if isinstance(out, tuple) else out).clone()
                    pushed[:, one.prompt.steer_start :] += e * step
                    return (pushed, *out[1:]) if isinstance(out, tuple) else pushed

                kept = []
                handles = [
                    hf.model.layers[layer].register_forward_hook(add),
                    hf.model.layers[-1].register_forward_hook(lambda m, g, out: kept.append(out)),
                ]
                with torch.no_grad():
                    hf(torch.tensor([one.prompt.tokens]))
                for handle in handles:
                    handle.remove()
                out = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
                return out.reshape(-1, out.shape[-1])[one.first : one.stop]

            hf.double()
            slope = (run(5e-3) - run(-5e-3)) / 1e-2  # its norms compute in float32 whatever the type
            assert_close(after.double(), slope, atol=2e-3 * float(slope.norm()), rtol=0)


class _NoForwardMode(torch.autograd.Function):
    """What a quantised layer is to torch: a product without a forward mode."""

    @staticmethod
    def forward(ctx, x, coarse):
        return (x / coarse).round() * coarse if coarse else x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


def with_a_custom_function(model, coarse=0.0):
    model.blocks[1].hook_resid_post.add_hook(lambda resid, hook: _NoForwardMode.apply(resid, coarse))
    return model


def test_what_has_no_forward_mode_is_differentiated_by_differences():
    model = with_a_custom_function(tiny_model())
    steps = some_steps(model)
    assert derivative_method(model) == "central difference"
    with pytest.warns(SharedPrefixWarning):
        assert_exact(found(model, steps), tiny_model(), steps, tolerance=3e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_differences_in_half_precision_are_refused_with_the_reading_to_use(dtype):
    model = with_a_custom_function(tiny_model(dtype=dtype))
    with pytest.raises(NoDerivativeError, match=r"would drown in rounding.*reading='effect'"):
        next(responses(model, PROMPTS, some_steps(model), LAYERS, to_first_order=True, progress=False))


def test_rounded_activations_are_refused():
    model = with_a_custom_function(tiny_model(), coarse=0.2)
    with pytest.raises(NoDerivativeError, match="rounds its activations"):
        derivative_method(model)


def test_an_operation_that_drops_tangents_is_noticed():
    model = tiny_model()
    model.blocks[1].hook_attn_out.add_hook(lambda out, hook: torch.tensor(out.detach().numpy()))
    assert derivative_method(model) == "central difference"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tangents_in_half_precision_are_those_of_float32_but_for_rounding(dtype):
    model = tiny_model(dtype=dtype)
    wide = tiny_model(dtype=dtype).to(torch.float32)
    steps = some_steps(model)
    for one, other in zip(found(model, steps), found(wide, steps), strict=True):
        for a, b in zip(one, other, strict=True):
            assert float((a - b).norm()) <= 0.1 * float(b.norm())


def test_it_works_inside_inference_mode_and_leaves_no_level_of_forward_mode_open():
    model = tiny_model()
    with torch.inference_mode():
        table = found(model, some_steps(model))
    assert table[0][0].norm() > 0
    steps = responses(model, PROMPTS, some_steps(model), LAYERS, to_first_order=True, max_tokens=1, progress=False)
    next(steps)
    steps.close()
    with torch.autograd.forward_ad.dual_level():
        pass
