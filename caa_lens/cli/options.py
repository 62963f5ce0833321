"""What several commands are given: their options, and texts read as layers and numbers."""

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from typer.core import TyperCommand, TyperGroup

from caa_lens.arguments import describe
from caa_lens.provenance import one_model

if TYPE_CHECKING:
    from caa_lens.contrast.messages import Question
    from caa_lens.vectors.steering_vectors import SteeringVector, SteeringVectors


class FlagsWithoutType:
    """Flags, `--help` too, take no value, so their help shows no type of it."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False) and param.metavar is None:
                param.metavar = ""
        return params


class _Command(FlagsWithoutType, TyperCommand):
    pass


class _Group(FlagsWithoutType, TyperGroup):
    pass


class App(typer.Typer):
    """A command line, or a group of its commands, in one style."""

    def __init__(self, **options: Any) -> None:
        super().__init__(no_args_is_help=True, **{"cls": _Group, **options})

    def command(self, name: str | None = None, **options: Any) -> Any:
        return super().command(name, cls=_Command, **options)


ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="'demo', a hub id, a folder with safetensors, or a GGUF file.")
]
DtypeOption = Annotated[Optional[str], typer.Option(help="float32, bfloat16 or float16.")]  # noqa: UP045
BackendOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="hooked or bridge: what of TransformerLens holds the model; by default what suits it."),
]
DeviceOption = Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1, mps.")]  # noqa: UP045
LayersOption = Annotated[Optional[str], typer.Option(help="e.g. 3,9,14-20; all by default.")]  # noqa: UP045
ScoredOption = Annotated[int, typer.Option(help="Pairs to score, those that `extract --test` held out; 0: all.")]
DataArgument = Annotated[
    str, typer.Argument(help="A bundled set (sentiment, formality, refusal, sycophancy) or a file.")
]
VectorsArgument = Annotated[Path, typer.Argument(help="A file of vectors, or a folder of .pt files.")]


_MESSAGES = re.compile(r"\s*\[\s*\{\s*[\"']")
_AS_MESSAGES = '[{"role": "user", "content": "..."}]'


def parse_layers(text: str) -> tuple[int, ...]:
    """`3,9,14-16` as (3, 9, 14, 15, 16)."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
            raise ValueError(f"layers {text!r} are not understood: expected e.g. 3,9,14-20")
        layers += range(int(first), int(last or first) + 1)
    return tuple(sorted(set(layers)))


def parse_numbers(name: str, text: str) -> tuple[float, ...]:
    """`-1,0,1.5` as (-1.0, 0.0, 1.5)."""
    try:
        found = tuple(float(part) for part in text.split(","))
        if not all(map(math.isfinite, found)):
            raise ValueError
        return found
    except ValueError:
        raise ValueError(f"{name} {text!r} are not understood: expected numbers, e.g. -1,0,1") from None


def read_question(text: str) -> "Question":
    """What to ask: words as they are; messages as JSON, or in a .json file, `[{"role": "user", "content": "..."}]`.

    Raises:
        ValueError: for JSON that is no list of messages.
        FileNotFoundError: for one word that ends in .json, and no such file.
    """
    from caa_lens.contrast.messages import as_question, is_messages

    if not _MESSAGES.match(text) and not (text.endswith(".json") and not re.search(r"\s", text)):
        return text
    where, given = "the messages", text
    if text.endswith(".json"):
        where, given = text, Path(text).expanduser().read_text(encoding="utf-8-sig")
    try:
        found = json.loads(given)
    except ValueError as error:
        raise ValueError(f"{where} cannot be read as JSON ({error}): expected {_AS_MESSAGES}") from None
    if isinstance(found, dict) and "messages" in found:
        found = found["messages"]
    if not is_messages(found):
        raise ValueError(f"{where}: expected {_AS_MESSAGES}, got {describe(found)}")
    return as_question(found)


def note_other_model(vectors: "SteeringVector | SteeringVectors", model: Any) -> None:
    """Says so if vectors are of another model than the one loaded."""
    ours, other = str(model.cfg.model_name), vectors.provenance.model
    if one_model((ours, other)) is None:
        typer.echo(f"note: the vectors are of {other}, the model is {ours}", err=True)
