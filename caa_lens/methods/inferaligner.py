"""InferAligner: one model's directions guide another, on those prompts only that open a gate.

    s_l = mean over positive prompts - mean over negative prompts      of the stream at the last token, by model
    gate of layer l:  open where h . s + b > 0,  with s of unit length, of the steered model itself
    b = -(mean projection of positive + mean projection of negative prompts) / 2
    h' = h + strength * gate * theta,  with theta the guide's s_l, not normalised

The paper's positive prompts are harmful ones, its guide a model that refuses them; nothing in the formulas depends on
that, and any two kinds of prompts may be told apart. Without a guide theta is the model's own s.

Source: arXiv 2401.11206, whose authors released no code. The midpoint b is a choice of ours. All gates are read in one
run without steering, before anything is changed; in sequence, later gates would see a stream that was moved already.
"""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from caa_lens.arguments import as_float, check_count, describe
from caa_lens.contrast.messages import Asked, as_question, plain_data
from caa_lens.engine.positions import Positions
from caa_lens.methods.data import check_finite_streams, hash_of
from caa_lens.methods.fitted import Fitted
from caa_lens.methods.reading import read_all
from caa_lens.models.checks import check_layers, check_model
from caa_lens.models.placement import dtype_name
from caa_lens.prompts.checks import as_prompt
from caa_lens.prompts.prompt_formats import Prompt, PromptFormat
from caa_lens.provenance import Provenance
from caa_lens.steering.interventions import Gate, Intervention


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class InferAligner(Fitted):
    """A gate and a guiding direction for each layer.

    Attributes:
        gate: s of the steered model, of unit length.
        bias: b, so that the gate is open where the projection is above -b.
        guide: theta, in units of the stream.
        accuracy: share of the fitted prompts on whose right side the gate is, by layer.
    """

    gate: Float[Tensor, "layer d_model"]
    bias: Float[Tensor, " layer"]
    guide: Float[Tensor, "layer d_model"]
    accuracy: Float[Tensor, " layer"]

    def interventions(
        self, strength: float | int = 1.0, *, positions: str | Positions = "caa", gated: bool = True
    ) -> tuple[Intervention, ...]:
        """The guide's direction at every layer; the original acts at all tokens of the prompts that open the gate.

        Args:
            strength: the paper's alpha.
            gated: False steers every prompt.
        """
        strength = as_float("strength", strength)
        where = self._place(positions, original="all")
        return tuple(
            Intervention(
                parameters={"direction": self.guide[row]},
                layer=layer,
                multiplier=strength,
                positions=where,
                gate=self.gate_of(layer) if gated else None,
                provenance=self._fitted_at(layer),
            )
            for row, layer in enumerate(self.layers)
        )

    def gate_of(self, layer: int) -> Gate:
        """The gate of one of its layers."""
        if layer not in self.layers:
            raise IndexError(f"no gate at layer {layer}: it has layers {list(self.layers)}")
        row = self.layers.index(layer)
        return Gate(direction=self.gate[row], bias=float(self.bias[row]), layer=layer)

    def opened(
        self,
        model: Any,
        prompts: Sequence[Asked | Prompt],
        *,
        prompt_format: PromptFormat | str | None = None,
        batch_size: int = 8,
    ) -> Bool[Tensor, "prompt layer"]:
        """Which prompts open which layer's gate; how often harmless ones do is the harm that it can do."""
        check_model(model)
        encoded = [as_prompt(model, one, prompt_format=prompt_format) for one in prompts]
        states = read_all(model, encoded, self.layers, batch_size=batch_size, what="gates", progress=False)
        return torch.stack([self.gate_of(at).is_open(states[:, i]) for i, at in enumerate(self.layers)], dim=1)

    def _in_words(self) -> str:
        return f"gates right on {float(self.accuracy.min()):.0%} of the prompts or more, "


def fit_gate(
    positive: Float[Tensor, "positive d_model"], negative: Float[Tensor, "negative d_model"]
) -> tuple[Float[Tensor, " d_model"], float]:
    """The unit direction between two classes, and the bias that puts the border halfway, in float64.

    Raises:
        ValueError: if the classes have no spread between them.
    """
    positive, negative = positive.double(), negative.double()
    difference = positive.mean(0) - negative.mean(0)
    norm, size = float(difference.norm()), float(torch.cat([positive, negative]).norm(dim=-1).mean())
    if not norm > 1e-5 * size:
        raise ValueError(
            f"the two classes have the same mean (they differ by {norm:.2g} in streams of norm {size:.3g}), so that no "
            "gate tells them apart: read at a higher layer, or give prompts that differ"
        )
    unit = difference / norm
    return unit, -float((positive @ unit).mean() + (negative @ unit).mean()) / 2


def fit(
    model: Any,
    data: tuple[Sequence[Asked | Prompt], Sequence[Asked | Prompt]],
    *,
    layers: Sequence[int],
    guide: Any = None,
    prompt_format: PromptFormat | str | None = None,
    system: str | None = None,
    batch_size: int = 8,
    progress: bool = True,
    seed: int = 0,
) -> InferAligner:
    """Read two kinds of prompts in the model, and in its guide.

    Args:
        data: `(positive, negative)` questions; the gate opens on the positive ones.
        layers: 0-based blocks, which act together.
        guide: a model of the same architecture, whose directions steer; the model itself by default.
        seed: of nothing, since nothing is drawn; every fit takes one.

    Raises:
        ValueError: for no prompts of a kind, classes without any spread between them at a layer, or a guide of another
            width or depth.
    """
    check_model(model)
    layers = check_layers(model, layers)
    batch_size = check_count("batch_size", batch_size)
    if not isinstance(data, tuple) or len(data) != 2 or any(isinstance(some, str) for some in data):
        raise TypeError(f"expected two lists of questions, (positive, negative), got {describe(data)}")
    if not data[0] or not data[1]:
        raise ValueError(f"got {len(data[0])} positive and {len(data[1])} negative prompts: give some of both kinds")
    models = [model]
    if guide is not None and guide is not model:
        check_model(guide)
        if (guide.cfg.d_model, guide.cfg.n_layers) != (model.cfg.d_model, model.cfg.n_layers):
            raise ValueError(
                f"the guide has {guide.cfg.n_layers} layers of d_model={guide.cfg.d_model}, the model "
                f"{model.cfg.n_layers} of d_model={model.cfg.d_model}: a guide shares the model's stream; between "
                "others, carry vectors over with transfer_models"
            )
        models.append(guide)
    n = len(data[0])
    sides = []
    for one in models:
        prompts = [as_prompt(one, p, prompt_format=prompt_format, system=system) for some in data for p in some]
        states = read_all(one, prompts, layers, batch_size=batch_size, what="fit gates", progress=progress)
        check_finite_streams(one, states)
        sides.append((states[:n], states[n:]))
    gates = [fit_gate(sides[0][0][:, i], sides[0][1][:, i]) for i in range(len(layers))]
    accuracy = []
    for i, (unit, bias) in enumerate(gates):
        right = [(sides[0][0][:, i].double() @ unit + bias > 0), (sides[0][1][:, i].double() @ unit + bias <= 0)]
        accuracy.append(float(torch.cat(right).float().mean()))
    return InferAligner(
        gate=torch.stack([unit for unit, _ in gates]).float(),
        bias=torch.tensor([bias for _, bias in gates], dtype=torch.float32),
        guide=(sides[-1][0].double().mean(0) - sides[-1][1].double().mean(0)).float(),
        accuracy=torch.tensor(accuracy),
        layers=layers,
        provenance=Provenance(
            model=str(model.cfg.model_name),
            behavior="two kinds of prompts",
            method="InferAligner",
            prompt_format=str(prompt_format or "the model's own"),
            token_position="last token of the prompt",
            n_pairs=n,
            dataset_hash=hash_of([[_text(one) for one in some] for some in data]),
            details={
                "guide": str(models[-1].cfg.model_name),
                "model_dtype": dtype_name(model),
                "caa_lens": importlib.metadata.version("caa-lens"),
                "torch": torch.__version__,
            },
        ),
        settings={
            "guide": str(models[-1].cfg.model_name),
            "system": system or "",
            "bias": "midpoint",
            "gates": "at once",
        },
    )


def _text(prompt: Asked | Prompt) -> Any:
    return str(list(prompt.tokens)) if isinstance(prompt, Prompt) else plain_data(as_question(prompt))
