"""A context without a model: vectors by (behavior, which, how), and the sets of the run's settings."""

import torch

from caa_lens.provenance import Provenance
from caa_lens.vectors.steering_vectors import SteeringVectors
from experiments.running.behavior_sets import behavior_sets
from experiments.running.run_folder import RunFolder
from experiments.running.settings import RunConfig

CONFIG = RunConfig.of("demo", behaviors=("sentiment", "refusal"), layer_step=2, seed=3)
N_LAYERS, LAYER = 6, 3  # the chosen layer is none of the swept 0, 2, 4


class StandIn:
    """A context without a model: vectors by (behavior, which, how), and the sets of the run's settings."""

    def __init__(self, path, config=CONFIG, n_layers=N_LAYERS):
        self.config, self.n_layers = config, n_layers
        self.folder = RunFolder(path)
        self.model, self.base_model = "chat", "base"
        self.kept, self.changed = {("layer", ""): LAYER}, {}
        self.made = {}
        for i, (behavior, which, how) in enumerate(
            (b, which, how) for b in config.behaviors for which in ("", "base-") for how in ("raw", "normalised")
        ):
            directions = torch.randn(n_layers, 8, generator=torch.Generator().manual_seed(i))
            about = Provenance(model=f"{which}chat", behavior=behavior, expression=how)
            self.made[behavior, which, how] = SteeringVectors(
                directions=directions, layers=tuple(range(n_layers)), provenance=about
            )

    @property
    def swept_layers(self):
        return tuple(range(0, self.n_layers, self.config.layer_step))

    def sets(self, behavior):
        return self.changed.get(behavior) or behavior_sets(self.config, behavior)

    def raw_vectors(self, behavior, which=""):
        return self.made[behavior, which, "raw"]

    def vectors(self, behavior, which=""):
        return self.made[behavior, which, "normalised"]

    def once(self, slot, key, make):
        if (slot, key) not in self.kept:
            self.kept[slot, key] = make()
        return self.kept[slot, key]

    def described(self, condition):
        """[(behavior, which, how, the vector's own layer, where it is added, multiplier)] of a condition."""
        return [
            (*name, layer, step.vector.layer, float(step.multiplier))
            for step in condition
            for name, vectors in self.made.items()
            for layer in vectors.layers
            if torch.equal(vectors[layer].direction, step.vector.direction) and step.operator == "add"
        ]
