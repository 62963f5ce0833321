"""What a logit lens of vectors found, and what it shows: the results of `lens`."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from caa_lens.arguments import check_count
from caa_lens.interpretation.lens_controls import READABLE, percentile_range, verdict
from caa_lens.interpretation.words import check_words
from caa_lens.plots.lens import rank_curves, token_heatmaps
from caa_lens.plots.tables import table
from caa_lens.provenance import label, last_part, name_of
from caa_lens.results import Result

SIDES = ("promoted", "suppressed")
BY_LAYER = ("agreement", "control_low", "control_high", "p_value", "verdict", "linearity", "size_ratio")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LogitLens(Result):
    """The most promoted and most suppressed tokens of each layer's vector.

    Attributes:
        frame: columns `layer, side, rank, token, token_id, score, probability`; `side` is "promoted" or "suppressed",
            rank 1 is the extreme; `score` is a centred logit, or for `effect` nats. `probability` is the softmax of the
            scores over the vocabulary for `direct` and `normed`; for the others it is the mean *change* of the
            probability (from -1 to 1; for `causal` to first order), of the vector alone, without background correction.
            With controls, the same in all rows of a layer: `agreement, control_low, control_high, p_value, verdict`,
            see `lens_controls`; and for `effect` `linearity` (the cosine of the finite change with the linear one over
            the vocabulary) and `size_ratio` (the finite change's size over the linear one's): both are 1 where the
            model answers this multiplier linearly.
        reading: "direct", "normed", "in_context", "causal" or "effect".
        settings: model, dtype, multiplier; pairs and their hash, controls, seed, place, where the reading has them.
        provenance: of the `vectors`.
    """

    reading: str

    def summary(self, k: int | None = None) -> pd.DataFrame:
        """One row a layer: the first `k` promoted and suppressed tokens, joined; with controls, a verdict.

        All that the lens was asked for, by default.
        """
        tokens = self.tokens(k)
        return tokens.assign(**{side: tokens[side].map("  ".join) for side in SIDES})

    def tokens(self, k: int | None = None) -> pd.DataFrame:
        """As `summary`, with the tokens of a cell in a tuple: to count, to compare, to draw one by one."""
        top = self.frame[self.frame["rank"] <= self._asked(k)].sort_values("rank", kind="stable")
        tokens = top.groupby(["layer", "side"])["token"].agg(tuple).unstack("side")[list(SIDES)]
        if "verdict" in self.frame:
            tokens.insert(0, "verdict", self.by_layer().set_index("layer")["verdict"])
        return tokens

    def _asked(self, k: int | None) -> int:
        return int(self.frame["rank"].max()) if k is None else check_count("k", k)

    def by_layer(self) -> pd.DataFrame:
        """One row a layer: how the vector stands beside its controls, and how linear the model's answer is."""
        columns = ["layer", *(name for name in BY_LAYER if name in self.frame)]
        return self.frame.drop_duplicates("layer")[columns].reset_index(drop=True)

    @property
    def readable_layers(self) -> tuple[int, ...]:
        """The layers whose reading is told from the controls'; none without controls."""
        if "verdict" not in self.frame:
            return ()
        of_each = self.by_layer()
        return tuple(int(layer) for layer in of_each.loc[of_each["verdict"] == READABLE, "layer"])

    def plot(self, k: int | None = None) -> go.Figure:
        """Heat maps of the first `k` promoted and suppressed: layer x rank, cells are tokens, colour is the score.

        All that the lens was asked for, by default.

        A layer that is not told from the controls has its name in brackets.
        """
        vectors = name_of(self.provenance["vectors"])
        model = last_part(self.provenance["vectors"].model)
        return token_heatmaps(self.frame, self._asked(k), vectors=vectors, reading=self.reading, model=model)

    def __repr__(self) -> str:
        vectors = self.provenance["vectors"].expression
        return f"LogitLens({vectors}, {self.reading})\n{self.summary().to_string()}"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict:
        """In Jupyter a lens shows its tokens, a chip each."""
        return {"text/plain": repr(self), "text/html": table(self.tokens(), caption=self._caption)}

    @property
    def _caption(self) -> str:
        about = self.provenance["vectors"]
        return f"{label(about)}, {self.reading}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WordRanks(Result):
    """Where named words stand among all tokens, by layer.

    Attributes:
        frame: columns `layer, word, token, token_id, pieces, rank, score`; rank 1 is the most promoted token of
            `d_vocab`. A word of several tokens is ranked by its first one: then `pieces` is larger than 1. With
            controls, `control_low` and `control_high`, the 5th and 95th percentile of the word's rank under them, and
            `percentile`, under how many in a hundred of them it stands at least as high.
        reading, settings, provenance: as in `LogitLens`.
        d_vocab: number of tokens, the rank of the most suppressed one.
        control_medians: by layer, the median rank of the words under every control; `causal` reads every one in both
            directions.
    """

    reading: str
    d_vocab: int
    control_medians: tuple[tuple[float, ...], ...] = ()

    def summary(self) -> pd.DataFrame:
        """Ranks, one row a layer and one column a word, in the order the words were given."""
        words = list(dict.fromkeys(self.frame["word"]))
        return self.frame.pivot(index="layer", columns="word", values="rank")[words]

    def medians(self) -> pd.DataFrame:
        """By layer, the median rank of all words, beside the controls' and with a verdict.

        Columns `layer, median, control_low, control_high, p_value, verdict`; those behind the median only with
        controls. `p_value` is one-sided: 1 + the number of controls under which the words stand at least as high, by 1
        + the number of controls.
        """
        rows: list[dict[str, Any]] = []
        by_layer = self.frame.groupby("layer")["rank"].agg(lambda ranks: median(ranks.tolist()))
        for layer, of_words in zip(by_layer.index.tolist(), by_layer.tolist(), strict=True):
            rows.append({"layer": layer, "median": float(of_words)})
        for row, controls in zip(rows, self.control_medians, strict=False):
            low, high = percentile_range(controls)
            p = (1 + sum(each <= row["median"] for each in controls)) / (1 + len(controls))
            n = int(self.settings.get("controls", len(controls)))
            row |= {"control_low": low, "control_high": high, "p_value": p, "verdict": verdict(p, n)}
        return pd.DataFrame(rows)

    def margin(self, positive: Sequence[str], negative: Sequence[str]) -> pd.DataFrame:
        """By layer, the mean score of some of the words, of others, and the difference, in logits.

        Columns `layer, positive, negative, margin`.
        """
        positive, negative = check_words(positive), check_words(negative)
        scores = self.frame.pivot(index="layer", columns="word", values="score")
        if missing := [word for word in [*positive, *negative] if word not in scores]:
            raise ValueError(f"{missing} were not ranked: expected some of {list(scores)}")
        means = scores[list(positive)].mean(axis=1).to_frame("positive")
        means["negative"] = scores[list(negative)].mean(axis=1)
        return means.assign(margin=means["positive"] - means["negative"]).reset_index()

    def plot(self) -> go.Figure:
        """Rank by layer, one line a word; the axis is logarithmic, with rank 1 on top. The band is the controls'."""
        vectors = name_of(self.provenance["vectors"])
        bands = self.medians() if self.control_medians else None
        return rank_curves(
            self.frame,
            vectors=vectors,
            reading=self.reading,
            d_vocab=self.d_vocab,
            controls=bands,
            model=last_part(self.provenance["vectors"].model),
        )

    def __repr__(self) -> str:
        vectors = self.provenance["vectors"].expression
        return f"WordRanks({vectors}, {self.reading}, of {self.d_vocab})\n{self.summary().to_string()}"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict:
        """In Jupyter ranks show their table."""
        caption = f"{label(self.provenance['vectors'])}, {self.reading}: rank of {self.d_vocab:,}"
        return {"text/plain": repr(self), "text/html": table(self.summary(), caption=caption)}
