"""Does what `caa_lens.reliability` says of pairs, before any steering, foretell what steering does?

    python -m experiments does_reliability_predict --model demo --out runs/reliability

Asked, over many behaviors (see `experiments/running/many_behaviors`): the rank correlation of the split-half cosine, of
every other number of `reliability`, and of the verdict, with the effect of steering on test questions, and whether it
is more than what the vector's norm alone foretells.

For each behavior and form: 24 pairs are read at five layers around the middle, `reliability` is asked, vectors are
extracted. Validation questions choose one of the five layers; test questions tell the effect,

    effect = mean(score(+1) - score(-1)) / standard deviation of the unsteered scores

which has no unit, so that letters (probabilities) and completions (nats a token) can be ranked together. The effect at
the middle layer, which nothing chose, is what is reported first. Controls at that layer: the same direction at a tenth
of the stream's norm for all behaviors, which takes the vector's own norm out; and a random direction of the vector's
norm. Nothing was tuned on what came out; thresholds of the verdict were set before, on planted data.
"""

import math
from typing import TYPE_CHECKING, Any

from experiments.running.costs import Cost, reading_cost, scoring_cost
from experiments.running.experiment import Experiment
from experiments.running.many_behaviors import LETTERS, Source, evals_folder, forms, parts, sources
from experiments.running.scores import UNSTEERED, scored, steered
from experiments.running.units import Frames, Unit, together

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from caa_lens.contrast.sets import ContrastSet
    from caa_lens.engine.pair_reading import PairActivations
    from caa_lens.report.page import Section
    from caa_lens.vectors.steering_vectors import SteeringVector
    from experiments.running.context import Context
    from experiments.running.settings import RunConfig

DEPTHS, MIDDLE = (0.3, 0.4, 0.5, 0.6, 0.7), 0.5
SHARE_OF_STREAM = 0.1  # the norm of the control that all behaviors have alike
VERDICTS = ("nothing to steer with", "weak", "consistent")
NUMBERS = ("split_half", "agreement", "against", "p", "d_prime", "shared", "cone", "verdict_rank")
CONTROLS = ("norm", "norm_of_stream")
GROUPS = {"all": None, "completions": "completions", "A/B": LETTERS}
NAMES = {
    "split_half": "split-half cosine",
    "agreement": "agreement",
    "against": "share against",
    "p": "p",
    "d_prime": "d'",
    "shared": "shared",
    "cone": "cone",
    "verdict_rank": "verdict (nothing, weak, consistent)",
    "norm": "control: norm of the vector",
    "norm_of_stream": "control: norm of the vector / norm of the stream",
}
EFFECTS = {  # the column of an effect: what it is
    "effect": "at the middle layer",
    "effect_chosen": "at the layer that validation questions chose",
    "effect_same_norm": f"at the middle layer, all vectors at {SHARE_OF_STREAM:g} of the stream's norm",
    "effect_random": "control: of a random direction of the vector's norm, without its sign",
}


def by_unit(config: "RunConfig") -> dict[Unit, Source]:
    return {Unit.of(behavior=one.name, form=form): one for one in sources(config) for form in forms(one)}


def units(config: "RunConfig") -> list[Unit]:
    return list(by_unit(config))


def own(config: "RunConfig") -> dict[str, Any]:
    from experiments.running.identity import content_hash

    found = {}
    for unit, source in by_unit(config).items():
        made = parts(source, unit["form"], config.seed)
        found[f"{unit.name}/sets"] = content_hash(
            [made.train.content_hash, made.validation.content_hash, made.test.content_hash]
        )
    return found


def layers_of(n_layers: int) -> tuple[list[int], int]:
    """The layers that are read and steered at, and the middle one."""
    return sorted({round(share * (n_layers - 1)) for share in DEPTHS}), round(MIDDLE * (n_layers - 1))


def run(unit: Unit, context: "Context") -> "pd.DataFrame":
    """One row a part, layer, kind of vector, multiplier and question, beside what reliability says at that layer."""
    import pandas as pd

    from caa_lens.engine.pair_reading import pair_activations
    from caa_lens.measures.agreement.reliabilities import reliability
    from caa_lens.vectors.steering_vectors import SteeringVector

    source = by_unit(context.config)[unit]
    made = parts(source, unit["form"], context.config.seed)
    layers, middle = layers_of(context.model.cfg.n_layers)
    activations = pair_activations(context.model, made.train, layers=layers, progress=False)
    said = reliability(activations, seed=context.config.seed, progress=False).frame
    vectors = {layer: _mean_difference(activations, layer) for layer in layers}  # what `extract` would read again
    norms = [vectors[layer].norm for layer in layers]
    of_stream = activations.norms.double().mean((0, 1)).tolist()
    said = said.assign(norm=norms, norm_of_stream=[norm / size for norm, size in zip(norms, of_stream, strict=True)])

    def cells(kind: str, layer: int, vector: SteeringVector, multiplier: float = 1.0) -> list:
        signs = (-1.0, 1.0)
        labels = {"kind": kind, "layer": layer}
        return [({**labels, "multiplier": sign}, steered(vector, sign * multiplier)) for sign in signs]

    def asked(part: "ContrastSet", name: str, cells: list) -> pd.DataFrame:
        return scored(context.model, part, [unsteered, *cells]).assign(part=name)

    unsteered = ({"kind": "unsteered", "layer": UNSTEERED, "multiplier": 0.0}, ())
    swept = {layer: cells("vector", layer, vectors[layer]) for layer in layers}
    validated = asked(made.validation, "validation", [cell for layer in layers for cell in swept[layer]])
    vector, at = vectors[middle], layers.index(middle)
    same = cells("same norm", middle, vector, SHARE_OF_STREAM * of_stream[at] / norms[at])
    control = SteeringVector.from_direction(
        _random_direction(unit, context.config.seed, vector), middle, behavior="random", model=vector.provenance.model
    )
    reported = [cell for layer in sorted({middle, best_layer(validated)}) for cell in swept[layer]]
    tested = asked(made.test, "test", [*reported, *same, *cells("random", middle, control)])
    rows = pd.concat([validated, tested], ignore_index=True)
    frame = rows.merge(said.drop(columns="because"), on="layer", how="left")
    return frame.assign(behavior=unit["behavior"], form=unit["form"], place=source.place, middle=middle)


def best_layer(rows: "pd.DataFrame") -> int:
    """The layer of the largest mean score(+1) - score(-1) of a part's questions."""
    vector = rows[rows["kind"] == "vector"]
    means = vector.groupby(["layer", "multiplier"])["score"].mean().unstack("multiplier")
    layers = [int(layer) for layer in means.index]
    return layers[int((means[1.0] - means[-1.0]).argmax())]


def _mean_difference(activations: "PairActivations", layer: int) -> "SteeringVector":
    from caa_lens.vectors.steering_vectors import SteeringVector

    sides = activations[layer].mean(0)
    about = activations.provenance
    return SteeringVector.from_direction(sides[0] - sides[1], layer, behavior=about.behavior, model=about.model)


def _random_direction(unit: Unit, seed: int, vector: Any) -> Any:
    """A direction of the vector's norm, another one for each unit."""
    import hashlib

    import torch

    digits = int(hashlib.sha256(f"{seed} {unit.name}".encode()).hexdigest()[:8], 16)
    drawn = torch.randn(vector.direction.shape, generator=torch.Generator().manual_seed(digits))
    return drawn * vector.norm / drawn.norm()


def behaviors_of(frames: Frames, seed: int = 0) -> "pd.DataFrame":
    """One row a behavior and form: what reliability said at the middle layer, and the effects.

    Columns that end in `_chosen` are of the layer that validation questions chose. Intervals are over test questions,
    the unsteered scores' standard deviation held fixed.
    """
    import pandas as pd

    return pd.DataFrame(
        [_behavior(rows, seed) for _, rows in together(frames).groupby(["behavior", "form"], sort=False)]
    )


def _behavior(rows: "pd.DataFrame", seed: int) -> dict[str, Any]:
    import numpy as np

    from caa_lens.measures.intervals import bootstrap_interval

    about = rows.iloc[0]
    test = rows[rows["part"] == "test"]
    table = test.pivot(index="question", columns=["kind", "layer", "multiplier"], values="score")
    spread = float(table["unsteered", UNSTEERED, 0.0].std())

    def each(kind: str, layer: int) -> np.ndarray:
        """By test question, in standard deviations of the unsteered scores."""
        raw = (table[kind, layer, 1.0] - table[kind, layer, -1.0]).to_numpy()
        return raw / spread if spread > 0 else np.full(len(raw), np.nan)

    middle = int(about["middle"])
    chosen = best_layer(rows[rows["part"] == "validation"])
    said = rows[rows["kind"] == "vector"].drop_duplicates("layer").set_index("layer")
    found: dict[str, Any] = {key: about[key] for key in ("behavior", "form", "place", "metric", "middle")}
    for layer, ending in ((middle, ""), (chosen, "_chosen")):
        for name in ("verdict", "low", "high", "letter", *NUMBERS[:-1], *CONTROLS):
            found[f"{name}{ending}"] = said.loc[layer, name]
        found[f"verdict_rank{ending}"] = VERDICTS.index(said.loc[layer, "verdict"])
        effects = each("vector", layer)
        (low,), (high,) = bootstrap_interval(effects[:, None], seed=seed)
        found |= {f"effect{ending}": effects.mean(), f"effect_low{ending}": low, f"effect_high{ending}": high}
        found[f"raw{ending}"] = effects.mean() * spread
        found[f"right_way{ending}"] = float((effects > 0).mean())
    return found | {
        "layer_chosen": chosen,
        "effect_same_norm": each("same norm", middle).mean(),
        "effect_random": abs(each("random", middle).mean()),
        "n_test": len(table),
    }


def correlations(behaviors: "pd.DataFrame", *, seed: int = 0, n_draws: int = 2000) -> "pd.DataFrame":
    """Every number's rank correlation with every effect, in each group: `of, group, number, n, ..., rho, low, high, p`.

    Numbers of which less is better (`against`, `p`, `cone`) are taken with the other sign, so that a number that
    foretells has a positive correlation.
    """
    import pandas as pd

    from experiments.running.rank_correlations import rank_correlations

    found = []
    for effect in EFFECTS:
        ending = "_chosen" if effect == "effect_chosen" else ""
        rows = behaviors.assign(**{name: behaviors[f"{name}{ending}"] for name in (*NUMBERS, *CONTROLS)})
        rows = rows.assign(**{name: -rows[name] for name in ("against", "p", "cone")})
        for group, form in GROUPS.items():
            chosen = rows if form is None else rows[rows["form"] == form]
            if len(chosen):
                table = rank_correlations(chosen, (*NUMBERS, *CONTROLS), effect, seed=seed, n_draws=n_draws)
                found.append(table.assign(of=effect, group=group))
    table = pd.concat(found, ignore_index=True)
    return table[["of", "group", "number", "n", "behaviors", "rho", "low", "high", "p"]]


def scatter(behaviors: "pd.DataFrame", ending: str, title: str) -> "go.Figure":
    """Effect over split-half cosine, a point a behavior and form; colour by verdict, shape by form.

    Effects above three times the 90 % quantile would flatten all others: they are named at the upper edge.
    """
    import plotly.graph_objects as go

    from caa_lens.plots.style import BLUE, GREY, ORANGE, escaped, styled

    colours = dict(zip(VERDICTS, (GREY, ORANGE, BLUE), strict=True))
    figure = go.Figure()
    beyond = behaviors[f"effect{ending}"] > 3 * behaviors[f"effect{ending}"].quantile(0.9)
    for row in behaviors[beyond].to_dict("records"):
        told = f"{escaped(row['behavior'])} {row[f'effect{ending}']:.1f} \N{UPWARDS ARROW}"
        at = {"x": 0.8, "xref": "paper", "xanchor": "right", "y": 1.0, "yref": "paper", "yanchor": "top"}
        figure.add_annotation(**at, text=told, showarrow=False, yshift=-16 * len(figure.layout.annotations))
    behaviors = behaviors[~beyond]
    for key, rows in behaviors.groupby(["form", f"verdict{ending}"], sort=True):
        form, verdict = str(key[0]), str(key[1])
        x, y = rows[f"split_half{ending}"], rows[f"effect{ending}"]
        bars = {"type": "data", "thickness": 1, "width": 0, "color": colours[verdict]}
        figure.add_scatter(
            x=x,
            y=y,
            error_x={**bars, "array": rows[f"high{ending}"] - x, "arrayminus": x - rows[f"low{ending}"]},
            error_y={**bars, "array": rows[f"effect_high{ending}"] - y, "arrayminus": y - rows[f"effect_low{ending}"]},
            mode="markers",
            marker={
                "color": colours[verdict],
                "symbol": "diamond-open" if form == LETTERS else "circle",
                "size": 9,
            },
            opacity=0.8,
            name=f"{verdict}, {'A/B' if form == LETTERS else form}",
            text=[escaped(name) for name in rows["behavior"]],
            hovertemplate="%{text}<br>split-half cosine %{x:.2f}<br>effect %{y:.2f}<extra></extra>",
        )
    figure.add_hline(y=0, line={"color": GREY, "width": 1})
    figure.update_yaxes(zeroline=False)
    return styled(
        figure,
        title=title,
        x="split-half cosine of the training pairs",
        y="effect on test questions, in s.d.",
        height=560,
        legend=True,
    )


def section(frames: Frames, config: "RunConfig") -> "Section":
    from caa_lens.report.page import Section
    from experiments.running.rank_correlations import shown

    behaviors = behaviors_of(frames, config.seed)
    table = correlations(behaviors, seed=config.seed)
    places = behaviors.groupby("place", sort=False)["behavior"].nunique()
    told = ", ".join(f"{n} {place}" for place, n in places.items())
    n_layers = behaviors["middle"].iloc[0]
    absent = "" if "evals" in places else f" No evaluations were found in {evals_folder().name}: they are left out."
    return Section(
        title=EXPERIMENT.title,
        source=EXPERIMENT.source,
        text="What reliability says of 24 training pairs, against the effect of their vector on test questions: "
        "score(+1) - score(-1) in standard deviations of the unsteered scores. Intervals are 95 %, over test questions "
        "or, of correlations, over behaviors; a behavior's two forms are resampled together.",
        found=[
            f"{behaviors['behavior'].nunique()} behaviors ({told}) in {len(behaviors)} rows, "
            f"{(behaviors['form'] == LETTERS).sum()} of them A/B; middle layer {n_layers}.{absent}",
            *(
                _said(table, effect, number)
                for effect in ("effect", "effect_chosen", "effect_same_norm")
                for number in ("split_half", "verdict_rank", "norm")
            ),
            *_by_verdict(behaviors),
        ],
        figures=[
            scatter(behaviors, "", "Split-half cosine and effect at the middle layer"),
            scatter(behaviors, "_chosen", "Split-half cosine and effect at the layer that validation chose"),
        ],
        tables=[
            *(
                (f"Rank correlation with the effect {what}", shown(table[table["of"] == effect], NAMES))
                for effect, what in EFFECTS.items()
            ),
            ("Every behavior, the largest effect at the middle layer first", _every(behaviors)),
        ],
    )


def _said(table: "pd.DataFrame", effect: str, number: str) -> str:
    from experiments.running.rank_correlations import NO_INTERVAL, told_p

    parts = []
    for row in table[(table["of"] == effect) & (table["number"] == number)].to_dict("records"):
        told = f"{row['rho']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}], p {told_p(row['p'])}"
        told = told.replace("[+nan, +nan]", NO_INTERVAL)
        parts.append(f"{row['group']} {'-' if math.isnan(row['rho']) else told}")
    return f"Rank correlation of {NAMES[number]} with the effect {EFFECTS[effect]}: {'; '.join(parts)}."


def _by_verdict(behaviors: "pd.DataFrame") -> list[str]:
    lines = []
    for verdict in reversed(VERDICTS):
        rows = behaviors[behaviors["verdict"] == verdict]
        if len(rows):
            surely = int((rows["effect_low"] > 0).sum())
            wrong = int((rows["effect_high"] < 0).sum())
            lines.append(
                f"{verdict}: {len(rows)} rows, median effect {rows['effect'].median():.2f}; {surely} have an interval "
                f"above 0, {wrong} one below."
            )
    return lines


def _every(behaviors: "pd.DataFrame") -> "pd.DataFrame":
    import pandas as pd

    rows = behaviors.sort_values("effect", ascending=False)

    def ends(middle: str, low: str, high: str) -> list[str]:
        found = rows[[middle, low, high]].itertuples(index=False, name=None)
        return [f"{mean:.2f} [{first:.2f}, {last:.2f}]" for mean, first, last in found]

    return pd.DataFrame(
        {
            "behavior": rows["behavior"],
            "form": rows["form"].replace({LETTERS: "A/B"}),
            "place": rows["place"],
            "verdict": rows["verdict"],
            "split-half cosine": ends("split_half", "low", "high"),
            "against": rows["against"].round(2),
            "p": rows["p"].round(3),
            "d'": rows["d_prime"].round(2),
            "norm": rows["norm"].round(2),
            "effect": ends("effect", "effect_low", "effect_high"),
            "raw": rows["raw"].round(3),
            "same norm": rows["effect_same_norm"].round(2),
            "random": rows["effect_random"].round(2),
            "chosen layer": rows["layer_chosen"],
            "verdict there": rows["verdict_chosen"],
            "effect there": ends("effect_chosen", "effect_low_chosen", "effect_high_chosen"),
        }
    )


def cost(unit: Unit, context: "Context") -> Cost:
    made = parts(by_unit(context.config)[unit], unit["form"], context.config.seed)
    reading = reading_cost(made.train)
    scoring = scoring_cost(made.validation, 11, depth=0.5) + scoring_cost(made.test, 9, depth=0.5)
    return reading + reading + scoring  # once more for the norms


EXPERIMENT = Experiment(
    name="does_reliability_predict",
    title="Does the verdict predict?",
    source="Reliability",
    units=units,
    run=run,
    section=section,
    cost=cost,
    own=own,
    apart=True,  # of other behaviors than the run's
)
