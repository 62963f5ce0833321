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

Tokens are drawn by circuitsvis (`ColoredTokens`, and `ColoredTokensMulti` with its layer selector) from its bundled
script; nothing is asked of the network. The script takes 1.3 MB, packed 0.5 MB, so only the first picture that a
process displays carries it, and the page keeps it for all others (see `TokenColors`). Until it is there, and wherever
scripts do not run, the tokens stand there in the colours of one layer.
"""

import base64
import gzip
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from uuid import uuid4

import pandas as pd
import plotly.graph_objects as go
import torch
from torch import Tensor

from caa_lens.arguments import as_float, check_count, describe
from caa_lens.atomic_files import write_atomically
from caa_lens.contrast.messages import Asked
from caa_lens.engine.overflow import check_finite
from caa_lens.engine.streams import last_residual, reading
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
NEGATIVE_COLOUR, POSITIVE_COLOUR = "#c8453b", "#3b7dd8"  # the ends of the heat maps' red and blue

POSITIVE_RGB, NEGATIVE_RGB = (59, 125, 216), (200, 69, 59)  # the same
FULLEST = 0.7  # opacity of the strongest colour of a picture without a script, so that text on it can be read

# An element runs the code, as a page that allows this script allows that one too.
UNPACK = """<script>
if (!window.caaLensCircuitsVis && !window.caaLensUnpacking) (async () => {
  window.caaLensUnpacking = true;
  const bytes = Uint8Array.from(atob("DATA"), (letter) => letter.charCodeAt(0));
  const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const element = document.createElement("script"), code = await new Response(unpacked).text();
  element.textContent = `window.caaLensCircuitsVis = (() => { ${code}\nreturn CircuitsVis; })();`;
  document.head.append(element);
  element.remove();
  window.dispatchEvent(new Event("caa-lens-circuitsvis"));
})();
</script>"""

_script_sent = False  # whether a picture that this process displayed has carried circuitsvis' script


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenColors:
    """Tokens coloured by values, symmetric about 0: a picture that displays itself in Jupyter.

    A page needs circuitsvis' script once. The picture that carries it leaves it on the page as
    `window.caaLensCircuitsVis`; pictures without it wait for that. It stays when that picture's output is cleared,
    until the page is loaded anew. Where it is not (a saved notebook without that output, one that is not trusted, a
    front end that keeps outputs apart, a site that shows code), a picture has the colours of one label, without a
    choice.

    Attributes:
        caption: what is shown, above the tokens.
        tokens: their texts.
        values: one row a token, one column a label.
        labels: what the selector offers; no selector if there is only one.
        bound: the value with full colour; its negative has the other colour.
    """

    caption: str
    tokens: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    labels: tuple[str, ...]
    bound: float

    def to_html(self, *, full_page: bool = True, script: bool = True) -> str:
        """The picture as HTML: a self-contained page, or a fragment with or without circuitsvis' script."""
        fragment = self._fragment()
        if full_page:
            head = '<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
            style = "<style>body { font: 15px sans-serif; margin: 2em }</style>"
            return f"{head}<title>{html.escape(self.caption)}</title>{style}\n{circuitsvis_script()}\n{fragment}"
        return f"{circuitsvis_script(packed=True)}\n{fragment}" if script else fragment

    def save(self, path: str | Path) -> Path:
        """Write a self-contained page, atomically."""
        page = self.to_html()
        return write_atomically(Path(path), lambda temporary: temporary.write_text(page, encoding="utf-8"))

    def _fragment(self) -> str:
        # circuitsvis sets a token's text as innerHTML, where `<s>` would vanish and `<img onerror=...>` would run, but
        # its hover text as plain text, where `&lt;s>` would read as such. A zero-width blank behind `<` and `&` makes
        # both of them plain characters in either place.
        tokens = [token.replace("&", "&\u200b").replace("<", "<\u200b") for token in self.tokens]
        props: dict[str, Any] = {"tokens": tokens, "negativeColor": NEGATIVE_COLOUR, "positiveColor": POSITIVE_COLOUR}
        if len(self.labels) == 1:
            element = "ColoredTokens"
            props |= {"values": [row[0] for row in self.values], "minValue": -self.bound, "maxValue": self.bound}
        else:
            # One bound for all labels: the widget keeps the first label's when another one is chosen.
            element, n = "ColoredTokensMulti", len(self.labels)
            props |= {"values": self.values, "labels": self.labels}
            props |= {"positiveBounds": [self.bound] * n, "negativeBounds": [-self.bound] * n}
        # Inside a script element only `</script` and `<!--` are special, so no `<` is left.
        text = json.dumps(props).replace("<", "\\u003c")
        name = f"caa-lens-{uuid4().hex}"
        return f"""<div style="margin: 15px 0">
<div style="margin-bottom: 8px">{html.escape(self.caption)}</div>
<div id="{name}" style="line-height: 1.8">{self._still()}</div>
</div>
<script>
(() => {{
  const props = {text};
  const draw = (triesLeft) => {{
    const vis = window.caaLensCircuitsVis;
    if (document.getElementById("{name}")) vis.render("{name}", vis.{element}, props);
    else if (triesLeft) setTimeout(draw, 100, triesLeft - 1);  // a notebook runs scripts before it attaches the output
  }};
  if (window.caaLensCircuitsVis) draw(50);
  else window.addEventListener("caa-lens-circuitsvis", () => draw(50), {{ once: true }});
}})();
</script>"""

    def _still(self) -> str:
        """The tokens in the colours of the middle label, without a script."""
        middle = len(self.labels) // 2
        spans = []
        for token, row in zip(self.tokens, self.values, strict=True):
            red, green, blue = POSITIVE_RGB if row[middle] > 0 else NEGATIVE_RGB
            strength = min(1.0, abs(row[middle]) / self.bound) * FULLEST
            style = f"background: rgba({red}, {green}, {blue}, {strength:.2f}); white-space: pre-wrap"
            spans.append(f'<span style="{style}" title="{row[middle]:.4g}">{html.escape(token)}</span>')
        choice = ""
        if len(self.labels) > 1:
            choice = (
                f'<div style="margin-top: 8px">Shown: {html.escape(self.labels[middle])}. To choose another one, trust '
                "the notebook and run it from the top in a new kernel, or write a page with "
                "<code>.show().save(path)</code>.</div>"
            )
        return "".join(spans) + choice

    def __repr__(self) -> str:
        return f"TokenColors({self.caption}, {len(self.tokens)} tokens x {len(self.labels)} layers)"

    def _repr_html_(self) -> str:
        global _script_sent  # once a process, as a page is told from another one by nothing else
        carry, _script_sent = not _script_sent, True
        return self.to_html(full_page=False, script=carry)


def circuitsvis_script(*, packed: bool = False) -> str:
    """circuitsvis' bundled script as an element that a page may hold any number of times: only the first one runs.

    Args:
        packed: compressed, to a third of the size, which the browser unpacks.
    """
    code = (files("circuitsvis") / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    code = code.replace("//# sourceMappingURL=iife.js.map", "")
    if packed:
        data = base64.b64encode(gzip.compress(code.encode(), mtime=0)).decode()
        return UNPACK.replace("DATA", data)
    code = code.replace("</script", "<\\/script")
    return f"""<script>
if (!window.caaLensCircuitsVis) {{
  window.caaLensCircuitsVis = (() => {{ {code}
    return CircuitsVis; }})();
  window.dispatchEvent(new Event("caa-lens-circuitsvis"));
}}
</script>"""


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
