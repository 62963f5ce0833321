"""A comparison of methods as a part of a page: the figure, the table at matched divergence, choices and costs."""

from typing import Any

import pandas as pd

from caa_lens.report.page import Section


def comparison_section(result: Any, *, title: str = "", source: str = "") -> Section:
    """A `caa_lens.methods.Comparison` as a section.

    Args:
        title: "Methods compared: <behavior>" by default.
    """
    behavior = str(result.frame["behavior"].iloc[0])
    n_questions = result.frame["question"].nunique()
    return Section(
        title=title or f"Methods compared: {behavior}",
        source=source,
        text=f"Effect on {n_questions} test questions against the mean divergence by token on {result.n_neutral} "
        "neutral prompts, which no method was fitted or chosen on. Layer and strength were chosen on other questions, "
        "with as many evaluations for each method. Intervals are 95 %, over questions alone.",
        found=differences(result),
        figures=[result.plot()],
        tables=comparison_tables(result),
    )


def differences(result: Any) -> list[str]:
    """What is told apart from CAA, or from the first method: a sentence a budget, of paired differences."""
    reference = "CAA" if "CAA" in result.methods else result.methods[0]
    sentences = []
    for budget, rows in result.at_kl(reference=reference).groupby("kl", sort=True):
        others = rows[(rows["method"] != reference) & rows["more"].notna()]
        # Of the negative side, more is less: a larger effect is further below 0.
        towards = others.assign(
            low_of=(others["more_low"] * others["sign"]).where(
                others["sign"] > 0, others["more_high"] * others["sign"]
            ),
            high_of=(others["more_high"] * others["sign"]).where(
                others["sign"] > 0, others["more_low"] * others["sign"]
            ),
        )
        better = [f"{one.method} ({_sign(one.sign)})" for one in towards.itertuples() if one.low_of > 0]
        worse = [f"{one.method} ({_sign(one.sign)})" for one in towards.itertuples() if one.high_of < 0]
        sentences.append(
            f"At {budget:g} nats, against {reference}, question by question: more from "
            f"{', '.join(better) or 'none'}; less from {', '.join(worse) or 'none'}; "
            f"{len(others) - len(better) - len(worse)} not told apart, "
            f"{len(rows) - 2 - len(others)} without a comparison, as one of the two ends before."
        )
    return sentences


def comparison_tables(result: Any) -> list[tuple[str, pd.DataFrame]]:
    """The tables of a comparison with their captions."""
    chosen = result.chosen()
    chosen["effect"] = [
        f"{one.mean:+.2f} [{one.low:+.2f}, {one.high:+.2f}]" if one.low == one.low else f"{one.mean:+.2f}"
        for one in chosen.itertuples()
    ]
    columns = ["method", "setting", "positions", "strength", "effect", "kl_mean", "kl_p95", "kl_steered"]
    columns += ["perplexity", "repetition", *(["checked"] if chosen["checked"].notna().any() else [])]
    choices = pd.DataFrame(
        [
            {
                "method": one.method,
                "chosen": f"{one.unit} {one.setting}",
                "scores on the validation part": ", ".join(f"{setting}: {value:.3f}" for setting, value in one.tried),
                "strengths": f"{one.up:+g}, {one.down:+g}",
            }
            for one in result.choices
        ]
    )
    tables = [
        ("Effect at the same divergence; where a method ends before, its end", result.table()),
        ("At the strengths that the validation part chose, and the controls", chosen[columns]),
    ]
    if len(choices):
        tables.append(("What was chosen, with every setting's score", choices))
    if result.costs:
        tables.append(("Costs", result.costs_frame()))
    return tables


def _sign(sign: int) -> str:
    return "+" if sign > 0 else "-"
