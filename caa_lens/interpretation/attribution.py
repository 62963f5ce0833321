"""What a steering vector does downstream: by itself, or through the attention blocks and MLPs above it.

The vector v is added at layer l from the steering start on. At the last position, the final residual stream x is
`resid_post[l]` plus what every later attention block and MLP wrote, and the logit difference between two answer
tokens a and b is linear in x once the final norm's scale s(x) is known (RMS norm, s = sqrt(mean(x^2) + eps))::

    D(x) = x . u / s(x) + const,      u = w * (W_U[:, a] - W_U[:, b])

with w the final norm's weight (1 where it was folded into W_U). A LayerNorm divides the stream less its mean
over d_model, c(x) . u / sd(x). Since c(x) . u = x . c(u), u is centred once and s is sd; the norm's bias is in the
constant, and all else holds. With 0 the unsteered and 1 the steered run, the change splits exactly into

    vector        m v . u / s1                                      its own direct path to the logits
    attn k        (attn_out1[k] - attn_out0[k]) . u / s1            what block k's attention wrote differently, k > l
    mlp k         (mlp_out1[k] - mlp_out0[k]) . u / s1              what block k's MLP wrote differently
    norm scale    x0 . u (1 / s1 - 1 / s0)                          the unsteered stream, read through another norm

All differences are read at the steered run's scale, so that a block which the vector does not reach contributes 0; the
effect of the scale itself is one component. (Giving each run its own scale, component by component, has the same sum,
but credits every block with a share of the rescaling.) Direct logit attribution: nothing is said about *why* a block
wrote differently; that includes what earlier steered blocks and earlier steered positions told it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from caa_lens.arguments import as_multiplier, check_count, is_unicode
from caa_lens.contrast.messages import Asked
from caa_lens.contrast.sets import ContrastSet
from caa_lens.engine.overflow import check_finite
from caa_lens.engine.plain_runs import plain_runs
from caa_lens.engine.streams import editing, last_residual, reading_what_is_written
from caa_lens.measures.intervals import bootstrap_interval
from caa_lens.models.adapters.choice import adapter_of
from caa_lens.models.checks import check_model
from caa_lens.models.placement import device_of_tokens, dtype_name
from caa_lens.models.structure import rounding
from caa_lens.models.unembedding import (
    centred,
    has_formula,
    norm_scale,
    soft_cap,
    token_directions,
    token_logits,
)
from caa_lens.plots.attribution import contribution_bars
from caa_lens.prompts.batches import check_steered, left_pad
from caa_lens.prompts.checks import check_prompt, is_question
from caa_lens.prompts.prompt_formats import Prompt, PromptFormat, encode_letters, resolve_format
from caa_lens.prompts.users_words import warn_of_words
from caa_lens.provenance import last_part
from caa_lens.results import Result
from caa_lens.steering.interventions import as_interventions
from caa_lens.vectors.steering_vectors import SteeringVector

Question = tuple[Asked | Prompt, str | int, str | int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LogitAttribution(Result):
    """The change of the answers' logit difference, component by component. All numbers are logits.

    Attributes:
        frame: one row a question and component. Columns `question, component, layer, kind, contribution`; `kind` is
            "vector", "attn", "mlp" or "norm scale", whose `layer` is missing (it is the final norm). And the same in
            all rows of a question, `unsteered, steered, change`: the model's own logit difference (logit of the
            positive token minus that of the negative one) in both runs.
        layer: the vector's.
        multiplier: what the vector was multiplied by.
        settings: model, dtype, test set and its hash, prompt format, system prompt.
        provenance: of the `vectors`, of which one layer's was used.
    """

    layer: int
    multiplier: float

    @property
    def changes(self) -> pd.DataFrame:
        """The model's own logit difference in both runs, one row a question: `question, unsteered, steered, change`."""
        columns = ["question", "unsteered", "steered", "change"]
        return self.frame.drop_duplicates("question")[columns].reset_index(drop=True)

    @property
    def total(self) -> float:
        """Mean over questions of the measured change of the logit difference."""
        return float(self.changes["change"].mean())

    def total_interval(self, n_resamples: int = 2000, seed: int | None = 0) -> tuple[float, float]:
        """95 % bootstrap interval of `total`; NaN with one question."""
        values = self.changes["change"].to_numpy()[:, None]
        low, high = bootstrap_interval(values, n_resamples=n_resamples, seed=seed)
        return float(low[0]), float(high[0])

    @property
    def direct_share(self) -> float:
        """The vector's own direct path as a share of `total`; NaN if that is 0.

        It may exceed 1 or be negative, where what happens above works against the vector, and means little where
        `total_interval` holds 0.
        """
        direct = self.frame.loc[self.frame["kind"] == "vector", "contribution"].mean()
        return float(direct) / self.total if self.total else float("nan")

    @property
    def explained(self) -> float:
        """Sum of all components over `total`: 1 but for rounding (in bfloat16 the model itself rounds); NaN if 0."""
        summed = self.frame["contribution"].sum() / len(self.changes)
        return float(summed) / self.total if self.total else float("nan")

    def summary(self, n_resamples: int = 2000, seed: int | None = 0) -> pd.DataFrame:
        """Mean over questions with its 95 % bootstrap interval: `component, layer, kind, mean, low, high`, by depth."""
        first = self.frame[self.frame["question"] == self.frame["question"].iloc[0]]
        order = list(first["component"])
        table = self.frame.pivot(index="question", columns="component", values="contribution")[order].to_numpy()
        low, high = bootstrap_interval(table, n_resamples=n_resamples, seed=seed)
        head = first[["component", "layer", "kind"]].reset_index(drop=True)
        return pd.concat([head, pd.DataFrame({"mean": table.mean(0), "low": low, "high": high})], axis=1)

    def by_kind(self) -> "pd.Series[float]":
        """Mean contribution of the vector, of all attention blocks, of all MLPs and of the norm's scale."""
        kinds = self.frame.groupby("kind", sort=False)["contribution"].sum()
        return kinds / len(self.changes)

    def plot(self) -> go.Figure:
        """Bar chart by component, with 95 % intervals over questions."""
        n = len(self.changes)
        return contribution_bars(
            self.summary(),
            behavior=self.provenance["vectors"].behavior,
            layer=self.layer,
            multiplier=self.multiplier,
            n_questions=n,
            total=self.total,
            interval=self.total_interval(),
            direct_share=self.direct_share,
            summed=float(self.frame["contribution"].sum() / n),
            model=last_part(self.provenance["vectors"].model),
        )

    def __repr__(self) -> str:
        return (
            f"LogitAttribution({self.provenance['vectors'].behavior}, layer {self.layer}, "
            f"multiplier {self.multiplier:g}, {len(self.changes)} questions: logit difference {self.total:+.3g}, "
            f"direct share {self.direct_share:.0%})"
        )


@torch.inference_mode()
def attribute_logits(
    model: Any,
    pairs: ContrastSet | Sequence[Question],
    vector: SteeringVector,
    *,
    multiplier: float | int = 1.0,
    prompt_format: PromptFormat | str | None = None,
    system: str | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> LogitAttribution:
    """Split what a vector does to the answers into its direct path and the blocks above its layer.

        attribute_logits(model, test, vectors[14], multiplier=2).plot()

    Args:
        pairs: A/B pairs, read at the opening bracket as positive minus negative letter; or
            `(prompt, positive token, negative token)` for any prompt's next token, with tokens as ids, or as text that
            is one token (mind leading blanks: `" Yes"`).
        multiplier: v is multiplied by it; steering starts at the instruction's last token.
        batch_size: questions at a time; each runs steered and unsteered. One where the model might not bear padding.

    Raises:
        TypeError: for anything but one layer's vector.
        ValueError: for completion pairs, no questions, a text that is not one token, two equal tokens, a vector that
            does not fit the model, a prompt longer than the context, or a model whose logits are not linear behind
            its final norm.
    """
    check_model(model)
    batch_size = check_count("batch_size", batch_size)
    multiplier = as_multiplier(multiplier)
    _check_linear(model)
    as_interventions(model, [vector], multiplier=multiplier)
    batch_size = batch_size if plain_runs(model).padded else 1
    chosen = resolve_format(model, prompt_format) if _needs_format(pairs) else None
    prompts, tokens = _encode(model, pairs, chosen, system)
    for prompt in prompts:
        check_steered(prompt)
    device = device_of_tokens(model)
    columns = torch.tensor(tokens, device=device)  # [question 2]
    u = token_directions(model, columns[:, 0]) - token_directions(model, columns[:, 1])  # [question d_model]
    # A LayerNorm subtracts the mean over d_model from the stream; what is written along it changes nothing.
    u = centred(model, u)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    components: list[tuple[str, int | None, str]] = [(f"vector {vector.layer}", vector.layer, "vector")]
    for layer in range(vector.layer + 1, model.cfg.n_layers):
        components += [(f"{kind} {layer}", layer, kind) for kind in _kinds(model, layer)]
    components.append(("norm scale", None, "norm scale"))
    parts = torch.empty(len(prompts), len(components))
    differences = torch.empty(len(prompts), 2)  # [question run]
    with tqdm(total=len(prompts), desc=f"attribute layer {vector.layer}", unit="question", disable=not progress) as bar:
        for first in range(0, len(order), batch_size):
            some = order[first : first + batch_size]
            rows = torch.tensor(some, device=device)
            split, final = _run(model, [prompts[i] for i in some], vector, float(multiplier), u[rows.to(u.device)])
            both = token_logits(model, final, columns[rows])  # [run question 2]
            told = torch.cat([split, (both[..., 0] - both[..., 1]).T.to(split)], dim=1).cpu()  # one wait for the device
            parts[some], differences[some] = told[:, :-2], told[:, -2:]
            bar.update(len(some))
    check_finite(model, differences, "logit differences")
    names, layers, kinds = zip(*components, strict=True)
    _check_sum(model, parts, differences)
    n, k = parts.shape
    unsteered, steered = differences.double().unbind(1)
    changes = {"unsteered": unsteered, "steered": steered, "change": steered - unsteered}
    frame = pd.DataFrame(
        {
            "question": [i for i in range(n) for _ in range(k)],
            "component": list(names) * n,
            "layer": pd.array(list(layers) * n, dtype="Int64"),
            "kind": list(kinds) * n,
            "contribution": parts.flatten().numpy(),
            **{name: values.repeat_interleave(k).numpy() for name, values in changes.items()},
        }
    )
    settings = {
        "model": str(model.cfg.model_name),
        "dtype": dtype_name(model),
        "prompt_format": chosen.name if chosen else "as given",
        "system": system or "",
    }
    if isinstance(pairs, ContrastSet):
        settings |= {"test": pairs.name, "test_hash": pairs.content_hash}
    return LogitAttribution(
        frame=frame,
        settings=settings,
        provenance={"vectors": vector.provenance},
        layer=vector.layer,
        multiplier=float(multiplier),
    )


def _run(
    model: Any,
    prompts: Sequence[Prompt],
    vector: SteeringVector,
    multiplier: float,
    u: Float[Tensor, "question d_model"],
) -> tuple[Float[Tensor, "question component"], Float[Tensor, "run question d_model"]]:
    """Contributions of every component, and the final residual stream of both runs, at the last position."""
    n = len(prompts)
    batch = left_pad([*prompts, *prompts], n_ctx=model.cfg.n_ctx, device=device_of_tokens(model))
    runs = torch.tensor([0.0] * n + [multiplier] * n)  # on the CPU, where checking it waits for nothing
    (steering,) = as_interventions(model, [vector], multiplier=runs, start=batch.steer_start)
    written: dict[tuple[int, str], Tensor] = {}

    def keep(layer: int, kind: str, out: Tensor) -> None:
        last = out[:, -1].float().to(u.device).unflatten(0, (2, n))
        written[layer, kind] = ((last[1] - last[0]) * u).sum(-1)

    above = range(vector.layer + 1, model.cfg.n_layers)
    with editing(model, [steering.edit()]), reading_what_is_written(model, above, keep):
        resid = last_residual(model, batch.tokens, batch.attention_mask)
    final = resid[:, -1].to(u.device).unflatten(0, (2, n))  # [run question d_model]
    scale = norm_scale(model, final)  # [run question]
    direct = multiplier * (vector.direction.to(u.device).float() * u).sum(-1)
    unsteered = (final[0].float() * u).sum(-1)
    parts = [written[layer, kind] for layer in above for kind in _kinds(model, layer)]
    split = torch.stack([direct, *parts], dim=1) / scale[1, :, None]
    rescaled = unsteered * (1 / scale[1] - 1 / scale[0])
    return torch.cat([split, rescaled[:, None]], dim=1), final


def _kinds(model: Any, layer: int) -> tuple[str, ...]:
    return tuple(adapter_of(model).written(model, layer))


def _check_linear(model: Any) -> None:
    name, cap = model.cfg.model_name, soft_cap(model)
    if cap > 0:
        raise ValueError(
            f"{name} caps its logits at {cap:g}, so that no sum of components gives them: use a model without a cap"
        )
    if not has_formula(model):
        raise ValueError(
            f"no formula gives what {name} makes of its last block's output (a final norm that is neither RMSNorm nor "
            "LayerNorm, or a module in its place), so that no sum of components gives its logits: use another model"
        )


def _check_sum(
    model: Any, parts: Float[Tensor, "question component"], differences: Float[Tensor, "question run"]
) -> None:
    """The split is exact only where the stream is nothing but the sum of what the model's own blocks write.

    Raises:
        ValueError: the components do not add up to the change of the logits.
    """
    change = differences[:, 1] - differences[:, 0]
    error = (parts.sum(1) - change).abs() / (parts.abs().sum(1) + differences.abs().sum(1)).clamp_min(1e-30)
    if float(error.max()) > 8 * rounding(model):
        raise ValueError(
            f"the components miss the change of the logits by {float(error.max()):.2g} of their size: something else "
            f"than attention and MLPs of {model.cfg.model_name} writes to the stream (blocks of another kind, a scale "
            "of its own, or hooks or modules of yours)"
        )


def _needs_format(pairs: ContrastSet | Sequence[Question]) -> bool:
    return isinstance(pairs, ContrastSet) or any(not isinstance(question[0], Prompt) for question in pairs)


def _encode(
    model: Any, pairs: ContrastSet | Sequence[Question], prompt_format: PromptFormat | None, system: str | None
) -> tuple[list[Prompt], list[tuple[int, int]]]:
    """Prompts, and the ids of the positive and the negative token that may follow each."""
    if len(pairs) == 0:
        raise ValueError("no questions given: expected at least one")
    prompts, tokens = [], []
    if isinstance(pairs, ContrastSet):
        if pairs.kind != "ab":
            raise ValueError(
                f"{pairs.name!r} has completions, which have no one logit difference: use A/B pairs, or give "
                "(prompt, positive token, negative token) for the tokens that tell the answers apart"
            )
        assert prompt_format is not None
        tokenizer = model.tokenizer
        warn_of_words(prompt_format, tokenizer, [pair.question for pair in pairs], system=system)
        for pair in pairs:
            letters = (pair.positive[1], pair.negative[1])
            prompt, ids = encode_letters(prompt_format, tokenizer, pair.question, letters, system=system, warn=False)
            prompts.append(prompt)
            tokens.append((ids[0], ids[1]))
        return prompts, tokens
    for text, positive, negative in pairs:
        if isinstance(text, Prompt) and system:
            raise ValueError("got a system prompt for a Prompt, which is taken as it is: give a question")
        if not isinstance(text, Prompt) and is_question(text):
            assert prompt_format is not None
            text = prompt_format.encode(model.tokenizer, text, system=system)
        check_prompt(model, text)
        assert isinstance(text, Prompt)
        chosen = (_token_id(model, positive), _token_id(model, negative))
        if chosen[0] == chosen[1]:
            raise ValueError(f"{positive!r} and {negative!r} are the same token, {chosen[0]}: expected two")
        prompts.append(text)
        tokens.append(chosen)
    return prompts, tokens


def _token_id(model: Any, token: str | int) -> int:
    if not isinstance(token, str):
        token = check_count("a token", token, least=0)
        if not 0 <= token < model.cfg.d_vocab:
            raise ValueError(f"token id {token} is out of range: {model.cfg.model_name} has {model.cfg.d_vocab} tokens")
        return token
    if not is_unicode(token):
        raise ValueError(f"got the token {token!r}, expected a text: half a surrogate pair is none")
    if model.tokenizer is None:
        raise TypeError("this model has no tokenizer: give token ids, or load it from a folder with tokenizer files")
    ids = model.tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        pieces = model.tokenizer.convert_ids_to_tokens(ids)
        raise ValueError(f"{token!r} is {len(ids)} tokens, {pieces}: expected one; mind leading blanks, or give its id")
    return ids[0]
