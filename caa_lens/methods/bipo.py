"""BiPO: a vector that is learned so that +v makes the preferred answer likelier than the other, and -v less likely.

    margin(v) = [log p(T | q; v) - log p(T | q)] - [log p(O | q; v) - log p(O | q)]
    loss      = - mean log sigmoid(d beta margin(d v)),      d = +1 or -1, drawn for each batch

with T the preferred and O the other answer, their log-probabilities summed over the answer's tokens with the end of the
sequence among them, and v added behind one block. v starts at zero, where the loss is log 2.

Nothing below the block depends on v, so every text's stream behind it is kept, and only the blocks above are run. The
learning rate is by default 3e-3 times the root mean square of the stream's coordinates: Adam moves a coordinate by
about the rate each step, and streams are of very different sizes.

Source: arXiv 2406.00045 and its authors' code (AdamW without weight decay, beta 0.1, all positions), whose released
vectors `read_vectors` reads. Departures: the learning rate (there 5e-4), the likelihoods without steering are computed
once, from the same code at v = 0; the epoch with the lowest validation loss is kept, where there are validation pairs.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus
from tqdm.auto import tqdm

from caa_lens.arguments import as_float, as_seed, check_count
from caa_lens.contrast.sets import ContrastSet, check_contrast_set
from caa_lens.engine.edits import Edit
from caa_lens.engine.kept_streams import read_streams, run_on
from caa_lens.engine.positions import Positions
from caa_lens.methods.data import check_finite_streams, two_sets
from caa_lens.methods.fitted import Fitted
from caa_lens.methods.training import WORST, Best, batches, check_training, frozen, warm_up_then_cosine
from caa_lens.models.checks import check_layers, check_model
from caa_lens.models.placement import device_of_tokens
from caa_lens.models.unembedding import token_logp
from caa_lens.prompts.prompt_formats import Prompt, PromptFormat
from caa_lens.steering.interventions import Intervention
from caa_lens.steering.placing import span_of
from caa_lens.vectors.steering_vectors import SteeringVector

TRAINED_AT = ("caa", "all", "after_first", "answer")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Bipo(Fitted):
    """A learned vector.

    Attributes:
        direction: in units of the stream, one row.
        losses: of each epoch, on the validation pairs where there are any.
        epoch: whose vector this is, counted from 0.
    """

    direction: Float[Tensor, "layer d_model"]
    losses: tuple[float, ...] = ()
    epoch: int = 0

    @property
    def vector(self) -> SteeringVector:
        """It as a steering vector, for everything that takes one."""
        return SteeringVector(direction=self.direction[0], layer=self.layers[0], provenance=self.provenance)

    def interventions(
        self, strength: float | int = 1.0, *, positions: str | Positions = "caa"
    ) -> tuple[Intervention, ...]:
        """The vector times a strength; the original adds it at every token."""
        where = self._place(positions, original="all")
        return (Intervention(vector=self.vector, multiplier=as_float("strength", strength), positions=where),)

    def _in_words(self) -> str:
        return f"norm {float(self.direction.norm()):.3g}, epoch {self.epoch + 1} of {len(self.losses)}, "


def preference_loss(margin: Float[Tensor, " pair"], sign: float, beta: float) -> Float[Tensor, ""]:
    """- mean log sigmoid(sign beta margin); log 2 where the margins are 0."""
    return softplus(-sign * beta * margin).mean()


@torch.inference_mode(False)  # whose tensors cannot be trained
def fit(
    model: Any,
    data: ContrastSet,
    *,
    layer: int,
    validation: ContrastSet | None = None,
    epochs: int = 10,
    batch_size: int = 4,
    learning_rate: float | None = None,
    beta: float = 0.1,
    patience: int | None = 3,
    positions: str = "all",
    with_eos: bool = True,
    prompt_format: PromptFormat | str | None = None,
    system: str | None = None,
    progress: bool = True,
    seed: int | None = 0,
) -> Bipo:
    """Learn a vector from pairs of answers.

    Args:
        data: pairs, whose positive answers are the preferred ones.
        layer: the 0-based block behind which v is added.
        validation: held-out pairs; the epoch with the lowest loss on them is kept, and training stops after `patience`
            epochs without a lower one. Without them the last epoch is kept.
        learning_rate: in units of the stream; see the module for the default.
        positions: where v is added in training: "all" (the original), "caa", "after_first" or "answer".
        with_eos: whether the end of the sequence is counted in an answer's likelihood, as in the original.
        seed: of the order of pairs and of the signs.

    Raises:
        ValueError: for an answer without tokens, or training that diverges: a loss that is not finite, or a vector of
            more than 10 times the mean difference's norm.
    """
    check_model(model)
    check_contrast_set(data)
    (layer,) = check_layers(model, [layer])
    epochs, batch_size = check_count("epochs", epochs), check_count("batch_size", batch_size)
    beta = as_float("beta", beta)
    if positions not in TRAINED_AT:
        raise ValueError(f"BiPO cannot be trained at positions={positions!r}: expected one of {', '.join(TRAINED_AT)}")
    generator = torch.Generator().manual_seed(as_seed(seed))
    kept = _Kept.of(model, data, layer, positions, with_eos, prompt_format, system)
    held_out = (
        kept if validation is None else _Kept.of(model, validation, layer, positions, with_eos, prompt_format, system)
    )
    rate = 3e-3 * kept.rms if learning_rate is None else as_float("learning_rate", learning_rate)
    v = torch.zeros(model.cfg.d_model, device=device_of_tokens(model), requires_grad=True)
    optimiser = torch.optim.AdamW([v], lr=rate, weight_decay=0.0)
    n_steps = epochs * -(-len(data) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, warm_up_then_cosine(n_steps, min(100, n_steps // 10)))
    best, step = Best(patience if validation is not None else None), 0
    with frozen(model), tqdm(total=n_steps, desc=f"fit {data.behavior}", unit="step", disable=not progress) as bar:
        kept.read_reference(model, batch_size)
        if held_out is not kept:
            held_out.read_reference(model, batch_size)
        for _ in range(epochs):
            total = 0.0
            for some in batches(len(data), batch_size, generator):
                sign = 1.0 if int(torch.randint(2, (1,), generator=generator)) else -1.0
                optimiser.zero_grad()
                loss = torch.zeros(())
                # Pair by pair, so that no more than two texts are in memory with their gradients.
                for i in some:
                    part = preference_loss(kept.margin(model, i, sign * v)[None], sign, beta) / len(some)
                    check_training(part.detach(), step=step)
                    part.backward()
                    loss = loss + part.detach().cpu()
                optimiser.step()
                schedule.step()
                step += 1
                check_training(loss, step=step, norm=float(v.detach().norm()), most=WORST * kept.mean_difference_norm)
                total += float(loss) * len(some)
                bar.update()
                bar.set_postfix(loss=f"{float(loss):.3f}", norm=f"{float(v.detach().norm()):.3g}")
            if validation is not None:
                with torch.no_grad():
                    total = held_out.loss(model, v, beta) * len(data)
            if best.take(total / len(data), [v]):
                break
    chosen = best.kept[0] if validation is not None else v.detach()
    return Bipo(
        direction=chosen[None].float().cpu(),
        losses=tuple(best.losses),
        epoch=best.epoch if validation is not None else len(best.losses) - 1,
        layers=(layer,),
        provenance=kept.sets.provenance(model, "BiPO"),
        settings={
            "epochs": str(epochs),
            "batch_size": str(batch_size),
            "learning_rate": f"{rate:.6g}",
            "beta": f"{beta:g}",
            "positions": positions,
            "with_eos": str(kept.eos is not None),  # a tokenizer may have none
            "seed": str(seed),
            "validation": validation.name if validation is not None else "",
            "validation_hash": validation.content_hash if validation is not None else "",
            **kept.sets.settings,
        },
    )


class _Kept:
    """Pairs with their streams behind a layer, on the CPU, and their likelihoods without steering."""

    def __init__(self, sets: Any, layer: int, positions: str, streams: list[list[Tensor]], eos: int | None) -> None:
        self.sets, self.layer, self.positions, self._streams, self.eos = sets, layer, positions, streams, eos
        self._reference: list[Float[Tensor, ""]] = []
        ordinary = torch.cat([resid[1:] for side in streams for resid in side]).float()  # without the first tokens
        self.rms = float(ordinary.pow(2).mean().sqrt())
        means = [
            torch.stack(
                [
                    resid[min(prompt.read[0], len(resid) - 1) : prompt.read[1]].float().mean(0)
                    for resid, prompt in zip(side, prompts, strict=True)
                ]
            ).mean(0)
            for side, prompts in zip(streams, (sets.positive, sets.negative), strict=True)
        ]
        self.mean_difference_norm = float((means[0] - means[1]).norm())

    @classmethod
    def of(
        cls,
        model: Any,
        data: ContrastSet,
        layer: int,
        positions: str,
        with_eos: bool,
        prompt_format: PromptFormat | str | None,
        system: str | None,
    ) -> "_Kept":
        sets = two_sets(model, data, prompt_format=prompt_format, system=system)
        eos = getattr(model.tokenizer, "eos_token_id", None) if with_eos else None
        streams = []
        for side in (sets.positive, sets.negative):
            # The last token of a text is predicted, and never run.
            texts = [_without_end(prompt, eos) for prompt in side]
            found = []
            for batch in read_streams(model, texts, layer):
                check_finite_streams(model, *(resid[: len(p)] for resid, p in zip(batch.resid, texts, strict=False)))
                found += [resid[: len(p)].cpu() for resid, p in zip(batch.resid, batch.prompts, strict=True)]
            streams.append(found)
        return cls(sets, layer, positions, streams, eos)

    def read_reference(self, model: Any, batch_size: int) -> None:
        with torch.no_grad():
            none = torch.zeros(model.cfg.d_model, device=device_of_tokens(model))
            self._reference = [self._difference(model, i, none).detach() for i in range(len(self.sets.positive))]

    def margin(self, model: Any, pair: int, v: Float[Tensor, " d_model"]) -> Float[Tensor, ""]:
        """How much more than without steering the preferred answer is ahead, in nats."""
        return self._difference(model, pair, v) - self._reference[pair]

    def loss(self, model: Any, v: Tensor, beta: float) -> float:
        """Mean over both signs and all pairs."""
        found = [
            preference_loss(
                torch.stack([self.margin(model, i, sign * v) for i in range(len(self._reference))]), sign, beta
            )
            for sign in (1.0, -1.0)
        ]
        return float(torch.stack(found).mean())

    def _difference(self, model: Any, pair: int, v: Tensor) -> Float[Tensor, ""]:
        logp = [self._logp(model, side, pair, v) for side in (0, 1)]
        return logp[0] - logp[1]

    def _logp(self, model: Any, side: int, pair: int, v: Tensor) -> Float[Tensor, ""]:
        """Log-probability of an answer, summed over its tokens."""
        prompt = (self.sets.positive, self.sets.negative)[side][pair]
        resid = self._streams[side][pair].to(v.device)[None]
        edit = Edit(layer=self.layer, positions=span_of(self.positions, prompt), direction=v)
        ids = torch.tensor([prompt.tokens[: resid.shape[1]]])
        final = run_on(model, ids, resid, self.layer, edits=[edit])[0]
        tokens = [*prompt.tokens, *([] if self.eos is None else [self.eos])]
        targets = torch.tensor(tokens[prompt.answer_start :])
        return token_logp(model, final[prompt.answer_start - 1 :], targets).sum()


def _without_end(prompt: Prompt, eos: int | None) -> Prompt:
    """What is run of a text: all that is followed by a token that is predicted."""
    if prompt.answer_start >= len(prompt):
        raise ValueError(f"the answer of {prompt.text[-40:]!r} has no tokens")
    if eos is not None:
        return prompt
    return replace(prompt, tokens=prompt.tokens[:-1])
