"""`caa-lens lens`: what vectors say in tokens, in every reading of the library's lens."""

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from caa_lens.cli.options import (
    BackendOption,
    DeviceOption,
    DtypeOption,
    LayersOption,
    ModelOption,
    VectorsArgument,
    note_other_model,
    parse_layers,
)
from caa_lens.cli.outputs import check_result_out, write_result_out


def lens(
    vectors: VectorsArgument,
    model: ModelOption = "demo",
    layers: LayersOption = None,
    k: Annotated[int, typer.Option(help="Tokens on each side.")] = 8,
    reading: Annotated[
        str,
        typer.Option(
            help="'normed' or 'direct' (a projection), 'in_context', or what the model answers the vector: 'causal' or "
            "'effect'."
        ),
    ] = "normed",
    pairs: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A contrast set: for in_context to read in, for causal and effect its questions."),
    ] = None,
    prompts: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="For causal and effect: a bundled set's open-ended prompts, or a file of questions."),
    ] = None,
    words: Annotated[Optional[str], typer.Option(help="Rank these words, comma-separated, instead.")] = None,  # noqa: UP045
    multiplier: Annotated[float, typer.Option(help="How much of each vector.")] = 1.0,
    controls: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Random directions to compare with; 19 by default, 0 for none."),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A file to write, too: .parquet (with settings and figure), .csv, .json, or .html (figure)."),
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
) -> None:
    """Show which tokens each layer's vector promotes and suppresses.

    Example: `caa-lens lens sentiment.safetensors --reading causal --layers 11,14,17 --out lens.csv`
    """
    from caa_lens import ContrastSet, load_model, logit_lens, read_vectors, word_ranks
    from caa_lens.contrast import load_open_ended

    if out is not None:
        check_result_out(out)
    runs = reading in ("causal", "effect")
    if reading == "in_context" and pairs is None:
        raise ValueError("the in_context reading needs real residuals: add --pairs, e.g. --pairs sentiment")
    if reading != "in_context" and pairs is not None and not runs:
        raise ValueError(
            f"the {reading} reading does not look at pairs: add --reading in_context, or leave out --pairs"
        )
    if prompts is not None and not runs:
        raise ValueError(
            f"the {reading} reading does not look at prompts: add --reading causal, or leave out --prompts"
        )
    of_each = read_vectors(vectors)
    options: dict[str, Any] = {
        "layers": parse_layers(layers) if layers else None,
        "reading": reading,
        "pairs": None if pairs is None else ContrastSet.load(pairs),
        "prompts": None if prompts is None else load_open_ended(prompts),
        "multiplier": multiplier,
        "controls": controls,
    }
    loaded = load_model(model, dtype=dtype, device=device, backend=backend)
    note_other_model(of_each, loaded)
    if words is not None:
        ranked = word_ranks(loaded, of_each, [word.strip() for word in words.split(",")], **options)
        typer.echo(ranked.summary().to_string())
        if ranked.control_medians:
            typer.echo("median rank, beside that under random directions (5 to 95 %)")
            typer.echo(ranked.medians().round(3).to_string(index=False))
        if out is not None:
            write_result_out(ranked, out)
        return
    result = logit_lens(loaded, of_each, k=k, **options)
    typer.echo(result.summary(k).to_string())
    if "linearity" in result.frame:
        typer.echo("how linear the model's answer is, by layer (1 and 1: linear)")
        typer.echo(result.by_layer()[["layer", "linearity", "size_ratio"]].round(3).to_string(index=False))
    if out is not None:
        write_result_out(result, out)
