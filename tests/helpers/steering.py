"""Steering by hand: plain hooks over a whole text, without any code of the package, to hold fast paths against."""

import torch

LOGITS = {"atol": 2e-5, "rtol": 1e-5}  # another order of float32 additions in a model of five layers


def some_tokens(n_rows=3, n_pos=11, seed=0):
    return torch.randint(0, 64, (n_rows, n_pos), generator=torch.Generator().manual_seed(seed))


def logits_of(model, tokens, hooks=(), **keywords):
    with torch.no_grad():
        return model.run_with_hooks(torch.as_tensor(tokens), fwd_hooks=list(hooks), **keywords)


def plain_hook(layer, direction, start, multiplier=1.0, operator="add"):
    """A TransformerLens hook that edits the positions of a whole text from a start on."""

    def edit(resid, hook):
        here = resid[:, start:].float()
        unit = direction / direction.norm()
        along = (here @ unit)[..., None]
        change = {
            "add": multiplier * direction.expand_as(here),
            "ablate": -multiplier * along * unit,
            "set": (multiplier * direction.norm() - along) * unit,
        }[operator]
        return torch.cat([resid[:, :start], resid[:, start:] + change.to(resid.dtype)], dim=1)

    return f"blocks.{layer}.hook_resid_post", edit


def adding(vector, start, multiplier=1.0):
    """A plain hook that adds a vector from a position on."""
    return plain_hook(vector.layer, vector.direction, start, multiplier)


def hook_counts(model):
    """How many hooks each hook point of a model has, of those that have any."""
    return {point.name: len(point.fwd_hooks) for point in model.hook_points() if point.fwd_hooks}
