"""Names that are imported on first use, so that `import caa_lens` itself takes no time.

A package lists its public names once, in its `__init__.pyi`, where type checkers and editors read them too.
"""

import difflib
from collections.abc import Callable
from typing import Any

import lazy_loader


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package, from the stub beside its file."""
    import_name, names_of, every = lazy_loader.attach_stub(package, file)

    def import_or_hint(name: str) -> Any:
        if name in every:
            return import_name(name)
        near = difflib.get_close_matches(name, every, n=1)
        raise AttributeError(f"module {package!r} has no attribute {name!r}" + (f": try {near[0]!r}" if near else ""))

    return import_or_hint, names_of, every
