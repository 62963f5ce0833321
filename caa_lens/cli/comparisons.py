"""`caa-lens compare`: steering methods on the same pairs, at the same side effects."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from caa_lens.cli.options import (
    BackendOption,
    DataArgument,
    DeviceOption,
    DtypeOption,
    ModelOption,
    parse_layers,
    parse_numbers,
)
from caa_lens.cli.outputs import check_result_and_figure, split_off

MORE = "The instruction in words, for more of the behavior."


def compare(
    data: DataArgument,
    more: Annotated[str, typer.Option(help=MORE)],
    less: Annotated[str, typer.Option(help="The same for less of it.")],
    out: Annotated[Path, typer.Option(help="The .parquet file to write; settings and a page come beside it.")] = Path(
        "comparison.parquet"
    ),
    methods: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Separated by semicolons, e.g. 'CAA;instruction;SADI, original'; by default one of each."),
    ] = None,
    model: ModelOption = "demo",
    layers: Annotated[Optional[str], typer.Option(help="Layers to choose among; three by default.")] = None,  # noqa: UP045
    test: Annotated[int, typer.Option(help="Pairs to hold out and report on.")] = 24,
    choose: Annotated[int, typer.Option(help="Pairs of the others to choose layers and strengths on.")] = 12,
    budgets: Annotated[str, typer.Option(help="Mean divergences to compare at, in nats.")] = "0.05,0.1,0.3",
    n_tokens: Annotated[int, typer.Option(help="Tokens of each neutral answer.")] = 32,
    steered_text: Annotated[
        str, typer.Option(help="'all', 'chosen' or 'none': strengths at which text is looked at, the costliest part.")
    ] = "chosen",
    epochs: Annotated[int, typer.Option(help="Of BiPO's training.")] = 10,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
) -> None:
    """Compare steering methods: effect on held-out questions against what they change elsewhere.

    Example: `caa-lens compare sentiment --more "Be cheerful." --less "Be gloomy." --methods "CAA;instruction"`
    """
    from caa_lens import ContrastSet, load_model
    from caa_lens import compare as run_compare
    from caa_lens.methods.comparing import METHODS
    from caa_lens.report.comparisons import comparison_section
    from caa_lens.report.page import write_report

    check_result_and_figure(out)
    train, held_out = split_off(ContrastSet.load(data), test)
    names = METHODS if methods is None else tuple(name.strip() for name in methods.split(";"))
    chosen, nats = (parse_layers(layers) if layers else None), parse_numbers("budgets", budgets)
    result = run_compare(
        load_model(model, dtype=dtype, device=device, backend=backend),
        train,
        held_out,
        names,
        words=(more, less),
        layers=chosen,
        validation=choose,
        budgets=nats,
        n_tokens=n_tokens,
        steered_text=steered_text,
        bipo_options={"epochs": epochs},
    )
    section, page = comparison_section(result), out.with_suffix(".html")
    typer.echo(f"{result!r}\n{section.tables[0][0]}\n{result.table().to_string(index=False)}")
    typer.echo("\n".join(section.found))
    result.save(out)
    write_report(page, title=section.title, lead=section.text, sections=[section], settings=result.settings)
    typer.echo(f"written to {out}, {out.with_suffix('.json').name} and {page}")
