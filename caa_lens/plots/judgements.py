"""The figure of a judge's scores."""

from html import escape

import pandas as pd
import plotly.graph_objects as go

from caa_lens.plots.style import BLUE, styled


def score_histogram(frame: pd.DataFrame, *, behavior: str, judge: str) -> go.Figure:
    """How many answers got which score, from 0 to 10 in steps of a half.

    Args:
        frame: column `score`, NaN where there is none.
    """
    scores = frame["score"].dropna()
    figure = go.Figure(
        go.Histogram(
            x=scores,
            xbins={"start": -0.25, "end": 10.25, "size": 0.5},
            marker={"color": BLUE},
            hovertemplate="score %{x}<br>%{y} answers<extra></extra>",
        )
    )
    figure.update_xaxes(range=[-0.5, 10.5], dtick=1)
    n_failed = len(frame) - len(scores)
    failed = f", {n_failed} without a score" if n_failed else ""
    title = f"{escape(behavior)}: {len(scores)} answers by judge {escape(judge)}{failed}"
    return styled(figure, title=title, x="score (0 to 10)", y="answers")
