"""`caa-lens explore`: a page of this machine to play with a vector."""

from typing import Annotated, Optional

import typer

from caa_lens.cli.options import (
    BackendOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    VectorsArgument,
    note_other_model,
    parse_layers,
    parse_numbers,
)


def explore(
    vectors: VectorsArgument,
    model: ModelOption = "demo",
    port: Annotated[int, typer.Option(help="Of this machine's own address; 0 takes any that is free.")] = 8712,
    layers: Annotated[Optional[str], typer.Option(help="e.g. 14 or 10-20; all by default.")] = None,  # noqa: UP045
    multipliers: Annotated[str, typer.Option(help="The least and the greatest.")] = "-4,4",
    max_new_tokens: Annotated[int, typer.Option(help="The longest text that may be asked for.")] = 200,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
) -> None:
    """Open a page to play with a vector: layer, multiplier and prompt, steered and unsteered text, and the lens.

    Only this machine can open the page, and it asks the network for nothing.

    Example: `caa-lens explore sentiment.safetensors --multipliers=-3,3`
    """
    from caa_lens import load_model, read_vectors
    from caa_lens.explorer import Session, serve

    of_each = read_vectors(vectors)
    chosen = of_each.at(parse_layers(layers)) if layers else of_each
    limits = parse_numbers("multipliers", multipliers)
    loaded = load_model(model, dtype=dtype, device=device, backend=backend)
    note_other_model(chosen, loaded)
    session = Session(loaded, chosen, multipliers=limits, max_new_tokens=max_new_tokens)
    try:
        serve(session, port=port, started=lambda address: typer.echo(f"Open {address} in a browser; Ctrl-C ends it."))
    except KeyboardInterrupt:
        typer.echo("the explorer has ended")
