"""Every operator and every fitted method as interventions of some strength, for laws that hold for all of them."""

from functools import cache

import torch

from caa_lens.engine.operators import OPERATORS
from caa_lens.methods import actadd, activation_scaling, bipo, inferaligner, instruction, linear_act, sadi
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.steering.interventions import Gate, Intervention
from helpers.family import intervention_of, parameters_of
from helpers.methods import PAIRS

QUIET = {"progress": False}
COOKING = ["How long do eggs boil?", "What goes into a soup?", "How is bread baked?", "Which pan is best for fish?"]
CODE = ["What is a loop?", "How do I sort a list?", "Why is my program slow?", "What does git do?"]
PROMPTS = ["And the sea?", "How was your long day at work, and what comes next?", "Why?"]


def squash(stream, parameters, strength):
    """A user's own plain function."""
    return stream + strength * torch.tanh(stream * parameters["direction"])


def _by_operator(model, operator):
    """At two layers and everywhere: what comes later builds on what was changed before."""
    parameters = parameters_of(32, scale=2.0)

    def made(strength):
        return tuple(
            intervention_of(operator, parameters[operator], layer, strength, positions=positions)
            for layer, positions in ((1, "all"), (3, "caa"))
        )

    return made


def _at_sites(model):
    widths = {"attn.hook_z": 32, "hook_attn_out": 32, "mlp.hook_post": 48, "hook_mlp_out": 32}

    def made(strength):
        return tuple(
            Intervention(
                operator="scale",
                parameters={"factor": torch.linspace(-1, 2, width)},
                layer=2,
                site=site,
                multiplier=strength,
                positions="after_first",
            )
            for site, width in widths.items()
        )

    return made


def _function(model):
    vector = {"direction": torch.linspace(-2, 2, 32)}
    return lambda strength: (
        Intervention(operator=squash, parameters=vector, layer=2, multiplier=strength, positions="prompt"),
    )


def _of(fitted, **said):
    return lambda strength: fitted.interventions(strength, **said)


def _scaling(model):
    """Numbers for the positions from the instruction's end to the prompt's, of which every prompt has as many."""
    questions = [(Prompt.of(model, f"Is it {word}?"), 10, 20) for word in ("one", "two", "six")]
    fitted = activation_scaling.fit(model, questions, layers=[1, 2], positions="caa", epochs=3, **QUIET)
    return _of(fitted, positions="caa")


def _forced(model):
    """A gate that one prompt opens."""
    (prompt,) = [Prompt.of(model, PROMPTS[1])]
    kept = []
    with torch.no_grad():
        model.run_with_hooks(
            torch.tensor([prompt.tokens]), fwd_hooks=[("blocks.1.hook_resid_post", lambda r, hook: kept.append(r))]
        )
    state = kept[0][0, -1]
    gate = Gate(direction=state, bias=-0.999 * float(state @ state), layer=1)
    vector = {"direction": 3 * torch.linspace(-1, 1, 32)}
    return lambda strength: (Intervention(parameters=vector, layer=3, multiplier=strength, gate=gate, positions="all"),)


MAKERS = {
    **{operator: (lambda model, operator=operator: _by_operator(model, operator)) for operator in OPERATORS},
    "at sites": _at_sites,
    "a function": _function,
    "ActAdd": lambda model: _of(
        actadd.fit(model, "I love this", "I hate all", layers=[1], **QUIET), positions="original"
    ),
    "ActAdd everywhere": lambda model: _of(actadd.fit(model, "I love this", "I hate all", layers=[1, 3], **QUIET)),
    "Linear-AcT": lambda model: _of(linear_act.fit(model, PAIRS, layers=[1, 3], **QUIET), positions="original"),
    "Linear-AcT, support": lambda model: _of(linear_act.fit(model, PAIRS, layers=[2], support=True, **QUIET)),
    "Linear-AcT, attention": lambda model: _of(
        linear_act.fit(model, PAIRS, layers=[1, 2], site="hook_attn_out", **QUIET), positions="original"
    ),
    "Mean-AcT": lambda model: _of(linear_act.fit(model, PAIRS, layers=[2], kind="mean", **QUIET)),
    "Gaussian-AcT": lambda model: _of(linear_act.fit(model, PAIRS, layers=[2], kind="gaussian", **QUIET)),
    **{
        f"SADI, {site}": lambda model, site=site, at=at: _of(
            sadi.fit(model, PAIRS, k=4, site=site, **QUIET), positions=at
        )
        for site, at in (("heads", "last"), ("neurons", "caa"), ("hidden", "original"), ("stream", "caa"))
    },
    "instruction": lambda model: _of(instruction.fit(model, PAIRS, layers=[2], **QUIET), positions="original"),
    "instruction, added": lambda model: _of(
        instruction.fit(model, CODE, instruction="Be brief.", layers=[2], **QUIET), how="add"
    ),
    "activation scaling": _scaling,
    "BiPO": lambda model: _of(
        bipo.fit(model, PAIRS, layer=2, epochs=1, learning_rate=0.05, **QUIET), positions="original"
    ),
    "InferAligner": lambda model: _of(
        inferaligner.fit(model, (COOKING, CODE), layers=[2, 4], **QUIET), positions="original"
    ),
    "InferAligner, open": lambda model: _of(
        inferaligner.fit(model, (COOKING, CODE), layers=[2, 4], **QUIET), gated=False
    ),
    "a gate": _forced,
}
"""By name: of a small chat model a function that makes interventions of a strength."""


@cache
def made(model, name):
    """The function of a case, its method fitted once a model."""
    return MAKERS[name](model)
