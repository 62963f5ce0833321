"""`caa-lens reliability`, `calibrate` and `side-effects`: is the vector real, how much of it, and at what cost?"""

from pathlib import Path
from typing import Annotated, Optional

import typer

from caa_lens.cli.options import (
    BackendOption,
    DataArgument,
    DeviceOption,
    DtypeOption,
    LayersOption,
    ModelOption,
    VectorsArgument,
    note_other_model,
    parse_layers,
    parse_numbers,
)
from caa_lens.cli.outputs import check_result_and_figure, split_off, write_result_and_figure

OUT = "The .parquet file to write; settings and a figure come beside it."


def reliability(
    data: DataArgument,
    out: Annotated[Path, typer.Option(help=OUT)] = Path("reliability.parquet"),
    model: ModelOption = "demo",
    layers: LayersOption = None,
    test: Annotated[int, typer.Option(help="Pairs to leave out, as held out by `extract --test`.")] = 0,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
) -> None:
    """Ask what contrast pairs agree on, by layer, before anything is steered.

    Example: `caa-lens reliability sentiment --test 40 --layers 6,14,22`
    """
    from caa_lens import ContrastSet, load_model
    from caa_lens import reliability as run_reliability
    from caa_lens.engine.pair_reading import pair_activations
    from caa_lens.report.trust import agreement_told, told_layers

    check_result_and_figure(out)
    pairs = ContrastSet.load(data)
    pairs = split_off(pairs, test)[0] if test else pairs
    chosen = parse_layers(layers) if layers else None
    loaded = load_model(model, dtype=dtype, device=device, backend=backend)
    result = run_reliability(pair_activations(loaded, pairs, layers=chosen))
    typer.echo(repr(result))
    for layer in told_layers(result):
        typer.echo(agreement_told(result, layer))
    write_result_and_figure(result, out)


def calibrate(
    data: DataArgument,
    vectors: VectorsArgument,
    out: Annotated[Path, typer.Option(help=OUT)] = Path("calibration.parquet"),
    budget: Annotated[float, typer.Option(help="Mean divergence on neutral prompts that is allowed, in nats.")] = 0.1,
    multipliers: Annotated[Optional[str], typer.Option(help="Numbers, each with its negative.")] = None,  # noqa: UP045
    model: ModelOption = "demo",
    layers: LayersOption = None,
    test: Annotated[int, typer.Option(help="How many pairs `extract --test` held out: half choose, half report.")] = 0,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
) -> None:
    """Choose a layer and a range of multipliers within a budget of side effects.

    Example: `caa-lens calibrate sentiment sentiment.safetensors --test 40 --budget 0.1`
    """
    from caa_lens import ContrastSet, load_model, read_vectors
    from caa_lens import calibrate as run_calibrate
    from caa_lens.measures.calibrating.calibration import MULTIPLIERS

    check_result_and_figure(out)
    pairs, of_each = ContrastSet.load(data), read_vectors(vectors)
    pairs = split_off(pairs, test)[1] if test else pairs
    numbers = parse_numbers("multipliers", multipliers) if multipliers else MULTIPLIERS
    chosen = parse_layers(layers) if layers else None
    loaded = load_model(model, dtype=dtype, device=device, backend=backend)
    note_other_model(of_each, loaded)
    result = run_calibrate(loaded, of_each, pairs, budget, layers=chosen, multipliers=numbers)
    typer.echo(repr(result))
    write_result_and_figure(result, out)


def side_effects(
    vectors: VectorsArgument,
    layer: Annotated[int, typer.Option(help="Which layer's vector.")],
    multiplier: Annotated[float, typer.Option(help="How much of it.")] = 1.0,
    out: Annotated[Path, typer.Option(help=OUT)] = Path("side_effects.parquet"),
    others: Annotated[
        bool, typer.Option(help="Also the bundled behaviors: cosines, and effects on their pairs.")
    ] = False,
    n_random: Annotated[int, typer.Option(help="Random directions of the same norm to compare with.")] = 3,
    model: ModelOption = "demo",
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
) -> None:
    """Measure what steering changes where it should change nothing, beside random directions.

    Example: `caa-lens side-effects sentiment.safetensors --layer 14 --multiplier=-2`
    """
    from caa_lens import load_model, read_vectors
    from caa_lens import side_effects as run_side_effects
    from caa_lens.measures.elsewhere.other_behaviors import BUNDLED
    from caa_lens.report.trust import side_effects_told

    check_result_and_figure(out)
    of_each = read_vectors(vectors)
    vector = of_each[layer]
    loaded = load_model(model, dtype=dtype, device=device, backend=backend)
    note_other_model(vector, loaded)
    result = run_side_effects(loaded, vector, multiplier, n_random=n_random, others=BUNDLED if others else None)
    typer.echo(repr(result))
    for line in side_effects_told(result):
        typer.echo(line)
    write_result_and_figure(result, out)
