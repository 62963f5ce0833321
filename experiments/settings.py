"""Everything that a run's numbers depend on, validated, and written into the run folder."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

BUNDLED = ("sentiment", "formality", "refusal", "sycophancy")
PAPER = (
    "coordinate-other-ais",
    "corrigible-neutral-HHH",
    "hallucination",
    "myopic-reward",
    "survival-instinct",
    "sycophancy",
    "refusal",
)
PAPER_LAYER = {"Llama-2-7b-chat-hf": 13, "Llama-2-13b-chat-hf": 14}
SIZES: dict[str, dict[str, Any]] = {
    # What shows the shapes on a laptop, and what the paper did.
    "small": {"n_generate": 40, "n_test": 16, "n_prompts": 2, "max_new_tokens": 32, "layer_step": 3, "n_questions": 57},
    "paper": {"n_generate": None, "n_test": 50, "n_prompts": None, "max_new_tokens": 100, "layer_step": 1},
}


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
    """Where single-layer experiments steer; None: the layer that the layer sweep finds best."""
    layer_step: int = Field(default=1, ge=1)
    """Sweeps over layers take every n-th layer, from 0 on. Vectors are extracted at every layer."""
    n_generate: int | None = Field(default=None, ge=4)
    """Pairs that vectors are extracted from; None: all that are not held out."""
    n_test: int = Field(default=50, ge=2)
    """Held-out pairs."""
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
    seed: int = 0

    @field_validator("behaviors")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"behaviors must differ, got {', '.join(value)}")
        return value

    @classmethod
    def of(cls, model: str, size: str = "small", **given: Any) -> "RunConfig":
        """The settings for a model at a size; what is given (and not None) goes before both.

        Raises:
            ValueError: for an unknown size, or settings that do not fit.
        """
        if size not in SIZES:
            raise ValueError(f"unknown size {size!r}: expected one of {', '.join(SIZES)}")
        name = model.rstrip("/").rsplit("/", 1)[-1]
        chosen = {"model": model, **SIZES[size]}
        if name.startswith("Llama-2-"):
            chosen |= {"data": "paper", "dtype": "float16" if "13b" in name else "float32"}
        chosen |= {"layer": PAPER_LAYER.get(name)}
        chosen |= {key: value for key, value in given.items() if value is not None}
        if "behaviors" not in chosen:
            chosen["behaviors"] = PAPER if chosen.get("data") == "paper" else BUNDLED
        return cls(**chosen)

    @property
    def model_name(self) -> str:
        """The model as the paper's tables call it: without its owner or folder."""
        return self.model.rstrip("/").rsplit("/", 1)[-1]
