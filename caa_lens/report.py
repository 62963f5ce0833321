"""One self-contained HTML page: figures, texts side by side, tables and settings; it asks the network for nothing.

Every string is escaped by the template, since texts come from models and data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from caa_lens.storage import write_atomically

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Section:
    """A part of a report.

    Attributes:
        title: its heading.
        text: a paragraph.
        figures: plotly figures.
        texts: groups of labelled texts to read side by side, `(name of the group, [(label, text), ...])`.
        tables: frames, shown with their columns (reset the index to show it).
    """

    title: str
    text: str = ""
    figures: "Sequence[go.Figure]" = ()
    texts: Sequence[tuple[str, Sequence[tuple[str, str]]]] = ()
    tables: "Sequence[pd.DataFrame]" = ()


def write_report(
    path: str | Path, *, title: str, lead: str, sections: Sequence[Section], settings: Mapping[str, object]
) -> Path:
    """Write the page, atomically, and return its path. The plotly script is put in once (about 5 MB)."""
    from jinja2 import Environment, PackageLoader
    from plotly.offline import get_plotlyjs

    environment = Environment(loader=PackageLoader("caa_lens"), autoescape=True)
    page = environment.get_template("report.html").render(
        title=title,
        lead=lead,
        sections=[_rendered(section) for section in sections],
        settings={key: str(value) for key, value in settings.items()},
        plotly_js=get_plotlyjs(),
    )
    return write_atomically(Path(path), lambda temporary: temporary.write_text(page, encoding="utf-8"))


def _rendered(section: Section) -> dict[str, object]:
    return {
        "title": section.title,
        "text": section.text,
        "figures": [
            figure.to_html(
                full_html=False, include_plotlyjs=False, config={"responsive": True, "displayModeBar": False}
            )
            for figure in section.figures
        ],
        "texts": section.texts,
        "tables": [
            {
                "columns": list(table.columns),
                "rows": [[_cell(c) for c in row] for row in table.itertuples(index=False)],
            }
            for table in section.tables
        ],
    }


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
