"""What came of each test, kept as it came: a file with a line of JSON a test, which `CAA_LENS_OUTCOMES` names."""

import json
import os
from pathlib import Path

# Not in requirements-gpu.txt: a test that comes to need one says so, and is skipped.
LEFT_OUT = (
    *("datasets", "gguf", "plotly", "pooch", "pyarrow", "scipy"),
    *("sentencepiece", "sklearn", "typer", "vaderSentiment"),
)


def path() -> Path | None:
    name = os.environ.get("CAA_LENS_OUTCOMES")
    return Path(name) if name else None


def read(file: Path | None) -> dict[str, str]:
    """The latest outcome of each test; a line that was cut off is not one."""
    found: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file and file.exists() else ():
        try:
            test, outcome = json.loads(line)
        except ValueError:
            continue
        found[test] = outcome
    return found


def reason(error: BaseException | None) -> str | None:
    """Which left-out package an error is about."""
    while error is not None:
        if isinstance(error, ImportError):
            named = (error.name or "").partition(".")[0]
            # pandas tells of its optional packages in words.
            told = (name for name in LEFT_OUT if f"'{name}'" in str(error))
            missing = named if named in LEFT_OUT else next(told, None)
            if missing:
                return f"needs {missing}, which is left out here for its size"
        error = error.__cause__ or error.__context__
    return None
