"""What a demo run found, from which the screen and the page are written."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from caa_lens.measures.question_slopes import Steerability, steerability
from caa_lens.measures.sweeps import Sweep

if TYPE_CHECKING:
    from caa_lens.measures.agreement.reliabilities import Reliability
    from caa_lens.measures.calibrating.calibrated import Calibration


Texts = dict[str, dict[str, dict[str, Any]]]
"""Steered texts by prompt and multiplier: what `generated_text.shown` takes, `text` and whether it was `cut`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The results that belong together.

    Attributes:
        layer, multiplier: what was chosen; where nothing is within the budget, the best layer of the pairs that chose,
            at the smallest multiplier.
        agreement: None where nothing can be said of the pairs, for the reason `why_not`.
        sweep: of the questions that report.
        slopes: of these.
    """

    behavior: str
    model: str
    layer: int
    multiplier: float
    agreement: "Reliability | None"
    why_not: str
    calibration: "Calibration"
    sweep: Sweep
    slopes: Steerability

    @classmethod
    def of(
        cls, behavior: str, model: str, agreement: "Reliability | None", why_not: str, calibration: "Calibration"
    ) -> "Found":
        """All that follows from a calibration."""
        layer, multiplier = calibration.layer, calibration.multiplier
        if layer is None or multiplier is None:
            multiplier = float(calibration.frame["multiplier"].min())
            own = calibration.frame[calibration.frame["multiplier"] == multiplier]
            layer = int(own["layer"].to_numpy()[int(own["validation"].to_numpy().argmax())])
        sweep = calibration.sweep
        return cls(
            behavior=behavior,
            model=model,
            layer=layer,
            multiplier=multiplier,
            agreement=agreement,
            why_not=why_not,
            calibration=calibration,
            sweep=sweep,
            slopes=steerability(sweep, layers=[layer]),
        )
