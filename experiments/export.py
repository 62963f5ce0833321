"""A finished run in small files, for keeping: one frame an experiment, and what was found as Markdown.

python -m experiments.export runs/paper-demo experiments/results/demo
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from caa_lens.atomic_files import write_atomically
from caa_lens.report.runs import read_run
from experiments.catalogue import EXPERIMENTS
from experiments.running.run_folder import RunFolder
from experiments.running.settings import RunConfig
from experiments.running.units import together

if TYPE_CHECKING:
    import pandas as pd


def export(run: str | Path, to: str | Path) -> Path:
    """Write `results.md` and `<experiment>.parquet` of every experiment with a section, of the units there are.

    Raises:
        RunFolderError: the folder holds no run, or nothing in it is finished.
    """
    folder, to = RunFolder(run), Path(to)
    part = read_run(run)
    config = RunConfig(**folder.about()["config"])
    for experiment in EXPERIMENTS:
        frames = folder.frames_so_far(experiment.name, experiment.units(config))
        if frames and folder.section_file(experiment.name).exists():
            rows = together(frames)
            rows = rows.astype({c: "float32" for c in rows.select_dtypes("float64") if c != "multiplier"})
            write_atomically(
                to / f"{experiment.name}.parquet", lambda file, rows=rows: rows.to_parquet(file, compression="zstd")
            )
    lines = [f"# {part.title}", ""]
    lines += [f"- {key}: {value}" for key, value in part.settings.items()]
    for section in part.sections:
        lines += ["", f"## {section.title}{f' ({section.source})' if section.source else ''}", ""]
        if section.skipped:
            lines.append(f"Not run: {section.skipped}.")
            continue
        lines += [section.text, "", *(f"- {line}" for line in section.found)]
        for caption, table in section.captioned_tables():
            lines += ["", f"{caption}:", "", *markdown(table)]
    text = "\n".join(lines) + "\n"
    return write_atomically(to / "results.md", lambda file: file.write_text(text, encoding="utf-8"))


def markdown(table: "pd.DataFrame") -> list[str]:
    """The lines of a table; what Markdown would read as marks is kept as text."""

    def cell(value: object) -> str:
        text = ("" if value != value else f"{value:.4g}") if isinstance(value, float) else str(value)
        return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ").replace("`", "'")

    rows = [list(table.columns), ["---"] * len(table.columns), *table.itertuples(index=False)]
    return ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]


if __name__ == "__main__":
    print(f"written: {export(sys.argv[1], sys.argv[2])}")
