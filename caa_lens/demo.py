"""The main job end to end on one model: extract, sweep, steer, look through the lens, and write a report.

A run lives in one folder. Each step leaves a file, and `made_from.json` says what that was made from: the model's
contents, the pairs, the vectors, the settings and versions. A step is skipped when its file is there, is the one that
was written, and was made from just what it would be made from now. So a run that was interrupted goes on where it
stopped, a second run only shows what is there, and after an edit of the data whatever depends on them is made anew.
"""

import importlib.metadata
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from rich.console import Console
from rich.table import Table

from caa_lens.atomic_files import write_atomically
from caa_lens.contrast.sets import ContrastSet
from caa_lens.measures.answers import METRIC_LABEL
from caa_lens.models.checks import check_layers
from caa_lens.models.loading.fingerprint import file_digest, model_fingerprint
from caa_lens.models.placement import device_of_tokens, dtype_of
from caa_lens.vectors.steering_vectors import SteeringVectors

if TYPE_CHECKING:
    import pandas as pd

    from caa_lens.measures.sweeps import Sweep

SETTINGS, MADE_FROM = "config.json", "made_from.json"
VECTORS, TEXTS = "vectors.safetensors", "texts.json"
SWEEP, SWEEP_ABOUT = "sweep.parquet", "sweep.json"  # one result in two files
LIBRARIES = ("caa-lens", "torch", "transformer-lens", "transformers")


class DemoConfig(BaseModel):
    """Everything a demo run's numbers depend on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "demo"
    dtype: str | None = None
    device: str | None = None
    backend: str | None = None
    behavior: str = "sentiment"
    n_test: int | None = Field(default=None, ge=2)
    """Pairs to hold out; by default 20, or a third of a small set."""
    seed: int = 0
    layers: Literal["coarse", "all"] | tuple[int, ...] = "coarse"
    """Layers to sweep, "coarse" being every third. Vectors are extracted at every layer anyway."""
    multipliers: tuple[float, ...] = (-2.0, -1.0, 0.0, 1.0, 2.0)
    prompts: tuple[str, ...] = (
        "Describe a walk in the park.",
        "How was your day?",
        "Write a few sentences about a rainy afternoon.",
    )
    max_new_tokens: int = Field(default=48, ge=1)

    @field_validator("multipliers")
    @classmethod
    def _symmetric(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not any(m > 0 and -m in value for m in value):
            raise ValueError(f"expected some multiplier together with its negative, got {value}")
        return tuple(sorted(value))


def run_demo(config: DemoConfig, folder: str | Path, console: Console | None = None) -> Path:
    """Run (or finish) the demo in a folder and return the path of its report.

    Writes `config.json`, `made_from.json`, `vectors.safetensors`, `sweep.parquet` and `sweep.json`, `texts.json` and
    `report.html`.

    Raises:
        ValueError: if the folder holds a run with other settings.
    """
    folder = Path(folder)
    console = console or Console()
    began = time.perf_counter()
    settings = {**config.model_dump(mode="json"), "caa_lens": importlib.metadata.version("caa-lens")}
    _refuse_other_settings(folder, settings)
    pairs = ContrastSet.load(config.behavior)
    train, test = pairs.split(test=config.n_test or max(1, min(20, len(pairs) // 3)), seed=config.seed)

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
        f"{len(test)} held out."
    )
    kept = _Kept(folder, console, _about_model(model, config))
    vectors = _vectors(model, train, kept)
    sweep = _sweep(model, test, vectors, config, kept)
    _show_sweep(sweep, console)
    texts = _texts(model, vectors, sweep.best_layer, config, kept)
    _show_texts(texts, sweep.best_layer, console)
    lens = _show_lens(model, vectors, sweep.best_layer, console)
    report = _write_report(model, config, sweep, texts, lens, folder)
    console.print(f"\nFinished in {time.perf_counter() - began:.0f} s. Vectors, sweep and texts are in {folder}.")
    console.print(f"Open this file: {report.resolve()}", soft_wrap=True, highlight=False)
    return report


def _refuse_other_settings(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / SETTINGS
    if not path.exists():
        return
    try:
        present = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        present = {}
    # A setting that an older run did not have yet is None.
    if changed := sorted(key for key in {*present, *settings} if present.get(key) != settings.get(key)):
        raise ValueError(
            f"{folder} holds a run with other settings ({', '.join(changed)}): choose another folder with --out, "
            "or delete it"
        )


@dataclass(frozen=True, slots=True)
class _Kept:
    """The files of a run's folder, and what each was made from."""

    folder: Path
    console: Console
    always: dict[str, Any]
    """What everything is made from."""

    def path(self, name: str) -> Path:
        return self.folder / name

    def digest(self, *names: str) -> str:
        return " ".join(file_digest(self.path(name)) for name in names)

    def reuse(self, name: str, made_from: dict[str, Any], *beside: str) -> bool:
        """Whether a file, and those that belong to it, are what was written here, and were made from just this."""
        if not all(self.path(each).exists() for each in (name, *beside)):
            return False
        there, now = self._said().get(name, {}), self._plain(made_from) | {"sha256": self.digest(name, *beside)}
        if there == now:
            self.console.print(f"reusing {self.path(name)}")
            return True
        changed = ", ".join(sorted(key for key in {*there, *now} if there.get(key) != now.get(key)))
        why = f"it was made from other things than now ({changed})" if there else "nothing says what it was made from"
        self.console.print(f"making {self.path(name)} anew, as {why}")
        return False

    def record(self, name: str, made_from: dict[str, Any], *beside: str) -> None:
        said = self._said() | {name: self._plain(made_from) | {"sha256": self.digest(name, *beside)}}
        text = json.dumps(said, indent=2, ensure_ascii=False)
        write_atomically(self.path(MADE_FROM), lambda file: file.write_text(text, encoding="utf-8"))

    def _plain(self, made_from: dict[str, Any]) -> dict[str, Any]:
        return json.loads(json.dumps(self.always | made_from))

    def _said(self) -> dict[str, Any]:
        try:
            said = json.loads(self.path(MADE_FROM).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return said if isinstance(said, dict) else {}


def _about_model(model: Any, config: DemoConfig) -> dict[str, Any]:
    from caa_lens.prompts.prompt_formats import resolve_format

    return {
        "model": model_fingerprint(config.model),
        "dtype": str(dtype_of(model)),
        "device": device_of_tokens(model).type,
        "prompt_format": resolve_format(model, None).name,
        "versions": {library: importlib.metadata.version(library) for library in LIBRARIES},
        "kind": type(model).__name__,
    }


def _vectors(model: Any, train: ContrastSet, kept: _Kept) -> SteeringVectors:
    from caa_lens.vectors.extraction import extract

    made_from = {"pairs": train.content_hash}
    if kept.reuse(VECTORS, made_from):
        return SteeringVectors.load(kept.path(VECTORS))
    vectors = extract(model, train)
    vectors.save(kept.path(VECTORS))
    kept.record(VECTORS, made_from)
    return vectors


def _sweep(model: Any, test: ContrastSet, vectors: SteeringVectors, config: DemoConfig, kept: _Kept) -> "Sweep":
    from caa_lens.measures.sweeps import Sweep, sweep

    steps = {"coarse": 3, "all": 1}
    layers = range(model.cfg.n_layers)[:: steps[config.layers]] if isinstance(config.layers, str) else config.layers
    settings = {"layers": list(layers), "multipliers": config.multipliers}
    made_from = {"vectors": kept.digest(VECTORS), "pairs": test.content_hash, **settings}
    if kept.reuse(SWEEP, made_from, SWEEP_ABOUT):
        return Sweep.load(kept.path(SWEEP))
    result = sweep(model, test, vectors, layers=layers, multipliers=config.multipliers)
    kept.path(SWEEP).unlink(missing_ok=True)  # this folder's own, whatever it was
    result.save(kept.path(SWEEP))
    kept.record(SWEEP, made_from, SWEEP_ABOUT)
    return result


def _texts(
    model: Any, vectors: SteeringVectors, layer: int, config: DemoConfig, kept: _Kept
) -> dict[str, dict[str, str]]:
    """`texts[prompt][multiplier]`, generated greedily; all multipliers of a prompt run as one batch."""
    from tqdm.auto import tqdm

    from caa_lens.steering.generation import generate

    multipliers = sorted({*config.multipliers, 0.0})
    settings = {"multipliers": multipliers, "prompts": config.prompts, "max_new_tokens": config.max_new_tokens}
    made_from = {"vectors": kept.digest(VECTORS), "layer": layer, **settings}
    if kept.reuse(TEXTS, made_from):
        return json.loads(kept.path(TEXTS).read_text(encoding="utf-8"))
    steered = [(vectors[layer], torch.tensor(multipliers))]
    texts = {}
    for prompt in tqdm(config.prompts, desc=f"generate at layer {layer}", unit="prompt"):
        answers = generate(model, prompt, vectors=steered, max_new_tokens=config.max_new_tokens)
        texts[prompt] = {f"{m:+g}": text for m, text in zip(multipliers, answers, strict=True)}
    text = json.dumps(texts, indent=2, ensure_ascii=False)
    write_atomically(kept.path(TEXTS), lambda file: file.write_text(text, encoding="utf-8"))
    kept.record(TEXTS, made_from)
    return texts


def _show_sweep(sweep: "Sweep", console: Console) -> None:
    mean = sweep.table()
    table = Table(title=f"mean {METRIC_LABEL[sweep.metric]} by layer and multiplier", title_justify="left")
    table.add_column("layer", justify="right")
    for m in mean.columns:
        table.add_column(f"{m:+g}" if m else "unsteered", justify="right")
    for layer, row in mean.iterrows():
        style = "bold" if layer == sweep.best_layer else ""
        table.add_row(str(layer), *(f"{value:.3f}" for value in row), style=style)
    console.print(table)
    console.print(_verdict(sweep))


def _verdict(sweep: "Sweep") -> str:
    """The best layer and whether its effect can be told from nothing."""
    effect = sweep.effect()
    row = effect[effect["layer"] == sweep.best_layer].iloc[0]
    certain = "excludes" if row["low"] > 0 or row["high"] < 0 else "includes"
    return (
        f"Best layer: {sweep.best_layer}. There, multiplier +{row['multiplier']:g} scores {row['effect']:.3f} above "
        f"-{row['multiplier']:g} (paired over questions, 95 % interval {row['low']:.3f} to {row['high']:.3f}, "
        f"which {certain} 0)."
    )


def _show_texts(texts: dict[str, dict[str, str]], layer: int, console: Console) -> None:
    for prompt, answers in texts.items():
        table = Table(title=f"{prompt}  (layer {layer}, greedy)", title_justify="left", show_lines=True)
        table.add_column("multiplier", justify="right")
        table.add_column("answer")
        for multiplier, answer in answers.items():
            table.add_row("unsteered" if float(multiplier) == 0 else multiplier, _plain(answer))
        console.print(table)


def _plain(text: str) -> Any:
    from rich.text import Text  # model output is text, never markup

    return Text(text)


def _show_lens(model: Any, vectors: SteeringVectors, best: int, console: Console) -> "pd.DataFrame":
    from caa_lens.interpretation.lens import logit_lens

    n = model.cfg.n_layers
    layers = sorted({n // 3, best, (2 * n) // 3, n - 4, n - 1})
    frame = logit_lens(model, vectors, layers=layers, k=8).summary().reset_index()
    table = Table(title="logit lens of the vectors (read through the final norm)", title_justify="left")
    for column in frame.columns:
        table.add_column(column, justify="right" if column == "layer" else "left")
    for row in frame.itertuples(index=False):
        table.add_row(*(_plain(str(cell)) for cell in row))
    console.print(table)
    return frame


def _write_report(
    model: Any,
    config: DemoConfig,
    sweep: "Sweep",
    texts: dict[str, dict[str, str]],
    lens: "pd.DataFrame",
    folder: Path,
) -> Path:
    from caa_lens.report.page import Section, write_report

    groups: Sequence[tuple[str, list[tuple[str, str]]]] = [
        (prompt, [("unsteered" if float(m) == 0 else m, answer) for m, answer in answers.items()])
        for prompt, answers in texts.items()
    ]
    return write_report(
        folder / "report.html",
        title=f"Steering {model.cfg.model_name} by {config.behavior}",
        lead=_verdict(sweep),
        sections=[
            Section(
                title=f"Dose and response at layer {sweep.best_layer}",
                text="The score of held-out answers as the vector is added more or less strongly.",
                figures=[sweep.plot_layer()],
            ),
            Section(
                title="Steered text",
                text="The same greedy generation with the vector added at the multiplier above each text.",
                texts=groups,
            ),
            Section(
                title="Layer by multiplier",
                text="Blue is above the unsteered level, red below. Hover for 95 % intervals over questions.",
                figures=[sweep.plot()],
            ),
            Section(
                title="What the vectors say",
                text="Tokens each layer's vector promotes and suppresses most, through the final norm and the "
                "unembedding.",
                tables=[lens],
            ),
        ],
        settings={**sweep.settings, **config.model_dump(), "vectors": sweep.provenance["vectors"].method},
    )
