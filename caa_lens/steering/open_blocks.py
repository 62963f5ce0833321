"""A steered block while it is open: its hooks on the model, one thread at a time, and compiled code uncompiled.

Code that `torch.compile` compiled drops hooks that were added later, and keeps those that it saw; so while any block is
open, everything that is compiled runs as it is written.
"""

import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from caa_lens.engine.edits import Edit
from caa_lens.models.adapters.choice import adapter_of
from caa_lens.prompts.batches import PromptBatch
from caa_lens.steering.steered_runs import SteeredRuns

_BLOCKS: "list[OpenBlock]" = []  # those open now, of all models and threads, oldest first
_LOCK = threading.Lock()
_STANCE: list[Any] = []  # how compiled code ran before the first of them


class OpenBlock:
    """A block while it is open: its hooks, and what they saw.

    The hooks are put in place and taken away one by one: TransformerLens' own context takes away those of whichever
    context is innermost, so blocks that do not end in order would take away each other's.
    """

    def __init__(self, model: Any, edits: Sequence[Edit], prompts: PromptBatch | None) -> None:
        self.model = getattr(model, "_orig_mod", model)  # of one that torch.compile wraps
        self.thread, self.task = threading.current_thread(), _current_task()
        self.runs: SteeredRuns | None = None
        self._hooks: list[tuple[Any, Any]] = []  # hook points, and what they hold of us
        self._left = False
        if not edits:
            return
        adapter = adapter_of(self.model)
        points = [adapter.hook_points(self.model, one.layer, one.site) for one in edits]
        self._register()
        self.runs = SteeredRuns(self.model, edits, prompts)
        for i, (one, its_points) in enumerate(zip(edits, points, strict=True)):
            hook = self._hook(one, i, self.runs)
            for point in its_points:
                point.add_hook(hook)
                self._hooks.append((point, point.fwd_hooks[-1]))

    def _hook(self, edit: Edit, index: int, runs: SteeredRuns) -> Any:
        _, steer_hook = edit.hook()

        def hook(activation: Tensor, hook: Any) -> Tensor | None:
            if self._left:  # of a copy of the model that was made inside the block
                return None
            steered = steer_hook(activation, hook=hook)
            if steered is not None:
                runs.acted(index)
            return steered

        return hook

    def _register(self) -> None:
        with _LOCK:
            for other in _BLOCKS:
                tasks = (self.task, other.task)
                if other.model is self.model and (
                    other.thread is not self.thread or (None not in tasks and other.task is not self.task)
                ):
                    who = f"thread {other.thread.name!r}" if other.thread is not self.thread else "another task"
                    raise RuntimeError(
                        f"{who} has a steered block open on this model: hooks are the model's, so both would be added "
                        "to everything. Let one block end before the other begins (a lock), give each a model of its "
                        "own, or use generate(..., vectors=[...]), one at a time"
                    )
            if not _BLOCKS:
                try:
                    _STANCE.append(torch.compiler.set_stance("force_eager"))
                except RuntimeError as error:
                    raise RuntimeError(
                        "steer cannot be opened inside a function that torch.compile compiles, which drops hooks: open "
                        "it around the call of that function"
                    ) from error
            _BLOCKS.append(self)

    def leave(self) -> bool:
        """Take the hooks away; whether a younger block of the same model is still open, and ran."""
        if self.runs is None:
            return False
        self._left = True
        for point, handle in self._hooks:
            handle.hook.remove()
            point.fwd_hooks = [one for one in point.fwd_hooks if one is not handle]
        self.runs.close()
        with _LOCK:
            younger = _BLOCKS[_BLOCKS.index(self) + 1 :]
            _BLOCKS.remove(self)
            if not _BLOCKS:
                _STANCE.pop().__exit__(None, None, None)
        return any(one.model is self.model and one.runs is not None and one.runs.ran for one in younger)


def _current_task() -> Any:
    if "asyncio" not in sys.modules:
        return None
    try:
        return sys.modules["asyncio"].current_task()
    except RuntimeError:  # no loop runs in this thread
        return None
