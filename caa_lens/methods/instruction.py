"""Instruction steering: what an instruction in words does to the stream, done without the words.

    u    = mean(h with the instruction - h without it) / its norm          at the prompt's last token
    z+   = mean(h . u) over the prompts with the instruction               z- likewise without
    pull   h' = h + strength (z - h . u) u        the component along u goes to its value under the instruction
    add    h' = h + strength u                    for lengths and words, where setting works worse

The value z is z+, or where `overshoot` says so beyond it: z- + (1 + overshoot)(z+ - z-).

Source: arXiv 2410.12877 and its authors' code, which reads `resid_post` at the last token of the chat prompt. In place
of prompts with and without an instruction, the two answers of contrast pairs will do, read as `extract` reads them.
"""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.arguments import as_float, check_count, describe
from caa_lens.contrast.messages import Asked, as_question, followed_by, plain_data
from caa_lens.contrast.sets import ContrastSet
from caa_lens.engine.positions import Positions
from caa_lens.methods.data import check_finite_streams, hash_of, two_sets
from caa_lens.methods.fitted import Fitted
from caa_lens.methods.reading import read_all
from caa_lens.models.checks import check_layers, check_model
from caa_lens.models.placement import dtype_name
from caa_lens.prompts.checks import is_question
from caa_lens.prompts.prompt_formats import PromptFormat, resolve_format
from caa_lens.provenance import Provenance
from caa_lens.steering.interventions import Intervention

HOW = ("pull", "add")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Instruction(Fitted):
    """A unit direction a layer, and where prompts with and without the instruction lie along it.

    Attributes:
        direction: u, of unit length.
        with_it: z+, in units of the stream.
        without_it: z-.
    """

    direction: Float[Tensor, "layer d_model"]
    with_it: Float[Tensor, " layer"]
    without_it: Float[Tensor, " layer"]

    def interventions(
        self,
        strength: float | int = 1.0,
        *,
        positions: str | Positions = "caa",
        how: str = "pull",
        overshoot: float | int = 0.0,
    ) -> tuple[Intervention, ...]:
        """What is done at each of its layers; the original acts at every token, and at one layer.

        Args:
            strength: for "pull" the share of the way to z, for "add" the weight in units of the stream.
            how: "pull" or "add".
            overshoot: how far behind z+ the goal lies, as a share of z+ - z-.
        """
        strength, overshoot = as_float("strength", strength), as_float("overshoot", overshoot)
        if how not in HOW:
            raise ValueError(f"unknown how={how!r}: expected one of {', '.join(HOW)}")
        if how == "add" and overshoot:
            raise ValueError("overshoot is of how='pull'; for how='add' give a larger strength")
        goal = self.without_it + (1 + overshoot) * (self.with_it - self.without_it)
        where = self._place(positions, original="all")
        return tuple(
            Intervention(
                operator=how,
                parameters={"direction": self.direction[row], **({"target": goal[row]} if how == "pull" else {})},
                layer=layer,
                multiplier=strength,
                positions=where,
                provenance=self._fitted_at(layer),
            )
            for row, layer in enumerate(self.layers)
        )

    def _in_words(self) -> str:
        if len(self.layers) > 1:
            return ""
        return f"{float(self.without_it[0]):.3g} -> {float(self.with_it[0]):.3g}, "


def fit_direction(
    with_it: Float[Tensor, "prompt d_model"], without_it: Float[Tensor, "other d_model"]
) -> tuple[Float[Tensor, " d_model"], float, float]:
    """u, z+ and z-, in float64; see the module.

    Raises:
        ValueError: if the means do not differ, so that there is no direction.
    """
    with_it, without_it = with_it.double(), without_it.double()
    difference = with_it.mean(0) - without_it.mean(0)
    norm = float(difference.norm())
    if norm <= 1e-6 * float(with_it.norm(dim=-1).mean()):
        raise ValueError(
            "prompts with and without the instruction have the same stream on average, so there is no direction: read "
            "at a layer above the first, or give another instruction"
        )
    unit = difference / norm
    return unit, float((with_it @ unit).mean()), float((without_it @ unit).mean())


def fit(
    model: Any,
    data: Sequence[Asked] | ContrastSet,
    *,
    instruction: str | None = None,
    layers: Sequence[int] | None = None,
    prompt_format: PromptFormat | str | None = None,
    system: str | None = None,
    batch_size: int = 8,
    progress: bool = True,
    seed: int = 0,
) -> Instruction:
    """Read prompts with and without an instruction, and keep a direction for each layer.

    Args:
        data: questions; or pairs, whose positive answers stand for the instruction being followed.
        instruction: what is put behind each question, such as "Answer in upper case."; not for pairs.
        layers: 0-based blocks; all by default. Choose one with `.at([...])` before steering.
        seed: of nothing, since nothing is drawn; every fit takes one.

    Raises:
        ValueError: without an instruction, for no questions, or where the instruction changes nothing.
    """
    check_model(model)
    layers = check_layers(model, layers)
    batch_size = check_count("batch_size", batch_size)
    if isinstance(data, ContrastSet):
        if instruction is not None:
            raise ValueError("pairs have their answers in place of an instruction: give questions, or leave it out")
        sets = two_sets(model, data, prompt_format=prompt_format, system=system)
        positive, negative, provenance = sets.positive, sets.negative, sets.provenance(model, "instruction steering")
        settings = dict(sets.settings)
    else:
        if is_question(data) or not isinstance(data, Sequence):
            raise TypeError(f"expected a list of questions, or a ContrastSet, got {describe(data)}")
        questions = [as_question(one) for one in data]
        if not questions or not instruction:
            missing = "questions" if not questions else "instruction, such as instruction='Answer in upper case.'"
            raise ValueError(f"no {missing} given")
        chosen = resolve_format(model, prompt_format)
        negative, positive = (
            tuple(chosen.encode(model.tokenizer, text, system=system) for text in texts)
            for texts in (questions, [followed_by(question, instruction) for question in questions])
        )
        settings = {"prompt_format": chosen.name, "system": system or "", "instruction": instruction}
        provenance = Provenance(
            model=str(model.cfg.model_name),
            behavior=instruction,
            method="instruction steering",
            prompt_format=chosen.name,
            token_position="last token of the prompt",
            n_pairs=len(questions),
            dataset_hash=hash_of([[plain_data(one) for one in questions], instruction]),
            expression=instruction,
            details={
                "model_dtype": dtype_name(model),
                "caa_lens": importlib.metadata.version("caa-lens"),
                "torch": torch.__version__,
            },
        )
    both = read_all(
        model,
        [*positive, *negative],
        layers,
        batch_size=batch_size,
        what=f"fit {provenance.behavior}",
        progress=progress,
    )
    check_finite_streams(model, both)
    found = [fit_direction(both[: len(positive), i], both[len(positive) :, i]) for i in range(len(layers))]
    return Instruction(
        direction=torch.stack([unit for unit, _, _ in found]).float(),
        with_it=torch.tensor([above for _, above, _ in found]),
        without_it=torch.tensor([below for _, _, below in found]),
        layers=layers,
        provenance=provenance,
        settings=settings,
    )
