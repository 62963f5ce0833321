"""Steering by hand: plain hooks over a whole text, without any code of the package, to hold fast paths against."""

import re

import torch

from helpers.device import device

LOGITS = {"atol": 2e-5, "rtol": 1e-5}  # another order of float32 additions in a model of five layers


def some_tokens(n_rows=3, n_pos=11, seed=0):
    return torch.randint(0, 64, (n_rows, n_pos), generator=torch.Generator().manual_seed(seed))


def logits_of(model, tokens, hooks=(), **keywords):
    there = {name: one.to(device()) if isinstance(one, torch.Tensor) else one for name, one in keywords.items()}
    with torch.no_grad():
        return model.run_with_hooks(torch.as_tensor(tokens).to(device()), fwd_hooks=list(hooks), **there)


class Kept:
    """A text that is fed in pieces through the key-value cache of the model's own kind."""

    def __init__(self, model, n_rows=1):
        self.model, self.seen = model, None
        if type(model).__name__ == "TransformerBridge":
            from transformers import DynamicCache

            self.cache = DynamicCache(config=model.original_model.config)
        else:
            from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

            self.cache = TransformerLensKeyValueCache.init_cache(model.cfg, model.W_E.device, n_rows)

    def __call__(self, tokens, hooks=(), mask=None):
        """Logits of the next piece; `mask` is of this piece alone."""
        mask = torch.ones_like(tokens) if mask is None else mask.long()
        return logits_of(self.model, tokens, hooks, **self.options(mask))

    def options(self, mask):
        """What `model.forward` takes for the next piece."""
        self.seen = mask if self.seen is None else torch.cat([self.seen, mask], dim=1)
        if type(self.model).__name__ != "TransformerBridge":
            return {"past_kv_cache": self.cache, "attention_mask": mask}
        places = (self.seen.cumsum(1) - 1).clamp_min(0)[:, -mask.shape[1] :]
        return {"past_key_values": self.cache, "use_cache": True, "attention_mask": self.seen, "position_ids": places}


def streams(model, tokens, mask=None, text=None):
    """`resid_post` of every block, `[layer batch pos d_model]`, by torch's own hooks on the blocks.

    `text` is what was `Kept` of the tokens before; without, the tokens are whole texts.
    """
    kept, tokens = [], torch.as_tensor(tokens)

    def keep(block, given, out):
        kept.append(out[0] if isinstance(out, tuple) else out)

    handles = [block.register_forward_hook(keep) for block in model.blocks]
    try:
        if text is None:
            logits_of(model, tokens, attention_mask=torch.ones_like(tokens) if mask is None else mask)
        else:
            text(tokens, mask=mask)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(kept)


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


# Hook points of a bridge's block, by what a HookedTransformer calls them.
NAMES = {
    "hook_in": "hook_resid_pre",
    "ln2.hook_in": "hook_resid_mid",
    "hook_out": "hook_resid_post",
    "mlp.hook_out": "hook_mlp_out",
}


def hook_counts(model):
    """How many hooks each hook point of a model has, of those that have any, by names that are those of both kinds."""
    counts = {}
    for point in model.hook_points():
        block, place = re.fullmatch(r"(blocks\.\d+\.)?(.*)", point.name).groups()
        if point.fwd_hooks:
            counts[f"{block}{NAMES.get(place, place)}" if block else place] = len(point.fwd_hooks)
    return counts
