"""What methods refuse: parameters at another place, positions that they cannot have, fits that diverge or break off."""

from dataclasses import replace

import pytest
import torch
from helpers.methods import PAIRS
from helpers.steered_cases import CODE, COOKING, made
from helpers.steering import hook_counts, logits_of

from caa_lens.measures.answers import score_answers
from caa_lens.measures.sweeps import sweep
from caa_lens.methods import actadd, activation_scaling, bipo, inferaligner, instruction, linear_act, sadi
from caa_lens.methods.fitted import load_fitted
from caa_lens.models.adapters.choice import adapter_of
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.steering.generation import generate
from caa_lens.steering.interventions import as_interventions
from caa_lens.steering.steered_block import steer

pytestmark = [
    pytest.mark.filterwarnings("ignore::caa_lens.engine.shared_prefix.SharedPrefixWarning"),
    pytest.mark.filterwarnings("ignore::caa_lens.measures.training_pairs.TrainingPairsWarning"),
]
QUIET = {"progress": False}
QUESTIONS = [(Prompt.from_tokens([1, *row], start=3), 10, 20) for row in ([5, 6, 7, 8], [9, 4, 3, 2], [7, 7, 5, 4])]
FITS = {
    "ActAdd": lambda model: actadd.fit(model, "I love this", "I hate all", layers=[1, 3]),
    "Linear-AcT": lambda model: linear_act.fit(model, PAIRS, layers=[1, 3], **QUIET),
    "Linear-AcT, MLP": lambda model: linear_act.fit(model, PAIRS, layers=[1, 3], site="hook_mlp_out", **QUIET),
    "SADI": lambda model: sadi.fit(model, PAIRS, k=12, site="hidden", **QUIET),
    "SADI, neurons": lambda model: sadi.fit(model, PAIRS, k=12, site="neurons", **QUIET),
    "instruction": lambda model: instruction.fit(model, PAIRS, layers=[1, 3], **QUIET),
    "activation scaling": lambda model: activation_scaling.fit(model, QUESTIONS, layers=[1, 3], epochs=2, **QUIET),
    "BiPO": lambda model: bipo.fit(model, PAIRS, layer=1, epochs=2, **QUIET),
    "InferAligner": lambda model: inferaligner.fit(model, (COOKING, CODE), layers=[1, 3], **QUIET),
}
every_method = pytest.mark.parametrize("method", FITS)


@every_method
def test_parameters_at_another_layer_or_site_or_in_another_model_are_refused_wherever_they_are_used(tiny_chat, method):
    fitted = FITS[method](tiny_chat)
    (one, *_) = fitted.interventions(1.0, positions="original")
    assert as_interventions(tiny_chat, [one])
    if method == "BiPO":  # a vector, which may be carried anywhere by `at_layer`, and says so
        with pytest.raises(ValueError, match=r"take vector\.at_layer\(4\)"):
            replace(one, layer=4)
    else:
        other = (one.layer + 1) % 5
        elsewhere = replace(one, layer=other)
        message = rf"were fitted at layer {one.layer}.*, and are to act at layer {other}.*: fit them there"
        uses = (
            lambda: steer(tiny_chat, elsewhere, prompt=Prompt.of(tiny_chat, "Why?")),
            lambda: generate(tiny_chat, "Why?", [elsewhere], max_new_tokens=1),
            lambda: score_answers(tiny_chat, PAIRS, [(elsewhere,)], progress=False),
        )
        for use in uses:
            with pytest.raises(ValueError, match=message):
                use()
        site = "hook_mlp_out" if one.site != "hook_mlp_out" else "hook_attn_out"
        with pytest.raises(ValueError, match=rf"and are to act at layer {one.layer}, {site}|it at this site|lives at"):
            as_interventions(tiny_chat, [replace(one, site=site)])
    with pytest.raises(IndexError, match=r"was not fitted at layer 9: it has layers .* fit it there"):
        fitted.at([9])
    other = replace(fitted, provenance=replace(fitted.provenance, model="someone/else"))
    orders = list(other.interventions(1.0, positions="original"))
    if method == "BiPO":  # vectors are carried between models that share a stream, as its paper does
        assert as_interventions(tiny_chat, orders)
        return
    with pytest.raises(ValueError, match=r"were fitted on 'someone/else', and this model is .*: fit them on this one"):
        as_interventions(tiny_chat, orders)


@every_method
def test_positions_that_a_method_cannot_have_are_refused_with_what_it_can(tiny_chat, method):
    fitted = FITS[method](tiny_chat)
    with pytest.raises(ValueError, match=r"unknown positions 'end': expected one of original, caa, all"):
        fitted.interventions(positions="end")
    if method != "ActAdd":
        with pytest.raises(ValueError, match=r"cannot act at positions='front': "):
            fitted.interventions(positions="front")
    for name in ("caa", "all", "after_first", "prompt", "answer", "last", (2, 5)):
        try:
            orders = fitted.interventions(positions=name)
        except ValueError as error:
            assert "cannot act at" in str(error)  # noqa: PT017
            assert "take" in str(error)  # noqa: PT017
            continue
        assert all(one.positions == name for one in orders)


def test_a_training_that_leaves_the_numbers_is_refused_with_the_remedy(tiny_chat):
    for rate in (300.0, 1e30):
        with pytest.raises(ValueError, match=r"training diverged: a number is .* after step 1, beyond 100 times"):
            activation_scaling.fit(tiny_chat, QUESTIONS, layers=[1], epochs=9, learning_rate=rate, **QUIET)
    with pytest.raises(ValueError, match=r"training diverged: the vector's norm is .* Use a smaller learning_rate"):
        bipo.fit(tiny_chat, PAIRS, layer=2, epochs=3, learning_rate=1e30, **QUIET)


@every_method
def test_streams_that_are_not_finite_are_refused(tiny_model, demo_tokenizer, method):
    model = tiny_model(d_vocab=len(demo_tokenizer), n_ctx=512, tokenizer=demo_tokenizer)
    for parameter in model.blocks[0].mlp.parameters():
        parameter.data[:] = torch.nan
    with pytest.raises(
        ValueError, match="activations of tiny-random-llama are not finite in float32: load the model in"
    ):
        FITS[method](model)


# ---- what breaks off -------------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("after", [0, 3])
def test_an_interrupted_fit_leaves_no_file_no_hook_and_the_model_as_it_was(
    tiny_chat, tmp_path, monkeypatch, method, after
):
    tokens = [[1, 5, 9, 30]]
    before, counts = logits_of(tiny_chat, tokens), hook_counts(tiny_chat)
    asked = [one.requires_grad for one in tiny_chat.parameters()]
    adapter, calls = type(adapter_of(tiny_chat)), []
    linear_act.fit(tiny_chat, PAIRS[:2], layers=[1], **QUIET)  # what is found out once about a model, is

    def breaking(name):
        run = getattr(adapter, name)

        def runs(*given, **said):
            calls.append(name)
            if len(calls) > after:
                raise KeyboardInterrupt
            return run(*given, **said)

        monkeypatch.setattr(adapter, name, runs)

    for name in ("run", "run_on"):
        breaking(name)
    path = tmp_path / "fitted.safetensors"
    try:
        FITS[method](tiny_chat).save(path)
        broke_off = False
    except KeyboardInterrupt:
        broke_off = True
    monkeypatch.undo()
    assert broke_off or after
    assert path.exists() != broke_off
    if broke_off:
        assert list(tmp_path.iterdir()) == []
    assert hook_counts(tiny_chat) == counts
    assert [one.requires_grad for one in tiny_chat.parameters()] == asked
    assert torch.equal(logits_of(tiny_chat, tokens), before)


@every_method
def test_an_interrupted_save_leaves_the_old_file_and_no_other(tiny_chat, tmp_path, monkeypatch, method):
    from caa_lens import atomic_files

    fitted = FITS[method](tiny_chat)
    path = fitted.save(tmp_path / "fitted.safetensors")
    before = path.read_bytes()

    def interrupted(file):
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic_files, "_to_disk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fitted.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    again = load_fitted(path)
    assert type(again) is type(fitted)
    for one, other in zip(*(x.interventions(0.7, positions="original") for x in (fitted, again)), strict=True):
        assert (one.layer, one.site, one.positions, one.operator) == (
            other.layer,
            other.site,
            other.positions,
            other.operator,
        )
        assert all(torch.equal(one.parameters[name], other.parameters[name]) for name in one.parameters)


# ---- and what runs in a sweep ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ActAdd", "SADI", "SADI, neurons", "instruction", "BiPO", "InferAligner"])
def test_every_method_is_swept_and_a_column_says_where_it_acts(tiny_chat, method):
    fitted = FITS[method](tiny_chat)
    layers = fitted.layers[:2]
    for positions in ("caa", "original"):
        result = sweep(
            tiny_chat,
            PAIRS,
            fitted.at(layers),
            multipliers=[-1, 0.5],
            positions=positions,
            progress=False,
        )
        assert set(result.frame["positions"]) == {positions}
        for (layer, m), some in result.frame.groupby(["layer", "multiplier"]):
            order = fitted.at([layer]).interventions(m, positions=positions)
            expected = score_answers(tiny_chat, PAIRS, [order], progress=False).values[:, 0]
            found = torch.tensor(some.sort_values("question")["margin"].to_numpy())
            torch.testing.assert_close(found.float(), expected, atol=3e-5, rtol=1e-4)


def test_a_map_that_was_fitted_behind_another_is_not_swept_alone(tiny_chat):
    fitted = FITS["Linear-AcT"](tiny_chat)
    with pytest.raises(ValueError, match=r"the map of layer 3 was fitted behind those of layers \[1\]: take these too"):
        sweep(tiny_chat, PAIRS, fitted, multipliers=[1], progress=False)
    assert made(tiny_chat, "Linear-AcT")(1.0)
