"""Tables as HTML for notebooks: numbers, texts, and tokens as chips that no line break parts.

Colours are the page's own, so that a table reads in light and dark notebooks alike.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from caa_lens.plots.style import escaped

CHIP = (
    "display: inline-block; box-sizing: border-box; white-space: pre; max-width: 100%; overflow: hidden; "
    "text-overflow: ellipsis; vertical-align: bottom; border: 1px solid rgba(128, 128, 128, 0.6); border-radius: 3px; "
    "padding: 0 0.3em; margin: 1px 3px 1px 0"
)
CELL = "text-align: left; vertical-align: top"
HIGHEST = "24em"  # a long table scrolls


def chips(tokens: Sequence[str]) -> str:
    """One chip a token: lines break between chips only, and a chip is as wide as its token."""
    return " ".join(f'<span style="{CHIP}">{escaped(token)}</span>' for token in tokens)


def table(frame: pd.DataFrame, *, caption: str = "") -> str:
    """A frame as a table, its index as the first column; a cell with several texts is one of chips."""
    index = frame.index.name or ""
    heads = "".join(f'<th style="{CELL}">{escaped(str(name))}</th>' for name in (index, *frame.columns))
    rows = "".join(
        f'<tr><th style="{CELL}">{escaped(str(name))}</th>'
        + "".join(f'<td style="{CELL}">{_shown(cell)}</td>' for cell in cells)
        + "</tr>"
        for name, cells in zip(frame.index, frame.itertuples(index=False), strict=True)
    )
    above = f'<caption style="{CELL}; caption-side: top">{escaped(caption)}</caption>' if caption else ""
    made = f"<table>{above}<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div style="max-height: {HIGHEST}; overflow: auto">{made}</div>' if len(frame) > 12 else made


def _shown(cell: object) -> str:
    if isinstance(cell, list | tuple | np.ndarray):
        return chips([str(token) for token in cell])
    if isinstance(cell, float):
        return "" if cell != cell else f"{cell:.4g}"
    return escaped(str(cell))
