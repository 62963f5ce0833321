"""The explorer in a notebook: the same session as the page's, shown by ipywidgets.

Texts are written on the kernel's event loop, a token at a time, so that sliders and buttons answer in between; a cell
that runs meanwhile makes the text wait.
"""

import asyncio
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from caa_lens.arguments import check_count, describe
from caa_lens.explorer.session import (
    SIDES,
    STEERED,
    UNSTEERED,
    Asked,
    Coloured,
    Event,
    Finished,
    LensRead,
    Piece,
    Session,
)
from caa_lens.explorer.shown import NOT_READ, end_html, legend_html, lens_html, piece_html, text_html, title_of
from caa_lens.explorer.turns import Said, Turns
from caa_lens.extras import needed_for
from caa_lens.prompts.prompt_formats import PromptFormat
from caa_lens.vectors.steering_vectors import SteeringVector, SteeringVectors

with needed_for("the explorer in a notebook"):
    import ipywidgets

SHOW_EVERY = 0.1  # seconds: each change of a text sends all of it to the browser
STYLE = """<style>
.caa-lens-explorer, .caa-lens-explorer .jupyter-widgets { overflow: visible; }
.caa-lens-explorer .widget-html-content { line-height: 1.45; white-space: normal; }
.caa-lens-explorer .soft { opacity: .8; font-size: .92em; }
.caa-lens-explorer p { margin: .2em 0 .6em; }
.caa-lens-explorer .text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7; }
.caa-lens-explorer .text span { border-radius: .15em; padding: .1em 0; }
.caa-lens-explorer .lenses { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .8em; }
.caa-lens-explorer .lens { font-size: .92em; width: 100%; margin: 0; border-collapse: collapse; table-layout: fixed; }
.caa-lens-explorer .lens caption { text-align: left; font-weight: 600; }
.caa-lens-explorer .lens td { text-align: left; white-space: nowrap; padding: .1em .2em; line-height: 1.5;
  overflow: hidden; text-overflow: ellipsis; }
.caa-lens-explorer .lens td.score { text-align: right; width: 3.7em; }
</style>"""


class Explorer:
    """Sliders, a prompt, both texts and the lens, as a cell's result.

    Attributes:
        session: what is explored.
        prompt, layer, multiplier, max_new_tokens, temperature, lens: the controls; their `value` may be set from code.
        write_button, stop_button: their `click()` is a click.
        box: everything, a widget to put into others.
    """

    def __init__(
        self, session: Session, *, prompt: str, layer: int, multiplier: float | int, max_new_tokens: int
    ) -> None:
        self.session, self._turns = session, Turns(session)
        low, high = session.multipliers
        wide, style = ipywidgets.Layout(width="auto"), {"description_width": "7em"}
        self.prompt = ipywidgets.Textarea(value=prompt, description="Prompt", rows=2, layout=wide, style=style)
        self.layer = ipywidgets.SelectionSlider(
            options=session.layers, value=layer, description="Layer", continuous_update=False, layout=wide, style=style
        )
        self.multiplier = ipywidgets.FloatSlider(
            value=multiplier,
            min=low,
            max=high,
            step=0.1,
            readout_format="+.1f",
            description="Multiplier",
            continuous_update=False,
            layout=wide,
            style=style,
        )
        self.max_new_tokens = ipywidgets.IntSlider(
            value=max_new_tokens,
            min=1,
            max=session.max_new_tokens,
            description="Tokens",
            continuous_update=False,
            layout=wide,
            style=style,
        )
        self.temperature = ipywidgets.FloatSlider(
            value=0.0,
            min=0.0,
            max=2.0,
            step=0.1,
            description="Temperature",
            continuous_update=False,
            layout=wide,
            style=style,
        )
        self.lens = ipywidgets.Checkbox(value=True, description="Read the causal lens", indent=False, layout=wide)
        self.write_button = ipywidgets.Button(description="Write", button_style="primary")
        self.stop_button = ipywidgets.Button(description="Stop", disabled=True)
        self._status = ipywidgets.HTML()
        self._texts = {side: ipywidgets.HTML(layout=wide) for side in SIDES}
        self._lens, self._legend = ipywidgets.HTML(layout=wide), ipywidgets.HTML()
        self._written = dict.fromkeys(SIDES, "")
        self._ends = dict.fromkeys(SIDES, "")
        self._titles = {side: title_of(side, layer, multiplier) for side in SIDES}
        self._shown = 0.0
        self._wrong: list[str] = []
        self._reading = False
        self.box = self._laid_out()
        self.write_button.on_click(lambda button: self._ask())
        self.stop_button.on_click(lambda button: self._turns.stop(self))
        for control in (self.layer, self.multiplier, self.max_new_tokens, self.temperature):
            control.observe(lambda change: self._ask(), "value")
        self._show_texts()

    async def done(self) -> None:
        """Wait until nothing is being written, as in a cell's `await explorer.done()`."""
        await self._turns.done()

    def html_of(self, side: str) -> str:
        """A text as it is shown: "unsteered" or "steered"."""
        return self._written[side] + self._ends[side]

    @property
    def lens_html(self) -> str:
        """The lens as it is shown."""
        return str(self._lens.value)

    @property
    def messages(self) -> tuple[str, ...]:
        """Errors and warnings of the latest text."""
        return tuple(self._wrong)

    def _laid_out(self) -> Any:
        columns = ipywidgets.Layout(grid_template_columns="repeat(auto-fit, minmax(17em, 1fr))", grid_gap="0 1.5em")
        note = [ipywidgets.HTML(f"<b>{escape(self.session.note)}</b>")] if self.session.note else []
        head = f"<b>{escape(self.session.name)}</b> of {escape(self.session.model_name)}"
        box = ipywidgets.VBox(
            [
                ipywidgets.HTML(STYLE + head),
                *note,
                self.prompt,
                ipywidgets.GridBox([self.layer, self.multiplier], layout=columns),
                ipywidgets.GridBox([self.max_new_tokens, self.temperature, self.lens], layout=columns),
                ipywidgets.HBox([self.write_button, self.stop_button, self._status]),
                ipywidgets.GridBox([self._texts[UNSTEERED], self._texts[STEERED], self._lens], layout=columns),
                self._legend,
            ]
        )
        box.add_class("caa-lens-explorer")
        return box

    def _ask(self) -> None:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self._status.value = "needs a notebook: no event loop runs here"
            return
        asked = Asked(
            prompt=self.prompt.value,
            layer=self.layer.value,
            multiplier=self.multiplier.value,
            max_new_tokens=self.max_new_tokens.value,
            temperature=self.temperature.value,
            lens=self.lens.value,
        )
        self._turns.ask(self, asked, lambda event: self._tell(asked, event))

    def _tell(self, asked: Asked, event: Event | Said) -> None:
        match event:
            case Piece(side=side, text=text):
                self._written[side] += piece_html(event) if text else ""
                if time.monotonic() - self._shown > SHOW_EVERY:
                    self._show_texts()
            case Finished(side=side):
                self._ends[side] = end_html(event)
                self._show_texts()
            case Coloured(side=side):
                self._written[side] = text_html(event)
                self._legend.value = f'<span class="soft">{legend_html(event)}</span>'
                self._show_texts()
            case LensRead(lens=lens):
                self._lens.value, self._reading = lens_html(event), lens is None
            case Said(kind="begun"):
                self._titles[STEERED] = title_of(STEERED, asked.layer, asked.multiplier)
                self._written, self._ends = dict.fromkeys(SIDES, ""), dict.fromkeys(SIDES, "")
                self._wrong = []
                self.stop_button.disabled, self._status.value = False, "writing …"
            case Said(kind="done"):
                self.stop_button.disabled = True
                if self._reading:
                    self._lens.value, self._reading = NOT_READ, False
                self._status.value = "" if self._wrong else "done"
                self._show_wrong()
            case Said(text=text):
                self._wrong.append(text)
                self._show_wrong()

    def _show_wrong(self) -> None:
        if self._wrong:
            self._status.value = "<br>".join(f"<b>{escape(text)}</b>" for text in self._wrong)

    def _show_texts(self) -> None:
        self._shown = time.monotonic()
        for side, widget in self._texts.items():
            widget.value = f'<b>{escape(self._titles[side])}</b><p class="text">{self.html_of(side)}</p>'

    def __repr__(self) -> str:
        return (
            f"Explorer({self.session.name} of {self.session.model_name}): a notebook shows it; elsewhere there is the "
            "page, caa-lens explore"
        )

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Any:
        """In Jupyter an explorer shows its controls."""
        return self.box._repr_mimebundle_()


def explore(
    model: Any,
    vectors: SteeringVectors | SteeringVector | str | Path,
    *,
    prompt: str = "How was your day?",
    layer: int | None = None,
    multiplier: float | int = 1.0,
    multipliers: Sequence[float | int] = (-4.0, 4.0),
    max_new_tokens: int = 60,
    max_chars: int = 2000,
    prompt_format: PromptFormat | str | None = None,
    system: str | None = None,
) -> Explorer:
    """Play with vectors in a notebook: sliders for layer and multiplier, both texts as they are written, and the lens.

        cl.explore(model, "sentiment.safetensors")

    Tokens are coloured by `token_similarity`, and the lens is `logit_lens(reading="causal")` of the layer. Outside of
    notebooks the same is a page: `caa-lens explore sentiment.safetensors`.

    Args:
        vectors: a set, one vector, or a file or folder of them.
        prompt, layer, multiplier: what the controls begin with; of the vectors' layers by default the middle one.
        multipliers: the ends of the slider.
        max_new_tokens: the length of a text to begin with; up to 200 or this can be asked for.
        max_chars: the longest prompt that is taken, in characters.
        prompt_format, system: of the prompts; the model's own format by default.

    Raises:
        ImportError: without ipywidgets: `pip install 'caa-lens[explore]'`.
        ValueError: for vectors of another width or of zeros, a layer that they do not have, or an empty range.
        IndexError: for a layer that the model does not have.
    """
    n_tokens = check_count("max_new_tokens", max_new_tokens)
    session = Session(
        model,
        vectors,
        multipliers=multipliers,
        max_chars=max_chars,
        max_new_tokens=max(200, n_tokens),
        prompt_format=prompt_format,
        system=system,
    )
    if not isinstance(prompt, str):
        raise TypeError(f"expected a prompt in words, got {describe(prompt)}")
    first = session.middle_layer if layer is None else layer
    asked = Asked(prompt=prompt or "?", layer=first, multiplier=multiplier, max_new_tokens=n_tokens)
    session.check(asked)
    return Explorer(session, prompt=prompt, layer=asked.layer, multiplier=multiplier, max_new_tokens=n_tokens)
