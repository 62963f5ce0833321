"""What experiments are given: the model, the data and the vectors, each loaded when it is first asked for."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from experiments.running.behavior_sets import Sets, behavior_sets
from experiments.running.run_folder import OtherRunError, RunFolder
from experiments.running.settings import RunConfig

if TYPE_CHECKING:
    from caa_lens.vectors.steering_vectors import SteeringVectors


@dataclass(slots=True)
class Loaded:
    """The one model in memory, by its name, and how long loading has taken so far: of such models, and of copies."""

    name: str | None = None
    model: Any = None
    seconds: float = 0.0
    copying: float = 0.0


class Context:
    """One process' view of a run. One model is in memory at a time."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, *, device: str | None = None, loaded: Loaded | None = None
    ) -> None:
        """Contexts that are given the same `loaded` share the model in memory; device "auto" is all cards together."""
        self.config = config
        self.folder = folder
        self.device = device
        self.loaded = loaded if loaded is not None else Loaded()
        self._kept: dict[str, tuple[str, Any]] = {}

    # ---- data --------------------------------------------------------------------------------------------------

    def sets(self, behavior: str) -> Sets:
        return behavior_sets(self.config, behavior)

    # ---- models ------------------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        return self._model(self.config.model)

    @property
    def base_model(self) -> Any:
        assert self.config.base_model is not None
        return self._model(self.config.base_model)

    def load(self, name: str, *, dtype: str | None = None) -> Any:
        """A fresh copy of a model, for code that changes weights; call `release` first to have room for it.

        Args:
            dtype: the run's by default.

        Raises:
            OtherRunError: the files of the run's model are not those any more that the run began with.
        """
        began = time.perf_counter()
        try:
            return self._read(name, dtype)
        finally:
            self.loaded.copying += time.perf_counter() - began

    def _read(self, name: str, dtype: str | None = None) -> Any:
        from caa_lens.models.loading.load import load_model

        if name == self.config.model:
            self._check_contents()
        place = {"device_map": "auto"} if self.device == "auto" else {"device": self.device}
        return load_model(name, dtype=dtype or self.config.dtype, **place)

    def _check_contents(self) -> None:
        from caa_lens.models.loading.fingerprint import model_fingerprint

        begun = (self.folder.path / "run.json").exists()  # else nothing is claimed, as in a plan
        held = self.folder.about().get("model", {}).get("sha256") if begun else None
        if held is not None and held != (now := model_fingerprint(self.config.model)):
            raise OtherRunError(
                f"the files of {self.config.model} have changed since the run began: their SHA-256 is {now}, expected "
                f"{held}: put them back, or begin another run with --out"
            )

    def release(self) -> None:
        """Let go of the model in memory."""
        self.loaded.name = self.loaded.model = None
        self._kept.clear()
        import gc

        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _model(self, name: str) -> Any:
        if self.loaded.name != name:
            if self.loaded.name is not None:
                self.release()
            began = time.perf_counter()
            self.loaded.model = self._read(name)
            self.loaded.name = name
            self.loaded.seconds += time.perf_counter() - began
        return self.loaded.model

    # ---- vectors -----------------------------------------------------------------------------------------------

    def raw_vectors(self, behavior: str, which: str = "") -> "SteeringVectors":
        """As extracted, at every layer; `which` is "" for the model's, "base-" for the base model's.

        Raises:
            OtherRunError: the file is not the one that its unit of work has left.
        """
        from caa_lens.vectors.steering_vectors import SteeringVectors

        self.folder.check_vectors(behavior, which)
        return SteeringVectors.load(self.folder.vectors_file(behavior, which))

    def vectors(self, behavior: str, which: str = "") -> "SteeringVectors":
        """Normalised across the run's behaviors, as in all the paper's evaluations."""
        from caa_lens.vectors.algebra.combinations import normalize_across_behaviors

        return self.once(
            f"{which}vectors",
            "",
            lambda: normalize_across_behaviors({b: self.raw_vectors(b, which) for b in self.config.behaviors}),
        )[behavior]

    @cached_property
    def n_layers(self) -> int:
        """Of the model, read off the vectors."""
        return len(self.raw_vectors(self.config.behaviors[0]))

    @property
    def swept_layers(self) -> tuple[int, ...]:
        """The layers of sweeps."""
        return tuple(range(0, self.n_layers, self.config.layer_step))

    def once(self, slot: str, key: str, make: Callable[[], Any]) -> Any:
        """`make()`, remembered in this process until the slot is asked for another key."""
        if self._kept.get(slot, ("\0",))[0] != key:
            self._kept[slot] = (key, make())
        return self._kept[slot][1]
