"""What a set of vectors shows: a table and a figure, of each layer's norm and its cosine with the one before."""

from typing import TYPE_CHECKING

import torch

from caa_lens.provenance import Provenance, last_part, name_of
from caa_lens.vectors.algebra import subspaces

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from torch import Tensor


def by_layer(directions: "Tensor", layers: tuple[int, ...]) -> "pd.DataFrame":
    """Columns `layer, norm` (units of the residual stream) and `cosine_before`, with the layer before it in the set.

    A cosine is NaN for the first layer, and beside a vector of zeros.
    """
    import pandas as pd

    wide = directions.detach().double().cpu()
    norms = subspaces.length(wide).squeeze(-1)
    dots = (wide[1:] * wide[:-1]).sum(-1)
    cosines = torch.where(norms[1:] * norms[:-1] > 0, dots / (norms[1:] * norms[:-1]), torch.nan).clamp(-1, 1)
    before = [float("nan"), *cosines.tolist()]
    return pd.DataFrame({"layer": list(layers), "norm": norms.tolist(), "cosine_before": before})


def drawn(frame: "pd.DataFrame", about: Provenance) -> "go.Figure":
    """The figure of `by_layer`."""
    from caa_lens.plots.geometry import vector_curves

    return vector_curves(frame, of=name_of(about), model=last_part(about.model))


def written(frame: "pd.DataFrame", about: Provenance, d_model: int) -> str:
    """The table of `by_layer`, with what the vectors are above it."""
    from caa_lens.plots.tables import table

    pairs = f"{about.n_pairs} pairs" if about.n_pairs else ""
    said = [name_of(about), last_part(about.model), about.method, pairs, f"d_model {d_model}"]
    columns = {"cosine_before": "cosine with the layer before"}
    return table(frame.set_index("layer").rename(columns=columns), caption=", ".join(part for part in said if part))
