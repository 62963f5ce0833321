"""The logit lens of the residual stream: what each layer would say, steered and unsteered.

    lens(h) = cap( norm(h) W_U + b_U )

the logits that the model would give if h were the last block's output, with the model's own final norm and soft cap
(see `unembedding`). At the last layer this is the model itself. The lens is computed in float32; a model in half
precision rounds its own logits. Source: nostalgebraist, "interpreting GPT: the logit lens" (2020).

That says what a state looks like. With reading="causal" it is what the state disposes the model to say::

    lens( J_l h ),      J_l = mean over prompts, and over read positions p, of sum over t <= p of dF_l(p) / dh_l(t)

with F_l the last block's output as a function of layer l's stream, and t from the steering start on. J_l is of other
prompts than the one that is read: at the prompt itself it would say next to nothing, since what a block with a norm in
front writes does not change when its whole input grows. No matrix is fitted: only the products J_l h are computed, one
row of a staircase each. At the last layer J_l is the identity.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from caa_lens.arguments import check_count, check_list, describe
from caa_lens.contrast.messages import Asked
from caa_lens.engine.edits import Edit
from caa_lens.engine.operators import name_of
from caa_lens.engine.overflow import check_finite
from caa_lens.engine.positions import Reach
from caa_lens.engine.streams import editing, last_residual, reading
from caa_lens.interpretation.lens_downstream import carried_down
from caa_lens.interpretation.lens_prompts import DEFAULT_PLACE, prompts_to_read
from caa_lens.interpretation.words import show_token
from caa_lens.models.checks import check_layers, check_model
from caa_lens.models.placement import device_behind, device_of_tokens, dtype_name
from caa_lens.models.unembedding import final_logits
from caa_lens.plots.lens import residual_heatmaps
from caa_lens.prompts.batches import check_fits, check_steered
from caa_lens.prompts.checks import as_prompt
from caa_lens.prompts.prompt_formats import Prompt, PromptFormat
from caa_lens.provenance import Provenance, last_part
from caa_lens.results import Result
from caa_lens.steering.interventions import Intervention, Steering, as_interventions
from caa_lens.steering.placing import placed
from caa_lens.steering.steered_runs import warn_past_the_end

STATES_AT_ONCE = 64  # rows of logits in memory: 64 x d_vocab x 4 bytes
LAST_POSITIONS = 12


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ResidualLens(Result):
    """What the residual stream says at each layer and position, without and with steering.

    Attributes:
        frame: one row a run, layer and position. Columns `steered, layer, position, token_in` (the token that is read
            there), `top_token, top_token_id, probability` (the lens' first choice for the next token), and what the
            lens makes of the model's own next token at this position, unsteered and steered: `unsteered_answer,
            p_unsteered_answer, rank_unsteered_answer`, and the same with `steered_answer`. Rank 1 is the first choice.
            Without vectors there are neither steered rows nor `steered_answer` columns.
        prompt: what was run.
        steered_layers: the layers that are steered, ascending.
        steer_start: the first steered position; None without vectors.
        settings: model, dtype, and the reading if it is "causal".
        provenance: of each intervention's vector, by the intervention in words.
    """

    prompt: Prompt
    steered_layers: tuple[int, ...]
    steer_start: int | None

    @property
    def interventions(self) -> tuple[str, ...]:
        """What was done in the steered run, in words; nothing without vectors."""
        return tuple(self.provenance)

    def summary(self) -> pd.DataFrame:
        """What each run says in the end, and the layer from which on the lens says it, by position.

        Columns `position, token_in, steered, answer, settles_at`.
        """
        rows = []
        for steered in self._runs():
            run = "steered" if steered else "unsteered"
            read = self.frame[self.frame["steered"] == steered].drop_duplicates("position")
            for position, token, answer in zip(read["position"], read["token_in"], read[f"{run}_answer"], strict=True):
                rows.append((position, token, steered, answer, self.settles_at(position, steered=steered)))
        table = pd.DataFrame(rows, columns=["position", "token_in", "steered", "answer", "settles_at"])
        return table.astype({"settles_at": "Int64"}).sort_values(["position", "steered"], ignore_index=True)

    def _runs(self) -> tuple[bool, ...]:
        return (False, True) if self.interventions else (False,)

    def settles_at(self, position: int | None = None, *, steered: bool | None = None) -> int | None:
        """The first layer from which on a run's own answer is the lens' first choice at every layer read above.

        Args:
            position: the last one read by default.
            steered: which run and answer; the steered one by default, if there is one.

        Returns:
            A layer, or None if the answer is not the first choice at the last layer read.
        """
        last = int(self.frame["position"].max())
        position = last if position is None else check_count("position", position, least=0)
        if not isinstance(steered, bool | None):
            raise TypeError(f"steered must be True, False or None, got {describe(steered)}")
        steered = bool(self.interventions) if steered is None else steered
        rows = self.frame[(self.frame["position"] == position) & (self.frame["steered"] == steered)]
        if rows.empty:
            raise ValueError(
                f"no {'steered' if steered else 'unsteered'} rows at position {position}: "
                f"expected one of {sorted(set(self.frame['position']))}" + (", or vectors=..." if steered else "")
            )
        rank = rows.sort_values("layer", ascending=False)[f"rank_{'steered' if steered else 'unsteered'}_answer"]
        layers = sorted(rows["layer"], reverse=True)
        settled = None
        for layer, is_first in zip(layers, rank == 1, strict=True):
            if not is_first:
                break
            settled = layer
        return settled

    def plot(self) -> go.Figure:
        """Heat maps of the unsteered and the steered run: layer x position, cells are tokens, colour is probability."""
        return residual_heatmaps(
            self.frame,
            settles_at={"steered" if run else "unsteered": self.settles_at(steered=run) for run in self._runs()},
            steered_layers=self.steered_layers,
            steer_start=self.steer_start,
            model=last_part(self.settings.get("model", "")),
        )

    def __repr__(self) -> str:
        last = self.frame[self.frame["position"] == self.frame["position"].max()]
        says = []
        for steered in self._runs():
            answer = last[f"{'steered' if steered else 'unsteered'}_answer"].iloc[0]
            settled = self.settles_at(steered=steered)
            where = "not at the layers read" if settled is None else f"from layer {settled} on"
            says.append(f"{'steered' if steered else 'unsteered'} {answer!r} {where}")
        n_layers, n_pos = self.frame["layer"].nunique(), self.frame["position"].nunique()
        return f"ResidualLens({n_layers} layers x {n_pos} positions, {'; '.join(says)})"


@torch.inference_mode()
def residual_lens(
    model: Any,
    prompt: Asked | Prompt,
    *,
    vectors: Sequence[Steering] = (),
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    prompt_format: PromptFormat | str | None = None,
    system: str | None = None,
    reading: str = "logit",
    reference: Sequence[Asked | Prompt] | None = None,
    place: str = DEFAULT_PLACE,
    progress: bool = True,
) -> ResidualLens:
    """Read the stream through the logit lens, at every layer and position, in one run without and one with steering.

    Args:
        prompt: a question (words or messages, put into the model's format) or a `Prompt`.
        vectors: vectors, `(vector, multiplier)` pairs or `Intervention`s; steering starts at the instruction's last
            token, as everywhere. A layer is read after what is added to it.
        layers: 0-based blocks; all by default.
        positions: counted from the prompt's first token; the last 12 by default.
        prompt_format, system: how a question becomes a prompt.
        reading: "logit", what a state looks like, or "causal", what it disposes the model to say.
        reference: questions or `Prompt`s over which "causal" averages; eight bundled ones by default.
        place: where these are read, as in `logit_lens`.

    Raises:
        TypeError: for vectors that are not in a list, or a question without a tokenizer.
        ValueError: for a layer or position out of range, a multiplier `[batch]`, or a vector that does not fit.
    """
    check_model(model)
    prompt = as_prompt(model, prompt, prompt_format=prompt_format, system=system)
    check_fits(prompt, model.cfg.n_ctx)
    layers = check_layers(model, layers)
    where = _check_positions(prompt, positions)
    if isinstance(vectors, Sequence) and vectors:
        check_steered(prompt)
    interventions = placed(model, as_interventions(model, vectors), [prompt])
    edits = [one.edit(prompt.steer_start) for one in interventions]
    for one in interventions:
        for name, value in (("multiplier", one.multiplier), ("start", one.start)):
            if value is not None and torch.as_tensor(value).numel() != 1:
                raise ValueError(f"{name} must be one number, got {value}: call once for each")

    warn_past_the_end(edits, len(prompt), stacklevel=3)
    if reading not in ("logit", "causal"):
        raise ValueError(f"unknown reading {reading!r}: expected logit or causal")
    if reading == "logit" and reference is not None:
        raise ValueError("reference=... is of reading='causal'; the logit lens looks at no other prompt: leave it out")
    runs = {False: _run(model, prompt, (), where)}
    if interventions:
        runs[True] = _run(model, prompt, edits, where)
    for resid in runs.values():
        check_finite(model, resid, "residuals")
    # What each run says in the end, [pos]; the last layer is read for this even if it is not among `layers`.
    answers = {steered: _first_choice(model, resid[-1]) for steered, resid in runs.items()}
    name_of = {steered: "steered_answer" if steered else "unsteered_answer" for steered in runs}

    states_of = {steered: resid[list(layers)] for steered, resid in runs.items()}
    if reading == "causal":
        read = prompts_to_read(
            model, reference, pairs=None, behavior="sentiment", place=place, prompt_format=prompt_format
        )
        carried = carried_down(model, torch.cat(list(states_of.values()), dim=1), layers, read, progress=progress)
        states_of = dict(zip(states_of, carried.split(len(where), dim=1), strict=True))

    frames = []
    for steered in runs:
        states = states_of[steered].flatten(0, 1)  # [layer * pos, d_model], positions fastest
        wanted = torch.stack([answer.repeat(len(layers)) for answer in answers.values()], dim=1)
        top, probability, chosen, rank = _read_states(model, states, wanted)
        frame = pd.DataFrame(
            {
                "steered": steered,
                "layer": [layer for layer in layers for _ in where],
                "position": list(where) * len(layers),
                "token_in": [show_token(model.tokenizer, prompt.tokens[pos]) for pos in where] * len(layers),
                "top_token": [show_token(model.tokenizer, token) for token in top.tolist()],
                "top_token_id": top.tolist(),
                "probability": probability.tolist(),
            }
        )
        for i, (of_run, answer) in enumerate(answers.items()):
            shown = [show_token(model.tokenizer, token) for token in answer.tolist()]
            frame[name_of[of_run]] = shown * len(layers)
            frame[f"p_{name_of[of_run]}"] = chosen[:, i].tolist()
            frame[f"rank_{name_of[of_run]}"] = rank[:, i].tolist()
        frames.append(frame)
    return ResidualLens(
        frame=pd.concat(frames, ignore_index=True),
        settings={
            "model": str(model.cfg.model_name),
            "dtype": dtype_name(model),
        }
        | ({"reading": reading, "place": place} if reading == "causal" else {}),
        provenance=_by_words(interventions),
        prompt=prompt,
        steered_layers=tuple(sorted({one.layer for one in interventions if one.layer is not None})),
        steer_start=min((at for edit in edits if (at := Reach.of(edit.positions).first) is not None), default=None),
    )


def _check_positions(prompt: Prompt, positions: Sequence[int] | None) -> tuple[int, ...]:
    n_pos = len(prompt)
    if positions is None:
        return tuple(range(max(0, n_pos - LAST_POSITIONS), n_pos))
    positions = check_list("positions", positions, int)
    if not positions:
        raise ValueError("no positions given: expected at least one")
    for position in positions:
        if not 0 <= position < n_pos:
            raise ValueError(f"position {position} is out of range: the prompt has positions 0 to {n_pos - 1}")
    return tuple(sorted(set(positions)))


def _by_words(interventions: Sequence[Intervention]) -> dict[str, Provenance]:
    """The vectors' provenance by what is done with them; what is done twice is numbered."""
    found: dict[str, Provenance] = {}
    for one in interventions:
        words = text = _in_words(one)
        n = 1
        while text in found:
            n += 1
            text = f"{words} ({n})"
        found[text] = one.provenance or Provenance()
    return found


def _in_words(intervention: Intervention) -> str:
    about = intervention.provenance or Provenance()
    text = about.expression or f"{about.behavior}[{intervention.layer}]"
    at = "" if intervention.where is None else f", {Reach.of(intervention.edit().positions)}"
    what = name_of(intervention.operator)
    return f"{what} {float(intervention.multiplier):g} * {text} at layer {intervention.layer}{at}"


def _run(
    model: Any, prompt: Prompt, edits: Sequence[Edit], positions: Sequence[int]
) -> Float[Tensor, "layer pos d_model"]:
    """`resid_post` of every layer at some positions, as the next block gets it: after the steering."""
    kept: list[Tensor] = []
    n_layers, device = model.cfg.n_layers, device_behind(model)
    where = torch.tensor(positions, device=device_of_tokens(model))

    def keep(layer: int, resid: Tensor) -> None:
        kept.append(resid[0, where.to(resid.device)].float().to(device))

    tokens = torch.tensor([prompt.tokens], device=device_of_tokens(model))
    with editing(model, edits), reading(model, range(n_layers), keep):
        last_residual(model, tokens)
    return torch.stack(kept)


def _first_choice(model: Any, states: Float[Tensor, "state d_model"]) -> Int[Tensor, " state"]:
    return torch.cat([final_logits(model, some).argmax(-1) for some in states.split(STATES_AT_ONCE)])


def _read_states(
    model: Any, states: Float[Tensor, "state d_model"], wanted: Int[Tensor, "state answer"]
) -> tuple[Int[Tensor, " state"], Float[Tensor, " state"], Float[Tensor, "state answer"], Int[Tensor, "state answer"]]:
    """The first token and its probability, and the probability and rank of the wanted tokens."""
    pieces = []
    for some, tokens in zip(states.split(STATES_AT_ONCE), wanted.split(STATES_AT_ONCE), strict=True):
        logits = final_logits(model, some)
        probabilities = logits.softmax(-1)
        best = probabilities.max(-1)
        rank = [1 + (logits > logits.gather(1, token[:, None])).sum(-1) for token in tokens.unbind(1)]
        pieces.append((logits.argmax(-1), best.values, probabilities.gather(1, tokens), torch.stack(rank, dim=1)))
    top, probability, chosen, ranks = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return top, probability, chosen, ranks
