"""Blocks that are open at once, of one thread or of several, and blocks around compiled code."""

import asyncio
import copy
import gc
import threading

import pytest
import torch
from helpers.models import random_vectors
from helpers.models import tiny_model as make_tiny_model
from helpers.steering import LOGITS, Kept
from helpers.steering import logits_of as logits_of_tokens

from caa_lens.engine.activations import read_residuals
from caa_lens.models.checks import check_model
from caa_lens.steering import open_blocks
from caa_lens.steering.generation import generate
from caa_lens.steering.steered_block import OverlappingBlocksWarning, steer

TOKENS = torch.arange(14).reshape(2, 7)


def logits_of(model, *hooks):
    return logits_of_tokens(model, TOKENS, hooks)


def is_close(one, other):
    return torch.allclose(one, other, **LOGITS)


@pytest.fixture(autouse=True)
def nothing_is_left_open():
    yield
    assert open_blocks._BLOCKS == open_blocks._STANCE == []
    assert torch._dynamo.eval_frame._stance.stance == "default"


# ---- at once ----------------------------------------------------------------------------------------------------


def in_a_thread(work):
    """What it returned, or the error that it raised."""
    found = []

    def run():
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, name="second")
    thread.start()
    thread.join()
    return found[0]


def test_a_second_threads_block_on_the_same_model_is_refused_and_the_first_goes_on(tiny, tiny_model):
    v, w = random_vectors(tiny)[2], random_vectors(tiny, seed=1)[2]
    steered = logits_of(tiny, v.hook(start=0))

    def block(model):
        with steer(model, w, start=0):
            return logits_of(model)

    with steer(tiny, v, start=0):
        refused = in_a_thread(lambda: block(tiny))
        assert isinstance(refused, RuntimeError)
        assert "thread 'MainThread' has a steered block open on this model" in str(refused)
        assert torch.equal(logits_of(tiny), steered)
        assert torch.equal(in_a_thread(lambda: logits_of(tiny)), steered)  # a run without a block is steered
        other = tiny_model(seed=3)
        expected = logits_of(other, w.hook(start=0))
        assert torch.equal(in_a_thread(lambda: block(other)), expected)  # another model is free
    assert torch.equal(in_a_thread(lambda: block(tiny)), logits_of(tiny, w.hook(start=0)))  # and so is this one now


def test_runs_of_two_threads_in_one_block_know_their_own_positions(tiny):
    """One forward waits between a block's pattern and its stream, while another thread runs a text of its own."""
    v, found, kept = random_vectors(tiny)[2], [], Kept(tiny, 2)

    def run_another(activation, hook):
        if not found:
            found.append(None)
            found.append(in_a_thread(lambda: kept(TOKENS[:, :1])))

    with torch.no_grad(), steer(tiny, v, start=3):
        expected = logits_of(tiny)
        kept(TOKENS)
        assert torch.equal(logits_of(tiny, ("blocks.2.hook_mlp_out", run_another)), expected)
    assert isinstance(found[1], torch.Tensor)


def test_two_tasks_of_one_loop_are_refused_like_two_threads(tiny):
    v = random_vectors(tiny)[2]
    steered = logits_of(tiny, v.hook(start=0))

    async def block():
        with steer(tiny, v, start=0):
            await asyncio.sleep(0)
            return logits_of(tiny)

    async def both():
        return await asyncio.gather(block(), block(), return_exceptions=True)

    first, second = asyncio.run(both())
    assert torch.equal(first, steered)
    with pytest.raises(RuntimeError, match="another task has a steered block open"):
        raise second
    assert torch.equal(asyncio.run(block()), steered)
    with steer(tiny, v, start=0):  # a block around the loop is one inside the other
        assert is_close(asyncio.run(block()), logits_of(tiny, v.hook(start=0)))


def test_blocks_that_end_out_of_order_take_away_their_own_hooks_only(tiny):
    v, w = random_vectors(tiny)[2], random_vectors(tiny, seed=1)[2]
    first, second = steer(tiny, v, start=0), steer(tiny, w, start=0)
    plain, with_w = logits_of(tiny), logits_of(tiny, w.hook(start=0))
    with tiny.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda resid, hook: None)]):
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)  # nothing ran while both were open
        point = tiny.hook_dict["blocks.2.hook_resid_post"]
        assert [one.hook.id for one in point.fwd_hooks] == list(point._forward_hooks)  # the second's alone
        assert torch.equal(logits_of(tiny), with_w)
    assert torch.equal(logits_of(tiny), with_w)
    second.__exit__(None, None, None)
    assert torch.equal(logits_of(tiny), plain)


def test_generators_that_steer_in_turn_are_told_of(tiny):
    vectors = random_vectors(tiny)[2], random_vectors(tiny, seed=1)[2]

    def steered(vector):
        with steer(tiny, vector, start=0):
            for _ in range(2):
                yield logits_of(tiny)

    with pytest.warns(OverlappingBlocksWarning, match="what ran since then had the vectors of both"):
        list(zip(*map(steered, vectors), strict=False))
    gc.collect()
    for alone, vector in zip(map(list, map(steered, vectors)), vectors, strict=True):  # one after another: no word
        assert torch.equal(alone[1], logits_of(tiny, vector.hook(start=0)))


def test_a_copy_made_inside_a_block_is_steered_until_the_block_ends(tiny):
    v = random_vectors(tiny)[2]
    plain, steered = logits_of(tiny), logits_of(tiny, v.hook(start=0))
    with steer(tiny, v, start=0):
        copied = copy.deepcopy(tiny)
        assert torch.equal(logits_of(copied), steered)
        assert torch.equal(logits_of(tiny), steered)
    assert torch.equal(logits_of(copied), plain)
    with steer(copied, v, start=0):
        assert torch.equal(logits_of(copied), steered)


def test_a_model_may_change_its_dtype_inside_a_block(tiny):
    v = random_vectors(tiny)[2]
    with torch.no_grad(), steer(tiny, v, start=0):
        tiny.to(torch.bfloat16)
        half = tiny(TOKENS)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, logits_of(tiny, v.hook(start=0)))


@pytest.mark.bridge
def test_a_hook_point_of_a_bridge_that_another_module_took_is_named():
    model = make_tiny_model(kind="bridge")
    model.blocks[2].hook_out = torch.nn.Identity()
    expected = "Identity stands in the place of blocks.2.hook_out, so that nothing can be steered at layer 2"
    with pytest.raises(ValueError, match=expected), steer(model, random_vectors(model)[2], start=0):
        pass


@pytest.mark.hooked
def test_a_hook_point_that_another_module_took_is_named(tiny):
    v = random_vectors(tiny)[2]
    tiny.blocks[2].hook_resid_post = torch.nn.Identity()
    tiny.setup()
    expected = "Identity stands in the place of blocks.2.hook_resid_post, so that nothing can be steered at layer 2"
    with pytest.raises(ValueError, match=expected), steer(tiny, v, start=0):
        pass
    with pytest.raises(ValueError, match=r"the model has no hook point 'blocks.2.hook_resid_post': if another module"):
        tiny.run_with_hooks(TOKENS, fwd_hooks=[v.hook(start=0)])


# ---- compiled code ----------------------------------------------------------------------------------------------


def compile_in_place(module, backend):
    module.compile(backend=backend)
    return module


def compile_block(model, backend):
    model.blocks[0].compile(backend=backend)
    return model


def wrap_block(model, backend):
    model.blocks[0] = torch.compile(model.blocks[0], backend=backend)
    return model


def compile_forward(model, backend):
    model.forward = torch.compile(model.forward, backend=backend)
    return model


WAYS = {
    "wrapped": lambda model, backend: torch.compile(model, backend=backend),
    "in place": compile_in_place,
    "a block": compile_block,
    "a wrapped block": wrap_block,
    "forward": compile_forward,
    "a function": lambda model, backend: torch.compile(lambda tokens: model(tokens), backend=backend),
}
AOT = [("wrapped", "aot_eager"), ("a block", "aot_eager")]


@pytest.fixture
def small(tiny_model):
    torch._dynamo.reset()
    yield tiny_model(n_layers=1)
    torch._dynamo.reset()


# Of a bridge, the compiler says that it goes around what counts the tokens behind a run.
AROUND = pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin:UserWarning")


# Compiling takes a second or more a time; the second backend is another one for the whole model and for a part of it.
@pytest.mark.hooked
@pytest.mark.parametrize(("way", "backend"), [*((way, "eager") for way in WAYS), *AOT])
def test_compiled_code_is_steered_inside_the_block_and_plain_after_it(small, way, backend):
    assert_steered_inside_only(small, way, backend)
    if way == "a block":  # what the block saves from: TransformerLens' own hooks are dropped
        v = random_vectors(small)[0]
        with torch.no_grad():
            assert is_close(logits_of(small, v.hook(start=0)), logits_of(small))


@AROUND
@pytest.mark.bridge
@pytest.mark.parametrize(("way", "backend"), [("wrapped", "eager"), ("a block", "aot_eager")])
def test_compiled_code_of_a_bridge_is_steered_inside_the_block_and_plain_after_it(way, backend):
    torch._dynamo.reset()
    assert_steered_inside_only(make_tiny_model(kind="bridge", n_layers=1), way, backend)
    torch._dynamo.reset()


def assert_steered_inside_only(small, way, backend):
    v = random_vectors(small)[0]
    plain, steered = logits_of(small), logits_of(small, v.hook(start=0))
    with torch.no_grad():
        compiled = WAYS[way](small, backend)
        assert is_close(compiled(TOKENS), plain)  # compiled before there are hooks
        for _ in range(2):
            with steer(small, v, start=0):
                assert is_close(compiled(TOKENS), steered)
            assert is_close(compiled(TOKENS), plain)


@pytest.mark.hooked
def test_what_is_compiled_inside_a_block_does_not_keep_its_hooks(small):
    v = random_vectors(small)[0]
    plain, steered = logits_of(small), logits_of(small, v.hook(start=0))
    with torch.no_grad():
        with steer(small, v, start=0):
            compiled = torch.compile(small, backend="eager")
            assert is_close(compiled(TOKENS), steered)
        assert is_close(compiled(TOKENS), plain)
        with steer(compiled, v, start=0) as itself:  # the compiled model itself is steered too
            assert itself is compiled
            assert is_close(compiled(TOKENS), steered)


@pytest.mark.filterwarnings("ignore")  # the compiler tells of what it cannot compile of the tests' own type checks
def test_a_block_inside_a_compiled_function_is_refused(small):
    block = steer(small, random_vectors(small)[0], start=0)

    @torch.compile(backend="eager")
    def run(tokens):
        with block:
            return small(tokens)

    with torch.no_grad(), pytest.raises(RuntimeError, match="cannot be opened inside a function that"):
        run(TOKENS)


def test_the_compiler_is_as_it_was_also_when_blocks_end_out_of_order(tiny, tiny_model):
    other, stance = tiny_model(seed=1), torch._dynamo.eval_frame
    first, second = steer(tiny, random_vectors(tiny)[2], start=0), steer(other, random_vectors(other)[2], start=0)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert stance._stance.stance == "force_eager"  # the second is still open
    second.__exit__(None, None, None)
    assert stance._stance.stance == "default"


@pytest.mark.parametrize("way", [way for way in WAYS if way != "a function"])
def test_everything_else_refuses_a_compiled_model_by_name(small, way):
    compiled = WAYS[way](small, "eager")
    name = "module 'blocks.0' of the model" if "block" in way else "the model"
    expected = f"{name} is compiled, and torch.compile drops hooks without a word: "
    with pytest.raises(ValueError, match=expected):
        check_model(compiled)
    with pytest.raises(ValueError, match=expected):
        generate(compiled, "Why?", max_new_tokens=1)
    with pytest.raises(ValueError, match=expected):
        next(read_residuals(compiled, []))
    if way == "in place":
        small._compiled_call_impl = None  # the remedy
        check_model(small)
