"""The table of a card: rows kept one at a time in a file, and written as Markdown.

A row has a figure, its aim, and how much of the card's limit it reaches: of what the card's largest matrix product
gave, or of what a large copy moved, both measured in the same run. Only the standard library is imported here.
"""

import json
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

NOT_YET = "not measured yet: `make gpu-wheels` on any machine, then `make gpu` on the one with the card"
COLUMNS = ("work", "figure", "aim", "share of the limit", "against", "peak memory above the weights")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure.

    Attributes:
        work: what was done.
        figure: what was measured, with its unit; the reason instead, if it failed.
        aim: what it should be, in words; empty without one.
        met: whether it is; None without an aim, or if nothing was measured.
        share: how much of the card's limit that is, with the limit's name.
        against: compared with another way.
        memory: peak above the weights.
        failed: nothing was measured, and `figure` says why.
    """

    work: str
    figure: str
    aim: str = ""
    met: bool | None = None
    share: str = ""
    against: str = ""
    memory: str = ""
    failed: bool = False

    def cells(self) -> tuple[str, ...]:
        verdict = "" if self.met is None else ", met" if self.met else ", **missed**"
        return self.work, self.figure, f"{self.aim}{verdict}", self.share, self.against, self.memory


class Kept:
    """Rows of one machine in one file, which is written whole after each row, so that a second run goes on.

    What another card or another torch measured is not mixed in: the file is then begun anew, and `begun_anew` says so.
    """

    def __init__(self, path: Path, machine: str) -> None:
        self.path, self.machine = path, machine
        self.rows: dict[str, Row] = {}
        self.limits: dict[str, float] = {}
        self.begun_anew = ""
        if not path.exists():
            return
        told = read(path)
        if told["machine"] != machine:
            self.begun_anew = f"{path} is of {told['machine']}, this is {machine}: begun anew"
            return
        self.limits = told["limits"]
        self.rows = told["rows"]

    def has(self, key: str) -> bool:
        """Whether a row is there with a figure; one that failed is tried again."""
        return key in self.rows and not self.rows[key].failed

    def put(self, key: str, row: Row) -> None:
        self.rows[key] = row
        self._write()

    def put_limit(self, key: str, value: float) -> None:
        self.limits[key] = value
        self._write()

    def _write(self) -> None:
        told = {
            "machine": self.machine,
            "limits": self.limits,
            "rows": {key: asdict(r) for key, r in self.rows.items()},
        }
        write_whole(self.path, json.dumps(told, indent=1) + "\n")


def read(path: Path) -> dict:
    """The file that `Kept` writes."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        names = {field.name for field in fields(Row)}
        rows = {key: Row(**{name: row[name] for name in names & set(row)}) for key, row in told["rows"].items()}
        return {"machine": told["machine"], "limits": told["limits"], "rows": rows}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a table of a card ({error!r}): move it away, and run again") from error


def write_whole(path: Path, text: str) -> None:
    """The file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
        file.write(text)
    os.replace(file.name, path)


def limits_in_words(limits: dict[str, float]) -> str:
    """`matrix <dtype>` in operations a second, `copy` in bytes a second."""
    words = [
        f"{value / 1e12:.3g} TFLOP/s of a large matrix product in {key.removeprefix('matrix ')}"
        for key, value in limits.items()
        if key.startswith("matrix ")
    ]
    if "copy" in limits:
        words.append(f"{limits['copy'] / 1e9:.0f} GB/s of a large copy, read and written")
    return "; ".join(words)


def markdown(path: Path) -> str:
    """The table of a file, ready for docs/performance.md; what it says is measured, or it says that it failed."""
    if not path.exists():
        return f"{NOT_YET}\n"
    told = read(path)
    lines = [f"Measured on {told['machine']}. Limits measured there: {limits_in_words(told['limits']) or 'none'}.", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row.cells()) + " |" for row in told["rows"].values()]
    return "\n".join(lines) + "\n"
