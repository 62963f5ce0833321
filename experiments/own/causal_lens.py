"""Where along the depth can a vector be read, if the model itself answers it?

    python experiments/own/causal_lens.py runs/causal-lens            # minutes on one thread; goes on if interrupted
    python experiments/own/causal_lens.py runs/causal-lens --place    # how the default place was chosen
    python experiments/own/causal_lens.py runs/causal-lens --picture docs/images/causal_lens.png    # needs a Chromium

Asked: (1) the median rank of twenty words of a behavior, by layer, in the readings `normed`, `in_context`, `causal` and
`effect`, beside random directions; the words are in `caa_lens/interpretation/data/behavior_words.json`, and were
written before any rank was looked at; (2) what the final norm's own derivative changes, against the response's norm;
(3) how much of a vector's effect the layers above it make; (4) from which layer on a layer's own top tokens can be told
from those of random directions.

Held-out words at held-out questions are reported. The place where prompts are read by default was chosen on the other
words, at questions of training pairs (`--place`). What was found stands in `docs/interpretation.md`, with this command.
"""

import argparse
import json
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

import caa_lens as cl
from caa_lens.atomic_files import write_atomically
from caa_lens.interpretation.lens_controls import ranks_of
from caa_lens.interpretation.lens_downstream import carried_down
from caa_lens.interpretation.lens_prompts import DEFAULT_PLACE, prompts_to_read
from caa_lens.interpretation.words import word_tokens
from caa_lens.models.unembedding import normalised, unembed_linear
from caa_lens.plots.style import BLUE, GREEN, GREY, GRID, ORANGE, styled

MODEL = "demo"
BEHAVIORS = ("sentiment", "formality")
LAYERS = tuple(range(2, 30, 3))
N_TRAIN, N_QUESTIONS, N_PAIRS, N_ATTRIBUTED = 48, 8, 10, 4
LINES = {  # how each reading is drawn
    "normed": (GREY, "dot"),
    "in_context": (GREY, "solid"),
    "causal": (ORANGE, "solid"),
    "effect": (BLUE, "dash"),
}
ANSWERS = {"sentiment": ("Good", "Bad"), "formality": ("Dear", "Hey")}  # whose logits are attributed
WORDS = json.loads((files("caa_lens.interpretation") / "data" / "behavior_words.json").read_text(encoding="utf-8"))


class Study:
    """One model and folder; every part leaves a file and is not computed again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._model = folder, None

    @property
    def model(self):
        if self._model is None:
            self._model = cl.load_model(MODEL)
        return self._model

    def part(self, name: str, compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        file = self.folder / f"{name}.csv"
        if not file.exists():
            frame = compute()
            write_atomically(file, lambda temporary: frame.to_csv(temporary, index=False))
        return pd.read_csv(file)

    def vectors(self, behavior: str) -> cl.SteeringVectors:
        file = self.folder / f"{behavior}.safetensors"
        if not file.exists():
            cl.extract(self.model, self.split(behavior)[0]).save(file)
        return cl.SteeringVectors.load(file)

    def split(self, behavior: str) -> tuple[cl.ContrastSet, cl.ContrastSet]:
        train, test = cl.ContrastSet.load(behavior).split(test=20, seed=0)
        return train.sample(N_TRAIN, seed=0), test

    def questions(self, behavior: str) -> list[str]:
        return [pair.question for pair in self.split(behavior)[1]][:N_QUESTIONS]


def ranks(study: Study, behavior: str, reading: str) -> pd.DataFrame:
    pairs = study.split(behavior)[1].sample(N_PAIRS, seed=0) if reading == "in_context" else None
    return cl.word_ranks(
        study.model,
        study.vectors(behavior),
        WORDS[behavior]["held_out"],
        layers=LAYERS,
        reading=reading,
        pairs=pairs,
        prompts=study.questions(behavior) if reading in ("causal", "effect") else None,
    ).medians()


def norm_of_the_response(study: Study, behavior: str) -> pd.DataFrame:
    """Median ranks if the response is put through the final norm as if it were a stream of its own."""
    model, vectors = study.model, study.vectors(behavior)
    read = prompts_to_read(
        model, study.questions(behavior), pairs=None, behavior=behavior, place=DEFAULT_PLACE, prompt_format=None
    )
    states = torch.stack([vectors[layer].direction for layer in LAYERS])[:, None]
    carried = carried_down(model, states, LAYERS, read)[:, 0]
    tokens = torch.tensor([word_tokens(model.tokenizer, word)[0] for word in WORDS[behavior]["held_out"]])
    scores = unembed_linear(model, normalised(model, carried))
    medians = [float(ranks_of(each, tokens).double().quantile(0.5)) for each in scores]
    return pd.DataFrame({"layer": LAYERS, "median": medians})


def tokens_by_layer(study: Study, behavior: str, reading: str) -> pd.DataFrame:
    lens = cl.logit_lens(
        study.model,
        study.vectors(behavior),
        layers=LAYERS,
        k=6,
        reading=reading,
        prompts=study.questions(behavior),
    )
    return lens.by_layer().merge(lens.summary(6).reset_index().drop(columns="verdict"), on="layer")


def shares(study: Study, behavior: str) -> pd.DataFrame:
    """The share of a vector's effect that the layers above make: 1 - its direct share."""
    model, vectors = study.model, study.vectors(behavior)
    asked = [(f"{question} In one word:", *ANSWERS[behavior]) for question in study.questions(behavior)[:N_ATTRIBUTED]]
    rows = []
    for layer in LAYERS:
        found = cl.interpretation.attribute_logits(model, asked, vectors[layer], progress=False)
        rows.append((layer, 1 - found.direct_share, found.total))
    return pd.DataFrame(rows, columns=["layer", "share_of_later_layers", "total"])


def places(study: Study, behavior: str) -> pd.DataFrame:
    """Development words at questions of training pairs, without controls."""
    questions = [pair.question for pair in study.split(behavior)[0]][:N_QUESTIONS]
    found = {}
    for place in ("instruction", "answer"):
        found[place] = cl.word_ranks(
            study.model,
            study.vectors(behavior),
            WORDS[behavior]["development"],
            layers=LAYERS,
            reading="causal",
            place=place,
            prompts=questions,
            controls=0,
        ).medians()["median"]
    return pd.DataFrame({"layer": LAYERS, **found})


def figure(study: Study) -> go.Figure:
    """Of each behavior: the words' median rank by layer and reading above, what the layers above make of it below."""
    drawn = make_subplots(
        rows=2,
        cols=len(BEHAVIORS),
        row_heights=[0.7, 0.3],
        shared_xaxes=True,
        vertical_spacing=0.06,
        horizontal_spacing=0.09,
        subplot_titles=BEHAVIORS,
    )
    for column, behavior in enumerate(BEHAVIORS, start=1):
        found = {reading: pd.read_csv(study.folder / f"{behavior}-{reading}.csv") for reading in LINES}
        causal = found["causal"]
        drawn.add_scatter(
            x=[*LAYERS, *LAYERS[::-1]],
            y=[*causal["control_low"], *causal["control_high"][::-1]],
            fill="toself",
            fillcolor=GRID,
            line={"width": 0},
            name="random directions, causal",
            showlegend=column == 1,
            row=1,
            col=column,
        )
        for reading, (colour, dash) in LINES.items():
            drawn.add_scatter(
                x=LAYERS,
                y=found[reading]["median"],
                line={"color": colour, "dash": dash},
                mode="lines+markers",
                name=reading,
                showlegend=column == 1,
                row=1,
                col=column,
            )
        later = pd.read_csv(study.folder / f"{behavior}-shares.csv")
        # A share of a change that is hardly there says nothing.
        large = later["total"].abs() >= 0.1 * later["total"].abs().max()
        drawn.add_bar(
            x=list(LAYERS),
            y=later["share_of_later_layers"].where(large),
            marker_color=GREEN,
            name="made by later layers",
            showlegend=column == 1,
            row=2,
            col=column,
        )
    drawn = styled(
        drawn, title="Where the words of a behavior can be read", x="", y="", height=600, legend=True, panels=True
    )
    drawn.update_xaxes(title_text="layer of the vector", row=2)
    drawn.update_yaxes(type="log", range=[4.7, 2], tickvals=[100, 1000, 10000], row=1)
    drawn.update_yaxes(rangemode="tozero", tickformat=".0%", row=2)
    drawn.update_yaxes(title_text="median rank of 20 words", row=1, col=1)
    drawn.update_yaxes(title_text="share", row=2, col=1)
    return drawn.update_layout(width=880)


def picture(study: Study, file: Path) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "notebooks"))
    from run import draw

    (png,) = draw([json.loads(figure(study).to_json())])
    write_atomically(file, lambda temporary: temporary.write_bytes(png))


def show(title: str, frame: pd.DataFrame) -> None:
    print(f"\n### {title}\n\n| " + " | ".join(map(str, frame.columns)) + " |\n|" + "---|" * len(frame.columns))
    for row in frame.itertuples(index=False):
        print("| " + " | ".join(_cell(cell) for cell in row) + " |")


def _cell(cell: object) -> str:
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:,.0f}" if abs(cell) >= 20 else f"{cell:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--place", action="store_true")
    parser.add_argument("--picture", type=Path, help="draw a run that has ended into this PNG")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    study = Study(options.folder)
    if options.picture:
        picture(study, options.picture)
        return
    for behavior in BEHAVIORS:
        if options.place:
            place = study.part(f"{behavior}-places", lambda b=behavior: places(study, b))
            show(f"{behavior}: median rank of development words, by place", place)
            continue
        table = pd.DataFrame({"layer": LAYERS})
        for reading in ("normed", "in_context", "causal", "effect"):
            found = study.part(f"{behavior}-{reading}", lambda b=behavior, r=reading: ranks(study, b, r))
            table[reading] = found["median"]
            if "p_value" in found:
                lows, highs = found["control_low"], found["control_high"]
                table[f"{reading} controls"] = [f"{a:,.0f} to {b:,.0f}" for a, b in zip(lows, highs, strict=True)]
            if reading == "causal":
                table["causal p"] = found["p_value"]
        table["norm of response"] = study.part(f"{behavior}-norm", lambda b=behavior: norm_of_the_response(study, b))[
            "median"
        ]
        later = study.part(f"{behavior}-shares", lambda b=behavior: shares(study, b))
        table["by later layers"] = later["share_of_later_layers"]
        show(f"{behavior}: median rank of {len(WORDS[behavior]['held_out'])} held-out words", table)
        for reading in ("causal", "effect"):
            found = study.part(
                f"{behavior}-tokens-{reading}", lambda b=behavior, r=reading: tokens_by_layer(study, b, r)
            )
            show(f"{behavior}: tokens, {reading}", found)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    main()
