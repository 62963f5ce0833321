"""Names that are imported on first use, so that `import caa_lens` itself takes no time.

A package lists its public names once, in its `__init__.pyi`, where type checkers and editors read them too.
"""

import difflib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lazy_loader


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package, from the stub beside its file."""
    import_name, names_of, every = lazy_loader.attach_stub(package, file)

    def import_or_hint(name: str) -> Any:
        if name in every:
            return import_name(name)
        hint = "" if name.startswith("_") else _hint(name, package, every)
        raise AttributeError(f"module {package!r} has no attribute {name!r}{hint}")

    return import_or_hint, names_of, every


def _hint(name: str, package: str, here: list[str]) -> str:
    """Where a name is that was looked for in another room; else the nearest one, of this room before the others."""
    root = package.partition(".")[0]
    elsewhere: dict[str, str] = {}
    for stub in sorted(Path(__file__).parent.glob("*/__init__.pyi")):
        for other in re.findall(r" as (\w+)$", stub.read_text(encoding="utf-8"), re.MULTILINE):
            elsewhere[other] = f"{root}.{stub.parent.name}.{other}"
    if name in elsewhere:
        return f": it is {elsewhere[name]}"
    if alike := difflib.get_close_matches(name, here, n=1, cutoff=0.75) or _with_word(name, here):
        return f": try {alike[0]!r}"
    alike = difflib.get_close_matches(name, elsewhere, n=1) or _with_word(name, elsewhere)
    return f": try {elsewhere[alike[0]]}" if alike else ""


def _with_word(word: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if word in name.split("_")]
