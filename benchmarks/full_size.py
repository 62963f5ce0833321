"""Llama 2 at full size with random weights on one device: what a researcher's GPU does, and how near its limits.

    python benchmarks/full_size.py --shape 7b --dtype bfloat16
    python benchmarks/full_size.py --shape 13b --dtype bfloat16 --keep build/gpu/table.json
    python benchmarks/full_size.py --shape tiny --device cpu --pairs 4 --tokens 4      # as the tests run it

Weights are random: speed and memory depend on shapes only. Prompts are random tokens. Each figure stands beside the
limit that was measured on the same device: its largest matrix product for extraction and sweeps, a large copy for
generation at batch 1, which reads every weight for every token. With `--keep` each row is written as soon as it is
there, and a second run measures what is missing; what fails (a model that does not fit) is a row that says so.
`make gpu` runs all of it.
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu.bench import SHAPES, Bench, as_hugging_face, built, empty, pairs_of, peak_of
from gpu.generating import generation
from gpu.limits import copy_limit, matrix_limit
from gpu.rows import extraction, loading, sweep
from gpu.table import Kept, Row, markdown
from timing import machine

import caa_lens as cl


class Rows:
    """Measures what is not kept yet, and keeps each row as it comes."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.kept = Kept(Path(options.keep), machine())
        self.options, self.name = options, f"{options.shape} {options.dtype}"
        if self.kept.begun_anew:
            warnings.warn(self.kept.begun_anew, stacklevel=2)

    def missing(self, *keys: str) -> bool:
        return self.options.again or not all(self.kept.has(f"{self.name} {key}") for key in keys)

    def take(self, measure: Callable[[], Iterator[tuple[str, Row]]], *keys: str) -> None:
        """What cannot be measured is a row that says why; the next ones are measured all the same."""
        if not self.missing(*keys):
            return
        try:
            for key, row in measure():
                self.put(key, row)
        except torch.OutOfMemoryError as error:
            empty()
            free, total = torch.cuda.mem_get_info()
            said = f"out of memory: got {free / 1e9:.0f} of {total / 1e9:.0f} GB free ({str(error).splitlines()[0]})"
            self.put(keys[0], Row(work=keys[0], figure=f"{said}: a larger card, or a smaller --shape", failed=True))
        except RuntimeError as error:
            said = str(error).splitlines()[0]
            self.put(keys[0], Row(work=keys[0], figure=f"failed: {said}", failed=True))

    def put(self, key: str, row: Row) -> None:
        self.kept.put(f"{self.name} {key}", replace(row, work=f"{self.name}: {row.work}"))
        print("  ".join(cell for cell in (f"{self.name}: {row.work}", *row.cells()[1:]) if cell), flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=150, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--load", action="store_true", help="also load such a model from files")
    parser.add_argument("--scratch", help="a folder with room for those files")
    parser.add_argument("--compile", action="store_true", help="torch.compile the step of fixed shape; takes minutes")
    parser.add_argument("--keep", help="the file that rows are kept in; a second run measures what is missing")
    parser.add_argument("--again", action="store_true", help="measure what is kept, too")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"got --device {options.device}, but torch {torch.__version__} sees no card: --device cpu")
    with tempfile.TemporaryDirectory() as folder:
        options.keep = options.keep or str(Path(folder) / "table.json")
        rows = Rows(options)
        on_card = device.type == "cuda"
        if options.again or f"matrix {options.dtype}" not in rows.kept.limits:
            rows.kept.put_limit(f"matrix {options.dtype}", matrix_limit(device, dtype, 8192 if on_card else 512))
        if options.again or "copy" not in rows.kept.limits:
            rows.kept.put_limit("copy", copy_limit(device, 2**32 if on_card else 2**26))
        try:
            if options.load:
                rows.take(lambda: loading(options), "load")
                empty()
            measure(rows, options)
        except KeyboardInterrupt:
            raise SystemExit(f"cut short; the rows so far are kept in {options.keep}") from None
        print("\n" + markdown(Path(options.keep)))


def measure(rows: Rows, options: argparse.Namespace) -> None:
    keys = [(f"generation {n}", f"hook {n}", f"static {n}") for n in options.batches]
    if not rows.missing("extraction", "sweep", *(key for three in keys for key in three)):
        return
    made: list[Any] = []

    def make() -> Iterator[tuple[str, Row]]:
        time, _ = peak_of(lambda: made.append(built(options)))
        held = sum(p.numel() * p.element_size() for p in made[0].parameters()) / 2**30
        yield (
            "build",
            Row(work="random weights made on the device", figure=f"{time:.1f} s", against=f"{held:.1f} GiB held"),
        )

    rows.kept.rows.pop(f"{rows.name} build", None)
    rows.take(make, "build")
    if not made:
        return
    model = made[0]
    vectors = torch.randn(model.cfg.n_layers, model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    bench = Bench(
        model=model,
        pairs=pairs_of(options.pairs, options.prompt),
        vectors=cl.SteeringVectors(directions=vectors, layers=tuple(range(len(vectors)))).to(model.W_E.device),
        options=options,
        limits=rows.kept.limits,
    )
    rows.take(lambda: extraction(bench), "extraction")
    rows.take(lambda: sweep(bench), "sweep")
    if rows.missing(*(key for three in keys for key in three)):
        hf = as_hugging_face(model, options)
        for n, three in zip(options.batches, keys, strict=True):
            rows.take(lambda n=n: generation(bench, n, hf), *three)


if __name__ == "__main__":
    main()
