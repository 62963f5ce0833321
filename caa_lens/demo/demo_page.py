"""The demo's report: one page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caa_lens.demo.found import Found, Texts
from caa_lens.demo.on_screen import depth_told
from caa_lens.report.cells import cells_of
from caa_lens.report.page import Section, write_report
from caa_lens.report.trust import chosen_on_told, trust_section
from caa_lens.steering.generated_text import shown

if TYPE_CHECKING:
    from caa_lens.contrast.sets import ContrastSet
    from caa_lens.interpretation.lens_results import LogitLens, WordRanks
    from caa_lens.measures.elsewhere.unwanted_changes import SideEffects


def write_page(
    path: Path,
    found: Found,
    tested: "ContrastSet",
    texts: Texts,
    lens: "LogitLens",
    words: "WordRanks | None",
    side_effects: "SideEffects",
    settings: Mapping[str, Any],
) -> Path:
    """Write the report of a run and return its path.

    Args:
        tested: the pairs that the sweep scored.
        texts: `texts[prompt][multiplier]`, at the layer that was found.
    """
    groups: Sequence[tuple[str, list[tuple[str, str]]]] = [
        (prompt, [("unsteered" if float(m) == 0 else m, shown(**answer)) for m, answer in answers.items()])
        for prompt, answers in texts.items()
    ]
    written = {
        (found.layer, float(m)): [(prompt, shown(**answers[m])) for prompt, answers in texts.items()]
        for m in next(iter(texts.values()))
    }
    cells = cells_of(found.sweep, tested, written)
    n = found.sweep.frame["question"].nunique()
    return write_report(
        path,
        title=f"Steering {found.model} by {found.behavior}",
        lead=found.calibration.text,
        sections=[
            Section(
                title=f"Dose and response at layer {found.layer}",
                text=f"The score of {n} held-out answers as the vector is added more or less strongly. "
                f"{chosen_on_told(found.calibration)}",
                figures=[found.sweep.plot_layer(found.layer)],
                cells=cells,
            ),
            Section(
                title="Steered text",
                text="The same greedy generation with the vector added at the multiplier above each text. An ellipsis "
                "stands where a text was cut, because it had the most tokens that were asked for.",
                texts=groups,
            ),
            trust_section(
                found.calibration,
                layer=found.layer,
                reliability=found.agreement,
                slopes=found.slopes,
                side_effects=side_effects,
                missing=() if found.agreement is not None else (f"Do the pairs agree? {found.why_not}",),
            ),
            Section(
                title="Layer by multiplier",
                text="Blue is above the unsteered level, red below. Hover for 95 % intervals over questions; "
                "click a cell for its questions, scores and texts.",
                figures=[found.sweep.plot()],
                cells=cells,
            ),
            Section(
                title="What the vectors say",
                text="The model's answer to a small push along each layer's vector, to first order, at the first words "
                "of its answers to held-out questions: the tokens that become more and less likely. Where the verdict "
                "is 'nothing to read here', random directions of the same size give tokens that stand out as much.",
                found=[] if words is None else [depth_told(words)],
                figures=[] if words is None else [words.plot()],
                tables=[lens.tokens().reset_index()],
            ),
        ],
        settings={**found.sweep.settings, **settings},
    )
