"""How much each token of a text resembles a steering vector: token similarity.

For the residual stream h of a token after block l (`resid_post`) and the vector v of the same layer::

    dot      h . v
    cosine   h . v / (||h|| ||v||)

The frame holds both. The paper's text (section 6, token similarity) says dot product, while its authors' code divides
by both norms: `cosine`, shown by default, is what their figure shows. The text is unsteered, unless the call stands
inside `with steer(...)`.

The first token of a text is an attention sink in many models, with a norm hundreds of times that of the others, and
its dot product would leave all other tokens white. So the colour scale is the largest value over the *other* tokens
(`skip_first=True`); the first one is still shown, in full colour if need be, and its true value is in the hover text.

Tokens are drawn by circuitsvis, see `token_colors`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from torch import Tensor

from caa_lens.arguments import as_float, check_count, describe
from caa_lens.contrast.messages import Asked
from caa_lens.engine.overflow import check_finite
from caa_lens.engine.streams import last_residual, reading
from caa_lens.interpretation.token_colors import TokenColors
from caa_lens.interpretation.words import show_token
from caa_lens.models.checks import check_layers, check_model
from caa_lens.models.placement import device_of_tokens, dtype_name
from caa_lens.plots.attribution import similarity_heatmap
from caa_lens.prompts.batches import check_fits
from caa_lens.prompts.checks import check_prompt, is_question
from caa_lens.prompts.prompt_formats import Prompt, PromptFormat, resolve_format
from caa_lens.provenance import last_part
from caa_lens.results import Result
from caa_lens.vectors.checks import as_vector_set, check_width
from caa_lens.vectors.steering_vectors import SteeringVector, SteeringVectors

MEASURES = ("cosine", "dot")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenSimilarity(Result):
    """Cosine and dot product of every token's `resid_post` with the vector of the same layer.

    Attributes:
        frame: columns `position, token, token_id, layer, cosine, dot`; positions count from 0, BOS included. `dot` is
            in squared units of the residual stream, `cosine` has none.
        measure: which one pictures show, "cosine" or "dot".
        pieces: the tokens' texts for reading, by position.
        answer_start: position of the answer's first token; the number of tokens if there is none.
        settings: model, dtype, prompt format, system prompt.
        provenance: of the `vectors`.
    """

    measure: str
    pieces: tuple[str, ...]
    answer_start: int

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({int(layer) for layer in self.frame["layer"]}))

    def summary(self, measure: str | None = None) -> pd.DataFrame:
        """One measure, one row a position and one column a layer."""
        return self.frame.pivot(index="position", columns="layer", values=_check_measure(measure or self.measure))

    def bound(self, measure: str | None = None, *, layer: int | None = None, skip_first: bool = True) -> float:
        """The largest absolute value over the tokens (but the first) of one layer or of all: where colours are full."""
        table = self.summary(measure) if layer is None else self.summary(measure)[[layer]]
        rest = table.iloc[1:] if skip_first and len(table) > 1 else table
        return max(float(rest.abs().to_numpy().max()), 1e-6)

    def show(
        self,
        layer: int | None = None,
        *,
        measure: str | None = None,
        skip_first: bool = True,
        bound: float | int | None = None,
    ) -> TokenColors:
        """The text with its tokens coloured: blue along the vector, red against it.

        Args:
            layer: one layer, with a colour scale of its own; a selector over all of them, with one scale, by default.
            measure: the result's own by default. Dot products grow with depth: choose a layer to see an early one's.
            skip_first: leave the first token out of the colour scale, see the module's text; it is still shown.
            bound: the value with full colour, e.g. the same for several texts.

        Raises:
            ValueError: for a layer or a measure that is not there, or a bound that is not positive.
        """
        measure = _check_measure(self.measure if measure is None else measure)
        if layer is not None:
            layer = check_count("layer", layer, least=0)
        if layer is not None and layer not in self.layers:
            raise ValueError(f"layer {layer} was not computed: expected one of {list(self.layers)}")
        if bound is not None:
            bound = as_float("bound", bound)
        if bound is not None and not bound > 0:
            raise ValueError(f"bound must be positive, got {bound}: it is the value with full colour")
        table = self.summary(measure) if layer is None else self.summary(measure)[[layer]]
        limit = self.bound(measure, layer=layer, skip_first=skip_first) if bound is None else float(bound)
        what = "dot product" if measure == "dot" else measure
        one = f", layer {table.columns[0]}" if len(table.columns) == 1 else "; choose a layer (hover; a click keeps it)"
        return TokenColors(
            caption=f"{self.provenance['vectors'].behavior}: {what} of each token's resid_post with the vector{one}. "
            f"{'Blue' if len(table.columns) == 1 else 'One colour'} along it, "
            f"{'red' if len(table.columns) == 1 else 'another'} against it, full colour at ±{_short(limit)}",
            tokens=self.pieces,
            values=tuple(tuple(float(f"{v:.4g}") for v in row) for row in table.to_numpy()),
            labels=tuple(str(column) for column in table.columns),
            bound=limit,
        )

    def plot(self, *, measure: str | None = None, skip_first: bool = True) -> go.Figure:
        """Heat map of one measure, a row a token and a column a layer."""
        measure = _check_measure(measure or self.measure)
        reach = self.bound(measure, skip_first=skip_first)
        about = self.provenance["vectors"]
        return similarity_heatmap(
            self.frame, measure, behavior=about.behavior, reach=reach, model=last_part(about.model)
        )

    def to_html(self, *, full_page: bool = True, script: bool = True) -> str:
        """`show()` as a self-contained page, or a fragment with or without circuitsvis' script."""
        return self.show().to_html(full_page=full_page, script=script)

    def __repr__(self) -> str:
        return (
            f"TokenSimilarity({self.provenance['vectors'].behavior}, {self.measure}, {len(self.pieces)} tokens x "
            f"{len(self.layers)} layers)"
        )

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict:
        """In Jupyter a similarity shows its text, coloured."""
        return {"text/plain": repr(self), "text/html": self.show()._repr_html_()}


@torch.inference_mode()
def token_similarity(
    model: Any,
    text: Asked | Prompt,
    vectors: SteeringVector | SteeringVectors,
    *,
    answer: str = "",
    layers: Sequence[int] | None = None,
    measure: str = "cosine",
    prompt_format: PromptFormat | str | None = None,
    system: str | None = None,
    raw_text: bool = False,
) -> TokenSimilarity:
    """Compare every token of a text with the vector of each layer.

        token_similarity(model, question, vectors, answer=generate(model, question))

    Args:
        text: a question (words or messages, put into the model's format), a `Prompt`, or any text with
            `raw_text=True`.
        answer: what follows the question, e.g. a generated text.
        layers: those of the vectors by default.
        measure: which one pictures show, "cosine" or "dot"; the frame has both.
        raw_text: tokenize `text` just as the tokenizer does by itself (Llama's puts BOS in front), without a format.

    Raises:
        ValueError: for an empty text or one longer than the context, an unknown measure, a vector of another width or
            without a direction, or an answer, format or system prompt for a `Prompt` or raw text.
        IndexError: for a layer without a vector.
    """
    _check_measure(measure)
    check_model(model)
    vectors = as_vector_set(vectors)
    check_width(model, vectors)
    layers = check_layers(model, vectors.layers if layers is None else layers)
    norms = dict(zip(vectors.layers, vectors.norms.tolist(), strict=True))
    for layer in layers:
        if layer in norms and norms[layer] == 0:
            raise ValueError(f"the vector of layer {layer} is zero: nothing can be similar to it")
    prompt, format_name = _encode(model, text, answer, prompt_format, system, raw_text)
    check_fits(prompt, model.cfg.n_ctx)
    device = device_of_tokens(model)
    directions = vectors.at(layers).directions.to(device).float()  # [layer d_model]
    kept: list[Tensor] = []  # stays on the device, so that no layer waits for it

    def keep(layer: int, resid: Tensor) -> None:
        h = resid[0].float()  # [pos d_model]
        v = directions[len(kept)].to(h.device)
        kept.append(torch.stack([h @ v, torch.cosine_similarity(h, v[None], dim=-1)]).to(device))

    tokens = torch.tensor([prompt.tokens], device=device)
    with reading(model, layers, keep):
        last_residual(model, tokens, n_layers=layers[-1] + 1)
    measures = torch.stack(kept, dim=1).cpu()  # [measure layer pos]
    check_finite(model, measures, "similarities")
    dots, cosines = measures.numpy()
    shown = [show_token(model.tokenizer, token) for token in prompt.tokens]
    frames = [
        pd.DataFrame(
            {
                "position": range(len(prompt)),
                "token": shown,
                "token_id": prompt.tokens,
                "layer": layer,
                "cosine": cosines[i],
                "dot": dots[i],
            }
        )
        for i, layer in enumerate(layers)
    ]
    return TokenSimilarity(
        frame=pd.concat(frames, ignore_index=True),
        settings={
            "model": str(model.cfg.model_name),
            "dtype": dtype_name(model),
            "prompt_format": format_name,
            "system": system or "",
        },
        provenance={"vectors": vectors.provenance},
        measure=measure,
        pieces=tuple(_piece(model.tokenizer, token) for token in prompt.tokens),
        answer_start=prompt.answer_start,
    )


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def _check_measure(measure: str) -> str:
    if measure not in MEASURES:
        raise ValueError(f"unknown measure {measure!r}: expected one of {', '.join(MEASURES)}")
    return measure


def _encode(
    model: Any,
    text: Asked | Prompt,
    answer: str,
    prompt_format: PromptFormat | str | None,
    system: str | None,
    raw: bool,
) -> tuple[Prompt, str]:
    """The tokens, and what their format is called."""
    if not isinstance(text, Prompt) and not is_question(text):
        raise TypeError(f"expected the text in words, one at a time, got {describe(text)}")
    if not isinstance(answer, str):
        raise TypeError(f"expected the answer in words, one at a time, got {describe(answer)}")
    if raw and not isinstance(text, str | Prompt):
        raise TypeError("got messages with raw_text=True, which takes a text as it is: give a text, or leave it out")
    if not isinstance(text, Prompt) and not raw:
        chosen = resolve_format(model, prompt_format)
        return chosen.encode(model.tokenizer, text, answer, system=system), chosen.name
    given = {"an answer": answer, "a prompt format": prompt_format, "a system prompt": system}
    for what, value in given.items():
        if value:
            kind = "raw text" if isinstance(text, str) else "a Prompt"
            raise ValueError(f"got {what} for {kind}, which is taken as it is: give a question, without raw_text=True")
    if isinstance(text, Prompt):
        check_prompt(model, text)
        return text, "as given"
    if model.tokenizer is None:
        raise TypeError("this model has no tokenizer: load it from a folder that has tokenizer files")
    assert isinstance(text, str)
    if not text.strip():
        raise ValueError("the text is empty: expected some text")
    tokens = tuple(model.tokenizer(text)["input_ids"])
    n = len(tokens)
    return Prompt(text=text, tokens=tokens, steer_start=0, answer_start=n, read=(n - 1, n)), "raw text"


def _piece(tokenizer: Any, token: int) -> str:
    """A token's text for reading in a row: leading blanks kept, a line break shown and made."""
    text = "" if tokenizer is None else tokenizer.decode([token])
    if not text.strip(" ") or "\N{REPLACEMENT CHARACTER}" in text:  # blanks, nothing, or half of a character
        return show_token(tokenizer, token)
    if not text.startswith(" ") and str(tokenizer.convert_ids_to_tokens(token)).startswith("▁"):
        text = " " + text  # sentencepiece drops the blank of a piece that is decoded alone
    return text.replace("\n", "\\n").replace("\t", "\\t") + ("\n" if "\n" in text else "")
