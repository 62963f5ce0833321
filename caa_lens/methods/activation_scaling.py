"""Activation scaling: one learned number for each site, layer and position, which flips one answer into another.

    h' = h (1 + strength * alpha),      strength in [-1, 1]:  +1 for the wanted token, -1 for the other

alpha starts at 0 and is learned by gradient descent on the mean over strengths beta = +1 and -1 of

    effectiveness   max(0, margin - beta (z_wanted - z_other))          z: the next token's logits
    faithfulness    KL(without steering || with it) over all other tokens, renormalised without these two
    minimality      sum |alpha|

weighted by 1, `faithful` and `minimal`. Numbers are tied to positions, so all prompts are of one length.

On the residual stream scaling by s > 0 is the same as dividing all that later blocks write by s, where every reader
normalises (not so in models like OLMo 2, whose norms are behind their parts): there alpha says how far later layers are
trusted, and at the last layer nothing at all. The faithful sites, "hook_attn_out" and "hook_mlp_out", say which
component matters.

Source: arXiv 2410.04962, equation 5; its exact weights and the sign convention of its hinge could not be checked.
"""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from caa_lens.arguments import as_float, as_seed, check_count, describe
from caa_lens.engine.edits import SITES, Edit
from caa_lens.engine.kept_streams import read_streams, right_padded, run_on
from caa_lens.engine.positions import Positions
from caa_lens.methods.data import check_finite_streams, hash_of, plain_prompt
from caa_lens.methods.fitted import Fitted
from caa_lens.methods.training import Best, batches, check_training, frozen
from caa_lens.models.adapters.choice import adapter_of
from caa_lens.models.checks import check_layers, check_model
from caa_lens.models.placement import device_of_tokens, dtype_name
from caa_lens.models.unembedding import final_logits
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.provenance import HOOK_POINT, Provenance
from caa_lens.steering.interventions import Intervention
from caa_lens.steering.placing import span_of

BETAS = (1.0, -1.0)
TRAINED_AT = ("prompt", "caa")
LARGEST = 100.0  # of alpha: -1 removes what lies there, and what is a hundred times as large has left all sizes
Question = tuple[str | Prompt, str | int, str | int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class ActivationScaling(Fitted):
    """A number alpha for each layer, site and position.

    Attributes:
        factor: alpha.
        sites: hook points of the blocks, in the order of the second axis.
        trained_at: "prompt" (every position of it) or "caa" (from the end of the instruction to the prompt's own).
        losses: of each epoch, on the validation questions where there are any.
    """

    factor: Float[Tensor, "layer site pos"]
    sites: tuple[str, ...] = ()
    trained_at: str = "prompt"
    losses: tuple[float, ...] = ()

    def interventions(
        self, strength: float | int = 1.0, *, positions: str | Positions = "original"
    ) -> tuple[Intervention, ...]:
        """The scaling at every site; it has no other positions than those that it was trained at ("original")."""
        strength = as_float("strength", strength)
        remedy = f"its numbers are tied to the positions that it was fitted at: take {self.trained_at!r}, or fit again"
        if not isinstance(positions, str):
            raise ValueError(f"ActivationScaling cannot act at a span or mask: {remedy}")
        others = {"caa", "all", "after_first", "prompt", "answer", "last", "front"} - {self.trained_at}
        where = self._place(positions, original=self.trained_at, cannot=dict.fromkeys(others, remedy))
        return tuple(
            Intervention(
                operator="scale",
                parameters={"factor": self.factor[row, column, :, None]},
                by_position=frozenset({"factor"}),
                layer=layer,
                site=site,
                multiplier=strength,
                positions=where,
                provenance=self._fitted_at(layer, site),
            )
            for row, layer in enumerate(self.layers)
            for column, site in enumerate(self.sites)
        )

    def share_above(self, threshold: float | int = 0.05) -> float:
        """The share of the numbers that are larger than a threshold: how little is enough."""
        return float((self.factor.abs() > as_float("threshold", threshold)).float().mean())

    def _in_words(self) -> str:
        return f"{len(self.sites)} sites, {self.factor.shape[-1]} positions, {self.share_above():.0%} above 0.05, "


class Loss(NamedTuple):
    """The three terms of what is learned, each a mean over questions but the last."""

    effectiveness: Tensor
    faithfulness: Tensor
    minimality: Tensor


def effectiveness(
    logits: Float[Tensor, "question d_vocab"],
    wanted: Int[Tensor, " question"],
    other: Int[Tensor, " question"],
    beta: float,
    margin: float,
) -> Float[Tensor, ""]:
    """Mean of max(0, margin - beta (z_wanted - z_other))."""
    difference = (logits.gather(-1, wanted[:, None]) - logits.gather(-1, other[:, None]))[:, 0]
    return (margin - beta * difference).clamp_min(0).mean()


def faithfulness(
    steered: Float[Tensor, "question d_vocab"],
    plain: Float[Tensor, "question d_vocab"],
    wanted: Int[Tensor, " question"],
    other: Int[Tensor, " question"],
) -> Float[Tensor, ""]:
    """Mean of KL(plain || steered) in nats over all tokens but the two, renormalised without them."""
    both = torch.stack([wanted, other], dim=1)
    q, p = (logits.scatter(-1, both, -torch.inf).log_softmax(-1) for logits in (steered, plain))
    terms = (p.exp() * (p - q)).scatter(-1, both, 0.0)  # 0 * (inf - inf) at the two
    return terms.sum(-1).mean()


@torch.inference_mode(False)  # whose tensors cannot be trained
def fit(
    model: Any,
    data: Sequence[Question],
    *,
    layers: Sequence[int],
    sites: Sequence[str] = ("hook_attn_out", "hook_mlp_out"),
    validation: Sequence[Question] | None = None,
    positions: str = "prompt",
    epochs: int = 20,
    batch_size: int = 10,
    learning_rate: float = 0.1,
    margin: float = 2.0,
    faithful: float = 1.0,
    minimal: float = 0.02,
    patience: int | None = 5,
    progress: bool = True,
    seed: int | None = 0,
) -> ActivationScaling:
    """Learn the numbers from questions with two next tokens.

    Args:
        data: `(prompt, wanted, other)`: a text without a prompt format or a `Prompt`, and two tokens, as texts of one
            token each (mind the blank before a word) or as ids.
        layers: 0-based blocks.
        sites: hook points of the blocks; the stream itself is "hook_resid_post".
        validation: held-out questions; the epoch with the lowest loss on them is kept.
        positions: "prompt" for every position of it, "caa" from the instruction's end on, which leaves a chat
            template's positions alone.
        margin: by how many nats the wanted logit is to be ahead.
        faithful, minimal: weights of the other two terms.
        seed: of the order of questions.

    Raises:
        ValueError: for prompts of unequal lengths, answers that are not one token, two that are the same, the stream of
            the last layer, or training that diverges: a loss that is not finite, or a number beyond 100.
    """
    check_model(model)
    layers, sites = check_layers(model, layers), tuple(sites)
    epochs, batch_size = check_count("epochs", epochs), check_count("batch_size", batch_size)
    rate, margin = as_float("learning_rate", learning_rate), as_float("margin", margin)
    faithful, minimal = as_float("faithful", faithful), as_float("minimal", minimal)
    _check_sites(model, layers, sites, positions)
    generator = torch.Generator().manual_seed(as_seed(seed))
    below = layers[0] if sites == (HOOK_POINT,) else layers[0] - 1
    kept = _Questions(model, data, below, positions)
    held_out = None if validation is None else _Questions(model, validation, below, positions)
    if held_out is not None and held_out.span != kept.span:
        raise ValueError(f"the validation prompts have other positions, {held_out.span}, than the others, {kept.span}")
    n_pos = kept.span[1] - kept.span[0]
    alpha = torch.zeros(len(layers), len(sites), n_pos, device=device_of_tokens(model), requires_grad=True)
    optimiser, best, step = torch.optim.Adam([alpha], lr=rate), Best(patience if held_out else None), 0

    def loss_of(questions: "_Questions", some: Sequence[int]) -> Loss:
        terms = []
        for beta in BETAS:
            edits = _edits(alpha, layers, sites, questions.span, beta)
            terms.append(questions.terms(model, some, edits, beta, margin))
        first, second = (torch.stack(one).mean() for one in zip(*terms, strict=True))
        return Loss(first, second, alpha.abs().sum())

    total = epochs * -(-len(data) // batch_size)
    with frozen(model), tqdm(total=total, desc="fit scaling", unit="step", disable=not progress) as bar:
        for _ in range(epochs):
            of_epoch = 0.0
            for some in batches(len(data), batch_size, generator):
                optimiser.zero_grad()
                parts = loss_of(kept, some)
                loss = parts.effectiveness + faithful * parts.faithfulness + minimal * parts.minimality
                check_training(loss.detach(), step=step)
                loss.backward()
                optimiser.step()
                step += 1
                _check_size(alpha.detach(), step)
                of_epoch += float(loss.detach()) * len(some) / len(data)
                bar.update()
                bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
            if held_out is not None:
                with torch.no_grad():
                    parts = loss_of(held_out, range(len(held_out)))
                    of_epoch = float(parts.effectiveness + faithful * parts.faithfulness + minimal * parts.minimality)
            if best.take(of_epoch, [alpha]):
                break
    chosen = best.kept[0] if held_out is not None else alpha.detach()
    return ActivationScaling(
        factor=chosen.float().cpu(),
        sites=sites,
        trained_at=positions,
        losses=tuple(best.losses),
        layers=layers,
        provenance=kept.provenance(model),
        settings={
            "sites": " ".join(sites),
            "positions": positions,
            "epochs": str(epochs),
            "batch_size": str(batch_size),
            "learning_rate": f"{rate:g}",
            "margin": f"{margin:g}",
            "faithful": f"{faithful:g}",
            "minimal": f"{minimal:g}",
            "seed": str(seed),
            "validation_hash": held_out.content_hash if held_out else "",
        },
    )


def _check_size(alpha: Tensor, step: int) -> None:
    largest = float(alpha.abs().max())
    if not largest <= LARGEST:
        raise ValueError(
            f"training diverged: a number is {largest:.3g} after step {step}, beyond {LARGEST:g} times what is there. "
            "Use a smaller learning_rate, or fewer epochs"
        )


def _edits(
    alpha: Tensor, layers: Sequence[int], sites: Sequence[str], span: tuple[int, int], beta: float
) -> list[Edit]:
    return [
        Edit(
            layer=layer,
            site=site,
            positions=span,
            operator="scale",
            parameters={"factor": alpha[row, column, :, None]},
            by_position=frozenset({"factor"}),
            multiplier=beta,
        )
        for row, layer in enumerate(layers)
        for column, site in enumerate(sites)
    ]


class _Questions:
    """Questions with the streams of their prompts, their logits without steering, and their two tokens."""

    def __init__(self, model: Any, data: Sequence[Question], layer: int, positions: str) -> None:
        if not data:
            raise ValueError("no questions given: expected (prompt, wanted, other)")
        prompts = [_prompt(model, one) for one in data]
        lengths = sorted({len(one) for one in prompts})
        spans = {span_of(positions, one)[0] for one in prompts}
        if len(lengths) > 1 or len(spans) > 1:
            raise ValueError(
                f"the prompts have {' and '.join(map(str, lengths))} tokens, expected the same in all, since every "
                "position has numbers of its own: choose names of as many tokens"
            )
        self.span = (spans.pop(), lengths[0])
        self.layer = layer
        device = device_of_tokens(model)
        self.wanted, self.other = (
            torch.tensor([_token(model, one) for one in words], device=device)
            for words in ([one[1] for one in data], [one[2] for one in data])
        )
        if bool((self.wanted == self.other).any()):
            row = int((self.wanted == self.other).nonzero()[0])
            raise ValueError(f"question {row} wants the same token as it does not want, {data[row][1]!r}")
        self.content_hash = hash_of(
            [[list(p.tokens), int(a), int(b)] for p, a, b in zip(prompts, self.wanted, self.other, strict=True)]
        )
        self.tokens = right_padded(prompts)
        self.streams = torch.cat([one.resid for one in read_streams(model, prompts, layer)])
        check_finite_streams(model, self.streams)
        with torch.no_grad():
            self.plain = final_logits(model, run_on(model, self.tokens, self.streams, layer)[:, -1]).float()

    def __len__(self) -> int:
        return len(self.streams)

    def terms(
        self, model: Any, some: Sequence[int], edits: Sequence[Edit], beta: float, margin: float
    ) -> tuple[Tensor, Tensor]:
        rows = list(some)
        final = run_on(model, self.tokens[rows], self.streams[rows], self.layer, edits=edits)
        logits = final_logits(model, final[:, -1]).float()
        wanted, other = self.wanted[rows], self.other[rows]
        return (
            effectiveness(logits, wanted, other, beta, margin),
            faithfulness(logits, self.plain[rows], wanted, other),
        )

    def provenance(self, model: Any) -> Provenance:
        return Provenance(
            model=str(model.cfg.model_name),
            behavior="scaling",
            method="activation scaling",
            prompt_format="as given",
            token_position=f"positions {self.span[0]} to {self.span[1] - 1}",
            n_pairs=len(self),
            dataset_hash=self.content_hash,
            details={
                "model_dtype": dtype_name(model),
                "caa_lens": importlib.metadata.version("caa-lens"),
                "torch": torch.__version__,
            },
        )


def _check_sites(model: Any, layers: Sequence[int], sites: Sequence[str], positions: str) -> None:
    for site in sites:
        if site not in SITES:
            raise ValueError(f"unknown site {site!r}: expected some of {', '.join(SITES)}")
    if not sites or len(set(sites)) != len(sites):
        raise ValueError(f"sites must be some and differ, got {list(sites)}")
    normed = None not in adapter_of(model).final_norms(model)
    if HOOK_POINT in sites and model.cfg.n_layers - 1 in layers and normed:
        raise ValueError(
            f"the stream behind the last layer, {model.cfg.n_layers - 1}, is normalised right away, so that scaling it "
            "changes nothing: leave that layer out"
        )
    if positions not in TRAINED_AT:
        raise ValueError(f"unknown positions {positions!r}: expected one of {', '.join(TRAINED_AT)}")


def _prompt(model: Any, question: object) -> Prompt:
    if not isinstance(question, tuple | list) or len(question) != 3:
        raise TypeError(f"expected (prompt, wanted, other), got {describe(question)}")
    prompt = question[0]
    return prompt if isinstance(prompt, Prompt) else plain_prompt(model, prompt)


def _token(model: Any, word: str | int) -> int:
    if not isinstance(word, str):
        return int(word)
    ids = model.tokenizer(word, add_special_tokens=False).input_ids if model.tokenizer is not None else []
    if len(ids) != 1:
        raise ValueError(
            f"{word!r} is {len(ids)} tokens of this tokenizer, expected one: give a token's id, or a word "
            "with the blank before it"
        )
    return int(ids[0])
