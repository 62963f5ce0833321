"""The main job end to end on one model: is there a vector, where and how much, what does it say, what does it cost.

1. The pairs are split: most to extract vectors from, the others to measure on. Half of these choose the layer and the
   multiplier, and the other half report; of few pairs all choose and report in turn.
2. What do the pairs agree on (`reliability`), before anything is steered?
3. Which layer, and how much within a budget of divergence (`calibrate`, whose sweep the figures show)?
4. Steered texts, the causal lens of the vectors, and side effects of what was chosen.

A run lives in one folder. Each step leaves a file, and is skipped when that is there and was made from just what it
would be made from now (`kept_files`). So a run that was interrupted goes on where it stopped, a second run only shows
what is there, and after an edit of the data whatever depends on them is made anew.
"""

import importlib.metadata
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from rich.console import Console

from caa_lens.atomic_files import write_atomically
from caa_lens.contrast.sets import ContrastSet
from caa_lens.demo.demo_page import write_page
from caa_lens.demo.duration import Duration, work
from caa_lens.demo.found import Found, Texts
from caa_lens.demo.kept_files import SETTINGS, KeptFiles, finished, kept_told, refuse_other_settings
from caa_lens.demo.made_with import made_with, versions
from caa_lens.demo.on_screen import plain, show_calibration, show_lens, show_reliability, show_side_effects, show_texts
from caa_lens.models.checks import check_layers
from caa_lens.models.loading.fingerprint import model_fingerprint
from caa_lens.models.placement import device_of_tokens, dtype_of
from caa_lens.stops import NOTHING, kept_if_stopped
from caa_lens.vectors.steering_vectors import SteeringVectors

if TYPE_CHECKING:
    from caa_lens.interpretation.lens_results import LogitLens, WordRanks
    from caa_lens.measures.agreement.reliabilities import Reliability
    from caa_lens.measures.calibrating.calibrated import Calibration
    from caa_lens.measures.elsewhere.unwanted_changes import SideEffects

VECTORS, TEXTS = "vectors.safetensors", "texts.json"
LENS_QUESTIONS = 8
TESTED = 0.5  # of the pairs held out report, the others choose
LEAST = 8  # pairs that anything can be chosen on, or said of
N_NEUTRAL, N_RANDOM, NEUTRAL_TOKENS = 12, 2, 24  # of side effects


class DemoConfig(BaseModel):
    """Everything a demo run's numbers depend on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "demo"
    dtype: str | None = None
    device: str | None = None
    backend: str | None = None
    behavior: str = "sentiment"
    n_test: int | None = Field(default=None, ge=LEAST)
    """Pairs to hold out, half to choose on and half to report; by default 40, or a third of a small set."""
    seed: int = 0
    layers: Literal["coarse", "all"] | tuple[int, ...] = "coarse"
    """Layers to sweep, "coarse" being every third. Vectors are extracted at every layer anyway."""
    multipliers: tuple[float, ...] = (-2.0, -1.0, 0.0, 1.0, 2.0)
    budget: float = Field(default=0.1, gt=0)
    """Nats a token that steering may change neutral answers by, on average."""
    prompts: tuple[str, ...] = (
        "Describe a walk in the park.",
        "How was your day?",
        "Write a few sentences about a rainy afternoon.",
    )
    max_new_tokens: int = Field(default=48, ge=1)

    @field_validator("multipliers")
    @classmethod
    def _symmetric(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not any(m > 0 for m in value) or any(-m not in value for m in value):
            raise ValueError(f"expected every multiplier together with its negative, got {value}")
        return tuple(sorted(value))


def run_demo(config: DemoConfig, folder: str | Path, console: Console | None = None) -> Path:
    """Run (or finish) the demo in a folder and return the path of its report.

    Writes `config.json`, `made_from.json`, `vectors.safetensors`, `texts.json`, the results `reliability`,
    `calibration`, `lens` and `side_effects` (two or three files each), and `report.html`.

    Raises:
        ValueError: if the folder holds a run with other settings, or the set has too few pairs.
    """
    folder = Path(folder)
    with kept_if_stopped(lambda: kept_told(folder) or NOTHING):
        return _run_demo(config, folder, console or Console())


def _run_demo(config: DemoConfig, folder: Path, console: Console) -> Path:
    began = time.perf_counter()
    settings = {**config.model_dump(mode="json"), "caa_lens": importlib.metadata.version("caa-lens")}
    refuse_other_settings(folder, settings)
    train, held_out = _split(ContrastSet.load(config.behavior), config)

    from caa_lens.models.loading.load import load_model

    with console.status("loading the model"):
        model = load_model(config.model, dtype=config.dtype, device=config.device, backend=config.backend)
    if not isinstance(config.layers, str):
        check_layers(model, config.layers)
    text = json.dumps(settings, indent=2)
    write_atomically(folder / SETTINGS, lambda file: file.write_text(text, encoding="utf-8"))
    console.print(
        f"[bold]{model.cfg.model_name}[/]: {model.cfg.n_layers} layers, d_model {model.cfg.d_model}, "
        f"on {device_of_tokens(model)}. Behavior [bold]{config.behavior}[/]: {len(train)} pairs to extract from, "
        f"{len(held_out)} held out."
    )
    kept = KeptFiles(folder, console, _about_model(model, config))
    steps = {"coarse": 3, "all": 1}
    layers = range(model.cfg.n_layers)[:: steps[config.layers]] if isinstance(config.layers, str) else config.layers

    duration = Duration.of(
        console, _work(train, held_out, list(layers), config), {*finished(folder)}, _reading(model, train)
    )
    vectors = _vectors(model, train, kept)
    duration.done("vectors")
    agreement, why_not = _reliability(model, train, list(layers), kept)
    duration.done("reliability")
    show_reliability(agreement, why_not, console)
    calibration = _calibration(model, held_out, vectors, list(layers), config, kept)
    duration.done("calibration")
    found = Found.of(config.behavior, str(model.cfg.model_name), agreement, why_not, calibration)
    show_calibration(found, console)
    texts = _texts(model, vectors, found.layer, config, kept)
    duration.done("texts")
    show_texts(texts, found.layer, console)
    questions = [pair.question for pair in held_out][-LENS_QUESTIONS:]
    lens = _lens(model, vectors, questions, found.layer, kept)
    duration.done("lens")
    words = _words(model, vectors, questions, config.behavior)
    duration.done("words")
    show_lens(lens, words, console)
    side_effects = _side_effects(model, vectors, found, kept)
    show_side_effects(side_effects, console)
    how = made_with(model, config, folder)
    made = {**config.model_dump(), "model": model.cfg.model_name, "vectors": vectors.provenance.method, **how}
    tested = _tested(held_out, config)
    report = write_page(folder / "report.html", found, tested, texts, lens, words, side_effects, made)
    console.print()
    for name, value in how.items():
        console.print(plain(f"{name}: {value}"), soft_wrap=True)
    console.print(f"\nFinished in {time.perf_counter() - began:.0f} s. Vectors, results and texts are in {folder}.")
    console.print(f"Open this file: {report.resolve()}", soft_wrap=True, highlight=False)
    return report


def _split(pairs: ContrastSet, config: DemoConfig) -> tuple[ContrastSet, ContrastSet]:
    if len(pairs) < 2 * LEAST:
        raise ValueError(
            f"{pairs.name!r} has {len(pairs)} pairs, expected at least {2 * LEAST}: {LEAST} to extract from and "
            f"{LEAST} to measure on. With fewer use caa-lens extract, and look at the texts"
        )
    train, held_out = pairs.split(test=config.n_test or max(LEAST, min(40, len(pairs) // 3)), seed=config.seed)
    return train, held_out


def _tested(held_out: ContrastSet, config: DemoConfig) -> ContrastSet:
    """Of the pairs that were held out, those that report: all where they are too few to part, as `calibrate` has it."""
    from caa_lens.measures.calibrating.parts import parts_of

    every, _, tested = parts_of(held_out, TESTED, config.seed)
    return every if tested is None else tested


def _work(train: ContrastSet, held_out: ContrastSet, layers: list[int], config: DemoConfig) -> dict[str, float]:
    return work(
        n_train=len(train),
        n_held_out=len(held_out),
        n_swept=len(layers),
        n_multipliers=sum(m != 0 for m in config.multipliers),
        n_new=config.max_new_tokens,
        n_prompts=len(config.prompts),
    )


def _reading(model: Any, train: ContrastSet) -> Callable[[int], object]:
    from caa_lens.engine.pair_reading import pair_activations

    def read(n: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what there is to say of the pairs is said of all of them
            pair_activations(model, train[:n], layers=[model.cfg.n_layers - 1], progress=False)

    return read


def _about_model(model: Any, config: DemoConfig) -> dict[str, Any]:
    from caa_lens.prompts.prompt_formats import resolve_format

    return {
        "model": model_fingerprint(config.model),
        "dtype": str(dtype_of(model)),
        "device": device_of_tokens(model).type,
        "prompt_format": resolve_format(model, None).name,
        "versions": versions(),
        "kind": type(model).__name__,
    }


def _vectors(model: Any, train: ContrastSet, kept: KeptFiles) -> SteeringVectors:
    from caa_lens.vectors.extraction import extract

    made_from = {"pairs": train.content_hash}
    if kept.reuse(VECTORS, made_from):
        return SteeringVectors.load(kept.path(VECTORS))
    vectors = extract(model, train)
    vectors.save(kept.path(VECTORS))
    kept.record(VECTORS, made_from)
    return vectors


def _reliability(
    model: Any, train: ContrastSet, layers: list[int], kept: KeptFiles
) -> "tuple[Reliability | None, str]":
    """What the training pairs agree on; or why nothing can be said of them."""
    from caa_lens.engine.pair_reading import pair_activations
    from caa_lens.measures.agreement.reliabilities import Reliability, reliability

    def make() -> Reliability:
        return reliability(pair_activations(model, train, layers=layers))

    made_from = {"pairs": train.content_hash, "layers": layers}
    try:
        return kept.result(Reliability, "reliability", made_from, make), ""
    except ValueError as error:  # too few pairs, or letters of one side
        return None, str(error)


def _calibration(
    model: Any, held_out: ContrastSet, vectors: SteeringVectors, layers: list[int], config: DemoConfig, kept: KeptFiles
) -> "Calibration":
    from caa_lens.measures.calibrating.calibrated import Calibration
    from caa_lens.measures.calibrating.calibration import calibrate

    settings: dict[str, Any] = {
        "layers": layers,
        "multipliers": [m for m in config.multipliers if m],
        "budget": config.budget,
    }
    made_from = {"vectors": kept.digest(VECTORS), "pairs": held_out.content_hash, **settings}
    return kept.result(
        Calibration,
        "calibration",
        made_from,
        lambda: calibrate(model, vectors, held_out, test=TESTED, seed=config.seed, **settings),
    )


def _texts(model: Any, vectors: SteeringVectors, layer: int, config: DemoConfig, kept: KeptFiles) -> Texts:
    """`texts[prompt][multiplier]`, generated greedily; all multipliers of a prompt run as one batch."""
    from tqdm.auto import tqdm

    from caa_lens.steering.generation import generate

    multipliers = sorted({*config.multipliers, 0.0})
    settings: dict[str, Any] = {"multipliers": multipliers, "prompts": config.prompts}
    settings |= {"max_new_tokens": config.max_new_tokens, "says": ("text", "cut")}
    steered = [(vectors[layer], torch.tensor(multipliers))]

    def make() -> Texts:
        texts: Texts = {}
        for prompt in tqdm(config.prompts, desc=f"generate at layer {layer}", unit="prompt"):
            answers = generate(model, prompt, vectors=steered, max_new_tokens=config.max_new_tokens)
            assert isinstance(answers, list)  # one a multiplier
            texts[prompt] = {
                f"{m:+g}": {"text": text, "cut": text.cut} for m, text in zip(multipliers, answers, strict=True)
            }
        return texts

    return kept.json(TEXTS, {"vectors": kept.digest(VECTORS), "layer": layer, **settings}, make)


def _lens(model: Any, vectors: SteeringVectors, questions: list[Any], best: int, kept: KeptFiles) -> "LogitLens":
    """What the model answers the vectors of some layers, beside random directions, at held-out questions."""
    from caa_lens.interpretation.lens import logit_lens
    from caa_lens.interpretation.lens_results import LogitLens

    n = model.cfg.n_layers
    layers = sorted({n // 6, n // 3, n // 2, best, (2 * n) // 3, max(n - 4, 0), n - 1})
    made_from = {"vectors": kept.digest(VECTORS), "questions": [str(one) for one in questions], "layers": layers}
    return kept.result(
        LogitLens,
        "lens",
        made_from,
        lambda: logit_lens(model, vectors, layers=layers, k=8, reading="causal", prompts=questions),
    )


def _words(model: Any, vectors: SteeringVectors, questions: list[Any], behavior: str) -> "WordRanks | None":
    """Ranks of the words that were written down for a bundled behavior; nothing for other behaviors."""
    from caa_lens.interpretation.lens import word_ranks
    from caa_lens.interpretation.words import behavior_words

    words = behavior_words(behavior)
    if not words:
        return None
    layers = range(model.cfg.n_layers)[2::3]
    return word_ranks(model, vectors, words, layers=layers, reading="causal", prompts=questions)


def _side_effects(model: Any, vectors: SteeringVectors, found: Found, kept: KeptFiles) -> "SideEffects":
    from caa_lens.measures.elsewhere.capability import easy_questions
    from caa_lens.measures.elsewhere.neutral import REPORTING
    from caa_lens.measures.elsewhere.unwanted_changes import SideEffects, side_effects

    settings: dict[str, Any] = {"n_tokens": NEUTRAL_TOKENS, "n_random": N_RANDOM}
    neutral, easy = REPORTING[:N_NEUTRAL], easy_questions()
    made_from = {"vectors": kept.digest(VECTORS), "layer": found.layer, "multiplier": found.multiplier}
    return kept.result(
        SideEffects,
        "side_effects",
        {**made_from, **settings, "neutral": neutral, "capability": easy.content_hash},
        lambda: side_effects(
            model, vectors[found.layer], found.multiplier, neutral=neutral, capability=easy, **settings
        ),
    )
