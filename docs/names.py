"""The page of all public names, each with its line: `python docs/names.py` writes docs/names.md.

A name is public if the stub of its room lists it; the line is the first of its docstring.
"""

import importlib
import inspect
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
    ("caa_lens", "At the top of the package: what a first day needs"),
    ("caa_lens.contrast", "Contrast pairs"),
    ("caa_lens.prompts", "Prompts"),
    ("caa_lens.models", "Models"),
    ("caa_lens.engine", "Activations and the engine"),
    ("caa_lens.vectors", "Vectors"),
    ("caa_lens.steering", "Steering"),
    ("caa_lens.measures", "Measurements"),
    ("caa_lens.methods", "Methods beside CAA"),
    ("caa_lens.interpretation", "Interpretation"),
    ("caa_lens.transfers", "Transfers"),
    ("caa_lens.evaluation", "Evaluation by other harnesses"),
    ("caa_lens.explorer", "The explorer"),
    ("caa_lens.report", "Reports"),
    ("caa_lens.paper", "The paper"),
)
HEAD = """# All names

Every public name with its line. `import caa_lens as cl`; what stands below a room is reached through it, as in
`cl.interpretation.pair_pca`, and found there by completion. Names at the top are in their rooms, too.
"""


def page() -> str:
    """The page as it should be."""
    parts = [HEAD]
    for room, title in ROOMS:
        names = [name for name in _names(room) if not inspect.ismodule(name[1])]
        rows = [f"| `{room.replace('caa_lens', 'cl')}.{name}` | {_line(value)} |" for name, value in names]
        parts.append("\n".join([f"## {title}", "", "| name | what it is |", "|---|---|", *rows, ""]))
    return "\n".join(parts)


def _names(room: str) -> list[tuple[str, object]]:
    package = importlib.import_module(room)
    stub = Path(str(package.__file__)).with_suffix(".pyi").read_text(encoding="utf-8")
    in_order = [line.rpartition(" as ")[2] for line in stub.splitlines() if " import " in line]
    return [(name, getattr(package, name)) for name in in_order]


def _line(value: object) -> str:
    text = (inspect.getdoc(value) or "").partition("\n\n")[0]
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    (ROOT / "docs" / "names.md").write_text(page(), encoding="utf-8")
