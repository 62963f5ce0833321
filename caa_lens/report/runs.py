"""The page of finished runs, from their folders alone: no model, no data, and no code of the experiments.

A run folder explains itself: `run.json` holds the settings, and every finished part has a folder with a `section.json`:
title, text, figures (plotly's own JSON), tables and texts. Whatever writes these can be reported.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from caa_lens.atomic_files import write_atomically
from caa_lens.provenance import called
from caa_lens.report.cells import Cells
from caa_lens.report.page import ColoredText, Part, Section, write_parts

FORMAT_VERSION = 1
_PLAIN = ("title", "source", "text", "skipped")


class RunFolderError(ValueError):
    """A folder that cannot be reported."""


def save_section(section: Section, path: str | Path) -> Path:
    """Write a section as JSON, atomically; equal sections make equal files."""
    content: dict[str, Any] = {"caa_lens_section": FORMAT_VERSION}
    content |= {key: getattr(section, key) for key in _PLAIN}
    content["found"] = list(section.found)
    content["figures"] = [json.loads(figure.to_json()) for figure in section.figures]
    content["tokens"] = [
        {"caption": one.caption, "bound": one.bound, "tokens": [list(token) for token in one.tokens]}
        for one in section.tokens
    ]
    content["texts"] = [[name, [list(text) for text in texts]] for name, texts in section.texts]
    content["cells"] = section.cells and section.cells.plain()
    content["tables"] = [
        {"caption": caption, **json.loads(table.to_json(orient="split", index=False, double_precision=15))}
        for caption, table in section.captioned_tables()
    ]
    text = json.dumps(content, ensure_ascii=False, indent=1)
    return write_atomically(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def load_section(path: str | Path) -> Section:
    """Read what `save_section` wrote.

    Raises:
        RunFolderError: it is another file, damaged, or of a newer version.
    """
    import pandas as pd
    import plotly.graph_objects as go

    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        version = content.pop("caa_lens_section")
        if version > FORMAT_VERSION:
            raise RunFolderError(f"{path} has version {version}, this library reads up to {FORMAT_VERSION}: update it")
        return Section(
            **{key: content[key] for key in _PLAIN},
            found=content["found"],
            figures=[go.Figure(figure) for figure in content["figures"]],
            tokens=[
                ColoredText(caption=one["caption"], tokens=[(t, v) for t, v in one["tokens"]], bound=one["bound"])
                for one in content["tokens"]
            ],
            texts=[(name, [(label, text) for label, text in texts]) for name, texts in content["texts"]],
            cells=Cells.of_plain(content["cells"]) if content.get("cells") else None,
            tables=[(one["caption"], pd.DataFrame(one["data"], columns=one["columns"])) for one in content["tables"]],
        )
    except RunFolderError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{path} is not a readable section ({error}): run its experiment again") from None


def read_run(folder: str | Path) -> Part:
    """A run folder's sections, in the run's own order, and its settings.

    What failed or was not finished is a skipped section with the reason, named as its folder is.

    Raises:
        RunFolderError: the folder holds no run, or nothing in it is finished.
    """
    folder = Path(folder)
    try:
        about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        settings = {
            **about["config"],
            **_own_settings(folder),
            **about["versions"],
            **about["about"],
            **_starts(folder),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        demo = f"; the demo's own report is {folder / 'report.html'}" if (folder / "report.html").exists() else ""
        raise RunFolderError(
            f"{folder} holds no run of experiments ({error}): expected a folder that `python -m experiments ... --out` "
            f"made{demo}"
        ) from None
    settings |= {key: called(settings[key]) for key in ("model", "base_model") if isinstance(settings.get(key), str)}
    order: list[str] = settings.pop("experiments", [])
    sections = {file.parent.name: load_section(file) for file in folder.glob("*/section.json")}
    if not sections:
        raise RunFolderError(f"nothing in {folder} is finished: start the same command again, then report")
    for name in {file.parent.name for file in folder.glob("*/error.txt")}:
        if name not in sections or sections[name].skipped:
            reason = f"failed: {_first_line(folder / name / 'error.txt')}"
            sections[name] = replace(sections.get(name, Section(title=name)), skipped=reason)
    for name in {file.parent.name for file in folder.glob("*/units")} - set(sections):
        sections[name] = Section(title=name, skipped="not finished: start the same command again")
    for name in set(order) - set(sections):
        sections[name] = Section(title=name, skipped="not begun, or not asked for")
    names = sorted(sections, key=lambda name: (order.index(name) if name in order else len(order), name))
    ordered = [sections[name] for name in names]
    return Part(title=f"{settings.get('model', folder.name)} ({folder.name})", sections=ordered, settings=settings)


def _own_settings(folder: Path) -> dict[str, Any]:
    """What single experiments were held to beside the run; hashes of data, whose names have a slash, are left out."""
    own: dict[str, Any] = {}
    for file in sorted(folder.glob("*/identity.json")):
        own |= json.loads(file.read_text(encoding="utf-8"))
    return {name: value for name, value in sorted(own.items()) if "/" not in name}


def _starts(folder: Path) -> dict[str, Any]:
    """The commands and devices of all starts, each once; nothing of a folder from before they were noted."""
    file = folder / "starts.json"
    starts = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    told = {
        name: list(dict.fromkeys(start[name] for start in starts if start.get(name))) for name in ("device", "command")
    }
    return {name: "; ".join(each) for name, each in told.items() if each}


def _first_line(file: Path) -> str:
    """Why an experiment failed; of a bare traceback, its last line."""
    lines = [line for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if not lines:
        return "no reason was written down"
    return lines[-1] if lines[0].startswith("Traceback ") else lines[0]


def write_run_report(folders: Sequence[str | Path], path: str | Path) -> Path:
    """One page of one or more runs.

    Raises:
        RunFolderError: a folder cannot be reported; nothing is written.
    """
    if not folders:
        raise RunFolderError("no run folders given: expected at least one")
    parts = [read_run(folder) for folder in folders]
    models = list(dict.fromkeys(str(part.settings.get("model", "a model")) for part in parts))
    found = sum(not section.skipped for part in parts for section in part.sections)
    if len(parts) == 1:
        parts = [replace(parts[0], title="")]
    return write_parts(
        path,
        title=f"Contrastive Activation Addition on {', '.join(models)}",
        lead=f"{found} experiments. Intervals are 95 % bootstrap intervals over questions unless said otherwise.",
        parts=parts,
    )
