"""What a lens is asked for, checked before anything runs."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from caa_lens.arguments import as_float, as_seed, check_count
from caa_lens.contrast.messages import Asked
from caa_lens.contrast.sets import ContrastSet, check_contrast_set
from caa_lens.engine.operators import Formula, check_operator, name_of
from caa_lens.interpretation.lens_controls import CONTROLS
from caa_lens.interpretation.lens_prompts import DEFAULT_PLACE, PLACES
from caa_lens.models.placement import dtype_name
from caa_lens.prompts.prompt_formats import Prompt, PromptFormat, resolve_format

READINGS = ("direct", "normed", "in_context", "causal", "effect")
CONTROLLED = ("in_context", "causal", "effect")
DOWNSTREAM = ("causal", "effect")


class LensOptions(NamedTuple):
    """Everything that the scores of a lens depend on beside the vectors."""

    reading: str
    pairs: ContrastSet | None
    prompts: Sequence[Asked | Prompt] | None
    place: str
    multiplier: float
    background: int
    controls: int
    seed: int
    prompt_format: PromptFormat | str | None
    operator: str | Formula = "add"
    positions: str = "caa"

    @classmethod
    def of(
        cls,
        *,
        reading: str,
        pairs: Any,
        prompts: Any,
        place: str | None,
        multiplier: object,
        background: object,
        controls: object,
        seed: object,
        prompt_format: Any,
        operator: Any = "add",
        positions: Any = "caa",
    ) -> "LensOptions":
        """From what a user says.

        Raises:
            TypeError, ValueError: for an unknown reading, or options that do not go with it.
        """
        check_reading(reading)
        n_controls = CONTROLS if controls is None and reading in CONTROLLED else controls
        made = cls(
            reading=reading,
            pairs=pairs,
            prompts=prompts,
            place=DEFAULT_PLACE if place is None else place,
            multiplier=as_float("multiplier", multiplier),
            background=check_count("background", background, least=None),
            controls=0 if n_controls is None else check_count("controls", n_controls, least=0),
            seed=as_seed(seed),
            prompt_format=prompt_format,
            operator=operator,
            positions=positions,
        )
        made._check(said_place=place is not None)
        return made

    def _check(self, *, said_place: bool) -> None:
        if self.reading == "in_context" and self.pairs is None:
            raise ValueError("reading 'in_context' needs real residuals: give a ContrastSet as pairs=...")
        if self.pairs is not None:
            check_contrast_set(self.pairs)
        if self.background < 0:
            raise ValueError(f"background must be a number of random directions, 0 for none, got {self.background}")
        if self.multiplier == 0:
            raise ValueError("multiplier must be a finite number other than 0, got 0")
        if self.background and self.reading != "in_context":
            if self.reading in DOWNSTREAM:
                raise ValueError(
                    f"background={self.background} is of 'in_context'; what any push does to {self.reading!r} its "
                    "controls tell: leave background out"
                )
            raise ValueError(
                f"background={self.background} has nothing to correct in reading {self.reading!r}, whose mean over "
                "random directions is zero: use reading='in_context'"
            )
        if self.controls and self.reading not in CONTROLLED:
            raise ValueError(
                f"controls={self.controls} are of the readings {', '.join(CONTROLLED)}; {self.reading!r} is a "
                "projection, in which a random direction says random tokens: leave controls out"
            )
        if self.reading not in DOWNSTREAM and (self.prompts is not None or said_place):
            what = "prompts" if self.prompts is not None else "place"
            raise ValueError(
                f"{what}=... is of the readings {' and '.join(DOWNSTREAM)}, and {self.reading!r} does not look at it: "
                "use reading='causal', or leave it out"
            )
        check_operator(self.operator)
        if self.reading != "effect" and (self.operator != "add" or self.positions != "caa"):
            what = "positions" if self.operator == "add" else "operator"
            raise ValueError(
                f"{what}=... is of the reading 'effect', and {self.reading!r} is of a vector that is added from the "
                "instruction's end on: use reading='effect', or leave it out"
            )
        if self.place not in PLACES:
            raise ValueError(f"unknown place {self.place!r}: expected one of {', '.join(PLACES)}")

    def settings(self, model: Any) -> dict[str, str]:
        """What else the numbers depend on, in words."""
        settings = {
            "model": str(model.cfg.model_name),
            "dtype": dtype_name(model),
            "multiplier": f"{self.multiplier:g}",
        }
        if self.reading in CONTROLLED:
            settings |= {"seed": str(self.seed), "controls": str(self.controls)}
        if self.reading in CONTROLLED and self.pairs is not None and self.prompts is None:
            settings |= {"pairs": self.pairs.name, "pairs_hash": self.pairs.content_hash}
        if self.reading == "in_context":
            settings |= {"background": str(self.background)}
        if self.reading in DOWNSTREAM:
            settings |= {"place": self.place}
        if self.reading == "effect":
            settings |= {"operator": name_of(self.operator), "positions": self.positions}
        if self.reading in CONTROLLED and model.tokenizer is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # whoever encodes says what there is to say
                settings |= {"prompt_format": resolve_format(model, self.prompt_format).name}
        return settings


def check_reading(reading: object) -> None:
    """Raises `ValueError` for an unknown reading."""
    if not isinstance(reading, str) or reading not in READINGS:
        raise ValueError(f"unknown reading {reading!r}: expected one of {', '.join(READINGS)}")
