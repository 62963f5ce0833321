"""One self-contained HTML page: figures, texts side by side, tables and settings; it asks the network for nothing.

Every string is escaped by the template, since texts come from models and data.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING

from caa_lens.atomic_files import write_atomically
from caa_lens.extras import needed_for
from caa_lens.plots.token_background import background
from caa_lens.report.cells import Cells

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

OPEN_TEXTS = 6  # groups of texts that are unfolded at first
WIDE, NARROWEST = 768, 390  # pixels: panels side by side, which a phone scrolls; and a phone
_TAG = re.compile(r"</?\w[^<>]*>")  # plotly's small HTML in titles


@dataclass(frozen=True, slots=True, kw_only=True)
class ColoredText:
    """Tokens on a background that tells a value each: blue above 0, red below, strongest at `bound`."""

    caption: str
    tokens: Sequence[tuple[str, float]]
    bound: float

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise ValueError(f"bound must be positive, got {self.bound}: it is the value with the strongest colour")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Section:
    """A part of a report.

    Attributes:
        title: its heading.
        source: what it reproduces, e.g. "Figure 3".
        text: a paragraph.
        found: what the numbers say, a sentence each.
        figures: plotly figures.
        tokens: texts with coloured tokens.
        texts: groups of labelled texts to read side by side, `(name of the group, [(label, text), ...])`.
        cells: the questions behind the figures' cells, which a click on one, or a choice below them, shows.
        tables: frames, or `(caption, frame)`, shown with their columns (reset the index to show it).
        skipped: why there is nothing but a title.
    """

    title: str
    source: str = ""
    text: str = ""
    found: Sequence[str] = ()
    figures: "Sequence[go.Figure]" = ()
    tokens: Sequence[ColoredText] = ()
    texts: Sequence[tuple[str, Sequence[tuple[str, str]]]] = ()
    cells: Cells | None = None
    tables: "Sequence[pd.DataFrame | tuple[str, pd.DataFrame]]" = ()
    skipped: str = ""

    def captioned_tables(self) -> "list[tuple[str, pd.DataFrame]]":
        """Tables with their captions, empty ones where none was given."""
        return [table if isinstance(table, tuple) else ("", table) for table in self.tables]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """One run's sections and settings; `title` is a heading of its own, none for an only part."""

    title: str = ""
    sections: Sequence[Section]
    settings: Mapping[str, object] = field(default_factory=dict)


def write_report(
    path: str | Path, *, title: str, lead: str, sections: Sequence[Section], settings: Mapping[str, object]
) -> Path:
    """Write the page of one run, atomically, and return its path. The plotly script is put in once (about 5 MB)."""
    return write_parts(path, title=title, lead=lead, parts=[Part(sections=sections, settings=settings)])


def write_parts(path: str | Path, *, title: str, lead: str, parts: Sequence[Part]) -> Path:
    """Write one page of several runs, atomically, and return its path."""
    from importlib.metadata import version

    with needed_for("reports"):
        from jinja2 import Environment, PackageLoader
    from plotly.offline import get_plotlyjs

    from caa_lens.plots.style import DARK, LIGHT

    environment = Environment(
        loader=PackageLoader("caa_lens.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html").render(
        title=title,
        lead=lead,
        parts=[_rendered_part(part, f"part{i}") for i, part in enumerate(parts)],
        plotly_js=get_plotlyjs(),
        themes={name: theme.to_plotly_json() for name, theme in (("light", LIGHT), ("dark", DARK))},
        version=version("caa-lens"),
        open_texts=OPEN_TEXTS,
    )
    return write_atomically(Path(path), lambda temporary: temporary.write_text(page, encoding="utf-8"))


def _rendered_part(part: Part, anchor: str) -> dict[str, object]:
    shown = [section for section in part.sections if not section.skipped]
    return {
        "title": part.title,
        "sections": [_rendered(section, f"{anchor}-{i}") for i, section in enumerate(shown)],
        "skipped": [section for section in part.sections if section.skipped],
        "settings": {key: _setting(value) for key, value in part.settings.items() if value not in (None, "")},
        "anchor": anchor,
    }


def _rendered(section: Section, anchor: str) -> dict[str, object]:
    return {
        "anchor": anchor,
        "title": section.title,
        "source": section.source,
        "text": section.text,
        "found": section.found,
        "figures": [_rendered_figure(figure) for figure in section.figures],
        "tokens": [
            {
                "caption": one.caption,
                "tokens": [(text, value, background(value, one.bound)) for text, value in one.tokens],
            }
            for one in section.tokens
        ],
        "cells": section.cells and section.cells.plain(),
        "texts": section.texts,
        "tables": [
            {
                "caption": caption,
                "columns": list(table.columns),
                "rows": [[_cell(c) for c in row] for row in table.itertuples(index=False)],
            }
            for caption, table in section.captioned_tables()
        ],
    }


def _rendered_figure(figure: "go.Figure") -> dict[str, object]:
    """A figure with its title taken out, since a title in the page wraps, and one in a figure is cut off on a phone."""
    import plotly.graph_objects as go

    from caa_lens.plots.style import LIGHT

    about = figure.layout.meta or {}
    taken = about.get("title_height", 0)
    top = figure.layout.margin.t - taken if taken else 40
    untitled = go.Figure(figure).update_layout(title=None, margin={"t": top}, template=LIGHT)
    # The page has a theme, and its script puts it on; colours of its own would not change with it.
    untitled.update_layout(font={"color": None}, paper_bgcolor=None, plot_bgcolor=None)
    if figure.layout.height and taken:
        untitled.update_layout(height=figure.layout.height - taken)
    config = {"responsive": True, "displayModeBar": False}
    width = about.get("min_width", WIDE if _has_columns(figure) else 0)
    return {
        "title": about.get("title") or unescape(_TAG.sub(" ", figure.layout.title.text or "")),
        "subtitle": about.get("subtitle", ""),
        "html": untitled.to_html(full_html=False, include_plotlyjs=False, config=config),
        "min_width": width if width > NARROWEST else 0,
        "cells": about.get("cells"),
    }


def _has_columns(figure: "go.Figure") -> bool:
    """Whether panels stand side by side: too wide for a phone, where such a figure scrolls."""
    return len({axis.domain[0] for axis in figure.select_xaxes() if axis.domain}) > 1


def _cell(value: object) -> str | list[str]:
    """A list is of tokens, which become chips; what is not known is empty."""
    if value is None:
        return ""
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    return [str(one) for one in value] if isinstance(value, list | tuple) else str(value)


def _setting(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)
