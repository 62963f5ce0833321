"""What the terminal shows of a demo run."""

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from caa_lens.demo.found import Found, Texts
from caa_lens.measures.answers import METRIC_LABEL
from caa_lens.report.trust import agreement_told, chosen_on_told, side_effects_told, slopes_told, told_layers
from caa_lens.steering.generated_text import shown

if TYPE_CHECKING:
    from caa_lens.interpretation.lens_results import LogitLens, WordRanks
    from caa_lens.measures.agreement.reliabilities import Reliability
    from caa_lens.measures.elsewhere.unwanted_changes import SideEffects


def show_reliability(found: "Reliability | None", why_not: str, console: Console) -> None:
    """The verdict of the pairs, or why there is none."""
    console.print("[bold]Do the pairs agree?[/] Nothing is steered for this.")
    lines = [why_not] if found is None else [agreement_told(found, layer) for layer in told_layers(found)]
    for line in lines:
        console.print(plain(line))


def show_calibration(found: Found, console: Console) -> None:
    """The sweep of the questions that report, the choice, and how many questions move the wrong way."""
    mean = found.sweep.table()
    n = found.sweep.frame["question"].nunique()
    label = METRIC_LABEL[found.sweep.metric]
    table = Table(title=f"mean {label} of {n} questions by layer and multiplier", title_justify="left")
    table.add_column("layer", justify="right")
    for m in mean.columns:
        table.add_column(f"{m:+g}" if m else "unsteered", justify="right")
    for layer, row in mean.iterrows():
        table.add_row(str(layer), *(f"{value:.3f}" for value in row), style="bold" if layer == found.layer else "")
    console.print(table)
    console.print(plain(found.calibration.text))
    console.print(plain(slopes_told(found.slopes, found.layer)))
    console.print(plain(chosen_on_told(found.calibration)))


def show_texts(texts: Texts, layer: int, console: Console) -> None:
    """Each prompt's answers by multiplier, with an ellipsis where they were cut."""
    for prompt, answers in texts.items():
        table = Table(title=f"{prompt}  (layer {layer}, greedy)", title_justify="left", show_lines=True)
        table.add_column("multiplier", justify="right")
        table.add_column("answer")
        for multiplier, answer in answers.items():
            table.add_row("unsteered" if float(multiplier) == 0 else multiplier, plain(shown(**answer)))
        console.print(table)


def show_lens(lens: "LogitLens", words: "WordRanks | None", console: Console) -> None:
    """The tokens of some layers' vectors, and the depth from which on the behavior's words can be read."""
    frame = lens.summary(8).reset_index()
    table = Table(title="what the model answers the vectors (causal lens, to first order)", title_justify="left")
    for column in frame.columns:
        table.add_column(column, justify="right" if column == "layer" else "left")
    for row in frame.itertuples(index=False):
        table.add_row(*(plain(str(cell)) for cell in row))
    console.print(table)
    if words is not None:
        console.print(depth_told(words))


def depth_told(words: "WordRanks") -> str:
    """From which depth on words of the behavior can be read, at every layer that was read from there.

    One layer of twenty is readable by chance; so the depth begins where no layer above is unreadable. The layer of the
    smallest median is the best of those that were read, on these very words.
    """
    from caa_lens.interpretation.lens_controls import READABLE

    medians = words.medians()
    readable = medians["verdict"] == READABLE
    n = words.frame["word"].nunique()
    if not readable.any():
        return f"Words of the behavior: at no layer read do {n} of them rank above those of random directions."
    best = medians.sort_values("median").iloc[0]
    if not readable.iloc[-1]:
        layers = ", ".join(f"{layer:.0f}" for layer in medians.loc[readable, "layer"])
        return (
            f"Words of the behavior: {n} of them rank above those of random directions at layers {layers} of those "
            f"read, and not at the last. Best at layer {best['layer']:.0f}, with a median rank of "
            f"{best['median']:,.0f}."
        )
    first = medians[readable[::-1].cummin()[::-1]].iloc[0]
    return (
        f"Words of the behavior are readable from layer {first['layer']:.0f} on: there the median rank of {n} of them "
        f"among {words.d_vocab:,} tokens is {first['median']:,.0f}, of random directions {first['control_low']:,.0f} "
        f"to {first['control_high']:,.0f}. Best at layer {best['layer']:.0f}, with {best['median']:,.0f}."
    )


def show_side_effects(found: "SideEffects", console: Console) -> None:
    """What changed where nothing should."""
    console.print("[bold]What does it cost elsewhere?[/]")
    for line in [*side_effects_told(found), *found.notes]:
        console.print(plain(line))


def plain(text: str) -> Any:
    """Text that is never markup: it comes from models and data."""
    return Text(text)
