"""`caa-lens vectors`: look into vector files, compare, combine and convert them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from caa_lens.cli.options import App, VectorsArgument, parse_layers
from caa_lens.cli.stopping import will_write
from caa_lens.provenance import PAIR_HASHES, layer_ranges

if TYPE_CHECKING:
    from caa_lens.vectors.steering_vectors import SteeringVectors

vectors_app = App(help="Look into vector files, compare, combine and convert them.")


@vectors_app.command()
def show(path: VectorsArgument) -> None:
    """Say what a vector file holds.

    Example: `caa-lens vectors show sentiment.safetensors`
    """
    from caa_lens import read_vectors

    vectors = read_vectors(path)
    for key, value in _facts(vectors).items():
        typer.echo(f"{key:>16}  {value}")
    norms = [f"{layer}: {norm:.3g}" for layer, norm in zip(vectors.layers, vectors.norms.tolist(), strict=True)]
    for first in range(0, len(norms), 8):
        line = "".join(f"{norm:<11}" for norm in norms[first : first + 8]).rstrip()
        typer.echo(f"{'' if first else 'norm by layer':>16}  {line}")


@vectors_app.command()
def diff(a: VectorsArgument, b: VectorsArgument) -> None:
    """Compare two vector files: cosine and norms layer by layer, and what else differs.

    Example: `caa-lens vectors diff sentiment.safetensors formality.safetensors`
    """
    from caa_lens import read_vectors

    first, second = read_vectors(a), read_vectors(b)
    facts, others = _facts(first), _facts(second)
    for key in facts | others:
        if facts.get(key) != others.get(key):
            typer.echo(f"{key:>16}  A: {facts.get(key, '')}\n{'':>16}  B: {others.get(key, '')}")
    if first.layers == second.layers and first.directions.equal(second.directions):
        typer.echo("the vectors are identical")
        return
    common = [layer for layer in first.layers if layer in second]
    if first.d_model != second.d_model or not common:
        typer.echo("the vectors have no width and layer in common to compare")
        return
    typer.echo(f"{'layer':>5}  {'cosine':>8}  {'norm A':>9}  {'norm B':>9}  {'B / A':>9}")
    for layer in common:
        v, w = first[layer], second[layer]
        zero = v.norm == 0 or w.norm == 0
        cosine, ratio = ("-", "-") if zero else (f"{v.cosine(w):.4f}", f"{w.norm / v.norm:.4g}")
        typer.echo(f"{layer:>5}  {cosine:>8}  {v.norm:>9.4g}  {w.norm:>9.4g}  {ratio:>9}")


# An expression may start with a minus, which is no option.
@vectors_app.command(context_settings={"ignore_unknown_options": True})
def combine(
    expression: Annotated[str, typer.Argument(help="Names, numbers, + - * /, parentheses, methods of vectors.")],
    files: Annotated[list[str], typer.Argument(metavar="NAME=FILE...", help="What the names stand for.")],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
) -> None:
    """Compute vectors from files of vectors, layer by layer, and write them with the expression that made them.

    Vectors have the methods of the library: `A.onto(B)`, `A.without(B, C)`, `(A - B).normalized(to=A.norms)`,
    `A.slerp(B, 0.5)`, `A.top_k(64)`, and `mean(A, B)`; `A[13]` is one layer.

    Example: `caa-lens vectors combine "0.5*A - B" A=sentiment.safetensors B=formality.safetensors --out c.safetensors`
    """
    from dataclasses import replace

    from caa_lens.vectors.algebra.expression_parser import evaluate
    from caa_lens.vectors.interchange import read_vectors
    from caa_lens.vectors.steering_vectors import SteeringVector, SteeringVectors

    will_write(out)
    named: dict[str, SteeringVectors] = {}
    for argument in files:
        name, _, file = argument.partition("=")
        if not name.isidentifier() or not file or name in named:
            raise ValueError(f"got {argument!r}, expected NAME=FILE with a different name each, e.g. A=a.safetensors")
        named[name] = read_vectors(file)
    result = evaluate(expression, named)
    vectors = SteeringVectors.from_vectors([result]) if isinstance(result, SteeringVector) else result
    assert isinstance(vectors, SteeringVectors)
    details = {**vectors.provenance.details, "combined": f"{expression} with {', '.join(files)}"}
    replace(vectors, provenance=replace(vectors.provenance, details=details)).save(out)
    typer.echo(_printable(f"{vectors!r}\nwritten to {out}"))


@vectors_app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A file or folder of vectors, of any of the formats.")],
    out: Annotated[Path, typer.Argument(help="The file or folder to write.")],
    to: Annotated[Optional[str], typer.Option(help="safetensors, caa, gguf or vllm-lens.")] = None,  # noqa: UP045
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Whose vectors, where the file does not say; which model's, where a folder holds several."),
    ] = None,
    layers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The block of each row of a bare tensor, in order, e.g. 10-19, or of a single vector."),
    ] = None,
) -> None:
    """Convert vectors between this library's files and other tools'; without `--to`, the ending says to which.

    Example: `caa-lens vectors convert sentiment.safetensors sentiment.gguf`
    """
    from caa_lens.vectors.interchange import read_vectors, write_vectors

    will_write(out)
    vectors = read_vectors(source, model=model, layers=None if layers is None else _in_order(layers))
    written = write_vectors(vectors, out, to)
    again = read_vectors(written, model=vectors.provenance.model if written.is_dir() else None)
    typer.echo(_printable(f"{again!r}\nwritten to {written}"))


def _in_order(text: str) -> list[int]:
    """`3,9,14-16` as [3, 9, 14, 15, 16], in the order of the text."""

    return [layer for part in text.split(",") for layer in parse_layers(part)]


def _facts(vectors: "SteeringVectors") -> dict[str, str]:
    """What a file says about its vectors, in words."""
    p = vectors.provenance
    facts = {
        "behavior": p.behavior,
        "model": p.model,
        "method": p.method,
        "layers": layer_ranges(vectors.layers) + " (0-based blocks, at hook_resid_post)",
        "d_model": str(vectors.d_model),
        "dtype": str(vectors.directions.dtype).removeprefix("torch."),
        "pairs": str(p.n_pairs or "unknown"),
        "data": p.dataset_hash,
        "prompt format": p.prompt_format,
        "read at": p.token_position,
        "normalisation": p.normalisation,
        "expression": p.expression,
        **{key: value for key, value in p.details.items() if key != PAIR_HASHES},
    }
    return {_printable(key): _printable(value) for key, value in facts.items()}


def _printable(text: str) -> str:
    """Text of a file that somebody else made may hold codes that a terminal obeys."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
