"""Stand-ins for packages that are imported by others as they start, and are too large for the wheels of `make gpu`.

`make gpu` puts this file as `sitecustomize.py` into its own folder, so it acts there and nowhere else, in every
process of that run. A stand-in has names to import and nothing behind them: whatever uses one raises, with the
package's name, and a test that does is skipped with that reason. Where the package itself is installed, nothing stands
in for it.
"""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

WHY = {
    "datasets": "TransformerLens imports it for its own evaluations",
    "plotly": "draws figures",
    "pygments": "colours what pytest prints",
}


def _placeholder(module: str, name: str) -> type:
    package = module.partition(".")[0]

    def refuse(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError(
            f"{module}.{name} is used, but {package} ({WHY[package]}) is left out here for its size", name=package
        )

    return type(name, (), {"__init__": refuse, "__module__": module, "__class_getitem__": classmethod(refuse)})


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = _placeholder(self.__name__, name)
        setattr(self, name, found)
        return found


class _Loader(importlib.abc.Loader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = _StandIn(spec.name, f"A stand-in: {WHY[spec.name.partition('.')[0]]}.")
        module.__path__ = []
        module.__version__ = "0"
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


class LeftOut(importlib.abc.MetaPathFinder):
    """The last that is asked for a module."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in WHY:
            return None
        return importlib.machinery.ModuleSpec(name, _Loader(), is_package=True)


def stand_in() -> None:
    """Let stand-ins be found where nothing else is."""
    if not any(isinstance(finder, LeftOut) for finder in sys.meta_path):
        sys.meta_path.append(LeftOut())


if __name__ == "sitecustomize":
    stand_in()
