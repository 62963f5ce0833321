"""The figure of what a check found in contrast pairs."""

import pandas as pd
import plotly.graph_objects as go

from caa_lens.plots.style import ORANGE, escaped, styled


def finding_bars(frame: pd.DataFrame, *, of: str, n_pairs: int) -> go.Figure:
    """How many pairs each finding is about.

    Args:
        frame: columns `finding, count, message`.
    """
    figure = go.Figure(
        go.Bar(
            x=frame["count"],
            y=frame["finding"],
            customdata=[[escaped(message)] for message in frame["message"]],
            orientation="h",
            marker={"color": ORANGE},
            hovertemplate="%{customdata[0]}<extra></extra>",
        )
    )
    what = f"findings in {n_pairs} pairs" if len(frame) else f"nothing found in {n_pairs} pairs"
    styled(figure, title=f"{of}: {what}", x="pairs", y="", height=180 + 40 * len(frame))
    figure.update_yaxes(autorange="reversed")
    return figure.update_xaxes(range=[0, n_pairs])
