"""Sections on whether a vector can be trusted: is it real, where, how much of it, which questions, at what cost.

`trust_section` puts them together as one panel. Results are taken as they are: no number is computed here.
"""

from typing import Any

import pandas as pd

from caa_lens.report.page import Section

FLATTERED = (
    "These questions are too few for a part of their own to choose on: they chose the layer, in folds, which flatters "
    "all that is shown of it but the effect of the choice itself."
)


def reliability_section(result: Any, *, title: str = "Do the pairs agree?") -> Section:
    """A `caa_lens.measures.Reliability`: the verdict by layer, and the numbers behind it."""
    table = result.summary().round(3).reset_index()
    return Section(
        title=title,
        text=f"What {result.n_pairs} pairs share, by layer, from their activations alone: nothing was steered.",
        found=[agreement_told(result, layer) for layer in told_layers(result)],
        figures=[result.plot()],
        tables=[("By layer; columns are explained in the documentation, under reliability", table)],
    )


def told_layers(result: Any) -> list[int]:
    """The layer of the surest split-half cosine, and of each other verdict the surest."""
    frame = result.frame.sort_values("low", ascending=False, kind="stable")
    return [int(layer) for layer in frame.drop_duplicates("verdict")["layer"]]


def agreement_told(result: Any, layer: int) -> str:
    """A layer's verdict with the number behind it, in a sentence."""
    row = result.frame[result.frame["layer"] == layer].iloc[0]
    return f"Layer {layer}: {row['verdict']} ({row['because']})."


def slopes_section(
    result: Any, layer: int, *, title: str = "Which questions move?", flattered: bool = False
) -> Section:
    """A `caa_lens.measures.Steerability` at a layer: sorted slopes, and the questions that move the wrong way.

    Args:
        flattered: whether these questions chose the layer, which is then said.
    """
    return Section(
        title=title,
        text=f"The slope of each question's score over the multiplier.{f' {FLATTERED}' if flattered else ''}",
        found=[slopes_told(result, layer)],
        figures=[result.plot(layer)],
        tables=[("Questions that move the wrong way, by their number in the test set", result.wrong_way(layer))],
    )


def slopes_told(result: Any, layer: int) -> str:
    """Mean slope and the share of questions that move the wrong way, in a sentence."""
    row = result.summary().set_index("layer").loc[layer]
    if not row["n_questions"]:
        return f"Layer {layer}: no question has a slope, as scores are NaN."
    of_mean = "one question, so no interval"
    if row["low"] == row["low"]:
        of_mean = f"95 % interval {row['low']:+.3f} to {row['high']:+.3f}"
    return (
        f"At layer {layer} the score changes by {row['mean']:+.3f} a multiplier ({of_mean}); "
        f"{row['n_wrong']:.0f} of {row['n_questions']:.0f} questions move the wrong way "
        f"({row['wrong']:.0%}, interval {row['wrong_low']:.0%} to {row['wrong_high']:.0%})."
    )


def calibration_section(result: Any, *, title: str = "Which layer, and how much?") -> Section:
    """A `caa_lens.measures.Calibration`: the choice, its range, and every layer's best candidate."""
    columns = ["layer", "multiplier", "validation", "effect", "low", "high", "kl_mean", "kl_p95", "kl_tokens", "chosen"]
    tables = [("Each layer's best candidate within the budget", result.summary()[columns].round(3))]
    if result.costs:
        tables.append(("On neutral prompts that chose nothing", result.costs_frame().round(3)))
    return Section(
        title=title,
        text=f"Effect against the mean divergence on neutral prompts, of which {result.budget:g} nats a token are "
        f"allowed. {chosen_on_told(result)}",
        found=[result.text],
        figures=[result.plot()],
        tables=tables,
    )


def chosen_on_told(calibration: Any) -> str:
    """On what layer and multiplier were chosen, in a sentence."""
    if calibration.cross_fitted:
        return FLATTERED
    return "Layer and multiplier were chosen on other questions and prompts than those reported."


def side_effects_section(result: Any, *, title: str = "What does it cost elsewhere?") -> Section:
    """A `caa_lens.measures.SideEffects`: each change with its interval, beside random directions of the same norm."""
    table = result.summary().round(3).reset_index()
    return Section(
        title=title,
        text="What steering changes where it should change nothing, beside random directions of the same norm.",
        found=[*side_effects_told(result), *result.notes],
        figures=[result.plot()],
        tables=[("Every measure", table)],
    )


def side_effects_told(result: Any) -> list[str]:
    """The divergence, and whatever has changed beyond its interval, in sentences."""
    table = result.summary().reset_index()
    kl = table[table["measure"] == "KL"]
    told = [
        f"Mean divergence on {row['of']}: {row['change']:.3f} nats a token [{row['low']:.3f}, {row['high']:.3f}]; "
        f"{_random(result.n_random)} of the same norm {row['random']:.3f}."
        for row in kl.to_dict("records")
    ]
    changed = table[table["reading"].str.startswith("changed")]
    names = [
        f"{row['measure']} of {row['of']} {row['change']:+.3g} [{row['low']:+.3g}, {row['high']:+.3g}], "
        f"{_random(result.n_random)} {row['random']:+.3g}"
        for row in changed.to_dict("records")
    ]
    return [*told, f"Changed: {'; '.join(names)}." if names else "No other measure has changed beyond its interval."]


def _random(n: int) -> str:
    return "a random direction" if n == 1 else f"{n} random directions"


def trust_section(
    calibration: Any,
    *,
    layer: int,
    reliability: Any = None,
    slopes: Any = None,
    side_effects: Any = None,
    missing: tuple[str, ...] = (),
) -> Section:
    """One panel, "Can you trust it?": the verdict of the pairs, the choice and its range, slopes, side effects.

    Args:
        layer: of which the parts are told.
        missing: why a part is not there, a sentence each.
    """
    found = [] if reliability is None else [f"Do the pairs agree? {agreement_told(reliability, layer)}"]
    found.append(f"Which layer, how much? {calibration.text}")
    figures = [calibration.plot()]
    tables: list[pd.DataFrame | tuple[str, pd.DataFrame]] = []
    if slopes is not None:
        found.append(f"Which questions move? {slopes_told(slopes, layer)}")
        figures.insert(0, slopes.plot(layer))
    if side_effects is not None:
        found += [f"What does it cost? {one}" for one in side_effects_told(side_effects)]
        figures.append(side_effects.plot())
        table = side_effects.summary().reset_index()
        shown = ["group", "of", "measure", "unsteered", "steered", "change", "low", "high", "random", "n", "reading"]
        tables.append(("Side effects", table[shown].round(3)))
    if reliability is not None:
        figures.insert(0, reliability.plot())
    return Section(
        title="Can you trust it?",
        text=f"Whether the pairs agree was asked before anything was steered. {chosen_on_told(calibration)} Intervals "
        "are of 95 %.",
        found=[*found, *missing],
        figures=figures,
        tables=tables,
    )
