"""Everything that a run's numbers depend on, validated, and written into the run folder."""

import json
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from caa_lens.contrast.files import PAPER_SETS

BUNDLED = ("sentiment", "formality", "refusal", "sycophancy")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of a number, in each of the formats
PAPER_LAYER = {"Llama-2-7b-chat-hf": 13, "Llama-2-13b-chat-hf": 14}
SIZES: dict[str, dict[str, Any]] = {
    # What shows the shapes on a laptop, and what the paper did.
    "small": {
        "n_generate": 40,
        "n_test": 16,
        "n_validation": 16,
        "n_prompts": 2,
        "max_new_tokens": 32,
        "layer_step": 3,
        "n_questions": 57,
    },
    "paper": {
        "n_generate": None,
        "n_test": 50,
        "n_validation": 50,
        "n_prompts": None,
        "max_new_tokens": 100,
        "layer_step": 1,
    },
}


OF_SOME = ("base_model", "finetune", "judge", "judge_url", "judge_settings")
"""Settings that only some experiments' numbers depend on: each such experiment is held to them, the run is not."""
OF_NONE = ("judge_concurrency", "judge_rpm", "judge_timeout")
"""Settings that change how long a run takes and none of its numbers."""


class RunConfig(BaseModel):
    """The settings of a run; `RunConfig.of` fills in what follows from the model and the size."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    base_model: str | None = None
    """The model that `model` was finetuned from, for the comparison of the two."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    data: Literal["bundled", "paper"] = "bundled"
    """Whose contrast sets: ours, or the paper's seven."""
    behaviors: tuple[str, ...] = Field(min_length=1)
    layer: int | None = Field(default=None, ge=0)
    """Where single-layer experiments steer; None: the layer that validation pairs find best."""
    layer_step: int = Field(default=1, ge=1)
    """Sweeps over layers take every n-th layer, from 0 on. Vectors are extracted at every layer."""
    n_generate: int | None = Field(default=None, ge=4)
    """Pairs that vectors are extracted from; None: all that are not held out."""
    n_test: int = Field(default=50, ge=2)
    """Held-out pairs."""
    n_validation: int = Field(default=50, ge=2)
    """Pairs that the layer is chosen on, where none is named: neither extracted from nor reported."""
    n_prompts: int | None = Field(default=None, ge=1)
    """Open-ended prompts a behavior; None: all."""
    max_new_tokens: int = Field(default=100, ge=1)
    n_questions: int | None = Field(default=None, ge=2)
    """Questions of MMLU and TruthfulQA, drawn evenly over the categories; None: all."""
    finetune: Literal["full", "lora"] = "full"
    """What finetuning changes: all weights, or adapters."""
    judge: str | None = None
    """The model that grades open-ended answers, as the judge's server calls it; None: no judge."""
    judge_url: str | None = None
    """The judge's OpenAI-compatible endpoint."""
    judge_settings: str | None = None
    """What is sent to the judge beside the prompt: a JSON object, see `caa_lens.measures.judge_texts`."""
    judge_concurrency: int = Field(default=8, ge=1)
    """Requests to the judge in flight, at most."""
    judge_rpm: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Requests to the judge a minute, at most."""
    judge_timeout: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """Seconds for one request to the judge."""
    seed: int = 0
    stand_ins: tuple[str, ...] = Field(default=(), exclude=True)
    """Sets of the paper that are not on this machine: a plan (`--dry-run`) puts blank questions in their place."""

    @field_validator("behaviors")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"behaviors must differ, got {', '.join(value)}: name each once with --behaviors")
        return value

    @field_validator("judge_url")
    @classmethod
    def _is_url(cls, value: str | None) -> str | None:
        url = urlsplit(value or "http://none")
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"judge_url is {value!r}, expected a URL such as 'http://localhost:8000/v1'")
        return value

    @field_validator("judge_settings")
    @classmethod
    def _is_json_object(cls, value: str | None) -> str | None:
        """The same text for the same settings, so that blanks and order make no other run."""
        if value is None:
            return None
        example = """'{"max_tokens": null, "max_completion_tokens": 2000}'"""
        wanted = f"judge_settings is {value!r}, expected a JSON object such as {example}"
        try:
            settings = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{wanted} ({error})") from None
        if not isinstance(settings, dict):
            raise ValueError(wanted)
        if reserved := {"model", "messages", "stream", "n"} & set(settings):
            raise ValueError(f"{wanted}, without {', '.join(sorted(reserved))}, which this package sets")
        return json.dumps(settings, sort_keys=True)

    @model_validator(mode="after")
    def _judge_is_whole(self) -> "RunConfig":
        if self.judge and not self.judge_url:
            raise ValueError(
                f"judge is {self.judge!r} and judge_url is missing, expected both, as no endpoint is taken for "
                "granted: add --judge-url http://localhost:8000/v1, or https://api.openai.com/v1 for OpenAI's"
            )
        given = [
            name for name in type(self).model_fields if name.startswith("judge_") and name in self.model_fields_set
        ]
        changed = [name for name in given if getattr(self, name) != type(self).model_fields[name].default]
        if changed and not self.judge:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
            raise ValueError(f"got {options} and no judge, expected the judge's model name: add --judge NAME")
        return self

    @classmethod
    def of(cls, model: str, size: str | None = None, **given: Any) -> "RunConfig":
        """The settings for a model at a size; what is given (and not None) goes before both.

        For Llama 2's chat models everything is as in the paper, if nothing else is said: its size, data, layers, number
        formats, and the base model beside the chat model. For all others the size is small.

        Args:
            given: settings by name; `base_model="none"` is for doing without one.

        Raises:
            ValueError: for an unknown size, or settings that do not fit.
        """
        name = model.rstrip("/").rsplit("/", 1)[-1]
        if size is None:
            size = "paper" if name in PAPER_LAYER else "small"
        if size not in SIZES:
            raise ValueError(f"unknown size {size!r}: expected one of {', '.join(SIZES)}")
        chosen = {"model": model, **SIZES[size]}
        if name.startswith("Llama-2-"):
            chosen |= {"data": "paper", "dtype": "float16" if "13b" in name else "float32"}
        chosen |= {"layer": PAPER_LAYER.get(name), "base_model": _base_of(model, name)}
        chosen |= {key: value for key, value in given.items() if value is not None}
        if chosen["base_model"] == "none":
            chosen["base_model"] = None
        if "behaviors" not in chosen:
            chosen["behaviors"] = PAPER_SETS if chosen.get("data") == "paper" else BUNDLED
        return cls.checked(chosen)

    @classmethod
    def checked(cls, settings: dict[str, Any]) -> "RunConfig":
        """Settings by name, and if they do not fit one error that says, in a line each, what was got and expected.

        Raises:
            ValueError: for unknown names, or values that do not fit.
        """
        try:
            return cls(**settings)
        except ValidationError as error:
            raise ValueError("; ".join(_told(one) for one in error.errors(include_url=False))) from None

    @property
    def model_name(self) -> str:
        """The model as the paper's tables call it: without its owner or folder."""
        return self.model.rstrip("/").rsplit("/", 1)[-1]


def _base_of(model: str, name: str) -> str | None:
    """The model that a Llama 2 chat model was finetuned from: the folder beside its own, or else the hub's."""
    if name not in PAPER_LAYER:
        return None
    base = name.replace("-chat-hf", "-hf")
    beside = Path(model).expanduser().parent / base
    return str(beside) if beside.is_dir() else f"meta-llama/{base}"


def _told(error: Any) -> str:
    """One of pydantic's errors: which setting, what was got, what was expected, and the option to give."""
    if error["type"] == "value_error":  # one of our own
        return str(error["msg"]).removeprefix("Value error, ")
    name = str(error["loc"][0])
    limits, option = error.get("ctx", {}), f"--{name.replace('_', '-')}"
    if error["type"] == "extra_forbidden":
        return f"unknown setting {name!r}: expected some of {', '.join(RunConfig.model_fields)}"
    if error["type"] == "literal_error":
        expected = limits["expected"]
    elif error["type"] in ("greater_than_equal", "too_short"):
        expected = f"at least {limits['ge'] if 'ge' in limits else limits['min_length']}"
    else:
        expected = error["msg"].removeprefix("Input should be ")
    return f"{name} is {error['input']!r}, expected {expected}: give another with {option}"
