"""`caa-lens generate`: an answer as it is written, with any number of vectors."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional, TypeVar

import typer

from caa_lens.cli.options import (
    BackendOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    note_other_model,
    read_question,
)
from caa_lens.provenance import layer_ranges

if TYPE_CHECKING:
    from caa_lens.steering.interventions import Intervention

T = TypeVar("T")


def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask: words; or messages, as JSON or in a .json file of them.")],
    vectors: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option("--vectors", "--vector", help="A file of vectors; say it again for more of them."),
    ] = None,
    layer: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(help="Which layer's vector: once for all files, or once for each, in their order."),
    ] = None,
    multiplier: Annotated[
        Optional[list[float]],  # noqa: UP045
        typer.Option(help="How much of it: once for all files, or once for each; 1 by default."),
    ] = None,
    start: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="The prompt's first steered token, from 0; by default the last of its instruction."),
    ] = None,
    system: Annotated[Optional[str], typer.Option(help="A system prompt.")] = None,  # noqa: UP045
    prompt_format: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The model's own by default; 'raw' goes on with the text as it is, without a template."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token; else they are drawn.")] = 0.0,
    seed: Annotated[Optional[int], typer.Option(help="Of what is drawn; 0 by default.")] = None,  # noqa: UP045
    model: ModelOption = "demo",
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answer.")] = 100,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
) -> None:
    """Answer a prompt, steered or not, as it is written.

    Example: `caa-lens generate "How was your day?" --vectors sentiment.safetensors --layer 14 --multiplier=-2`
    """
    from caa_lens import generate_stream, load_model

    if seed is not None and temperature == 0:
        raise ValueError("at temperature 0 nothing is drawn, and a seed changes nothing: add --temperature, e.g. 0.7")
    question = read_question(prompt)
    steering = _steering(vectors or [], layer or [], multiplier or [], start)
    loaded = load_model(model, dtype=dtype, device=device, backend=backend)
    for one in steering:
        assert one.vector is not None
        note_other_model(one.vector, loaded)
    for piece in generate_stream(
        loaded,
        question,
        vectors=steering,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=0 if seed is None else seed,
        system=system,
        prompt_format=prompt_format,
    ):
        typer.echo(piece, nl=False)
    typer.echo()


def _steering(
    files: Sequence[Path], layers: Sequence[int], multipliers: Sequence[float], start: int | None
) -> "list[Intervention]":
    """What each file's vector does."""
    from caa_lens import Intervention, read_vectors

    if not files:
        said = {"--layer": layers, "--multiplier": multipliers, "--start": [] if start is None else [start]}
        if given := [name for name, value in said.items() if value]:
            raise ValueError(
                f"nothing to steer with: {' and '.join(given)} need{'s' * (len(given) == 1)} a file of vectors, add "
                "--vectors FILE"
            )
        return []
    if start is not None and start < 0:
        raise ValueError(f"--start must be 0 or more, got {start}: it counts the prompt's tokens from its first")
    each = [read_vectors(file) for file in files]
    if not layers:
        for file, vectors in zip(files, each, strict=True):
            if len(vectors) > 1:
                raise ValueError(f"which layer's vector? add --layer; {file} has layers {layer_ranges(vectors.layers)}")
    chosen = _for_each("--layer", layers, files) if layers else [vectors.layers[0] for vectors in each]
    amounts = _for_each("--multiplier", multipliers, files) if multipliers else [1.0] * len(files)
    return [
        Intervention(vector=vectors[layer], multiplier=amount, start=start)
        for vectors, layer, amount in zip(each, chosen, amounts, strict=True)
    ]


def _for_each(name: str, given: Sequence[T], files: Sequence[Path]) -> list[T]:
    """One value for every file: the same, or its own."""
    if len(given) == 1:
        return list(given) * len(files)
    if len(given) != len(files):
        raise ValueError(
            f"{name} is said {len(given)} times for {len(files)} file{'s' * (len(files) > 1)} of vectors: say it once "
            "for all, or once for each"
        )
    return list(given)
