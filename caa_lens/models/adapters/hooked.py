"""A `HookedTransformer` of TransformerLens 3, seen through the library's eyes."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from caa_lens.models.adapters import llama_blocks
from caa_lens.models.adapters.adapter import Adapter, BlockEdit, Coming, Entry, FinalNorm, Hear, Text, Unembedding
from caa_lens.models.adapters.plain_llama import alterations, is_transformer_lens, not_a_plain_llama
from caa_lens.models.adapters.torch_hooks import attached
from caa_lens.provenance import HOOK_POINT


class Hooked(Adapter):
    """The adapter of a `HookedTransformer`: its own forward, and `llama_blocks` where it is a plain Llama."""

    takes_trees = True

    def check(self, model: Any) -> None:
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError(
                "the model's weights are not loaded (they are on the device 'meta'): load it with "
                "caa_lens.load_model(...)"
            )
        if model.W_E.dtype != model.cfg.dtype:
            has, says = (str(dtype).removeprefix("torch.") for dtype in (model.W_E.dtype, model.cfg.dtype))
            raise ValueError(
                f"the model's weights are {has}, but its cfg.dtype says {says}: load it with dtype={has!r}, or convert "
                f"it with model.to(torch.{has}), which changes both"
            )

    def settle(self, model: Any) -> None:
        pass  # it needs nothing

    def quantised(self, model: Any) -> str | None:
        return None

    def dtype(self, model: Any) -> torch.dtype:
        return model.cfg.dtype

    def device(self, model: Any) -> torch.device:
        return model.W_E.device

    def device_behind(self, model: Any) -> torch.device:
        return next(model.unembed.parameters()).device

    def run(
        self,
        model: Any,
        tokens: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "batch all_pos"] | None = None,
        *,
        n_layers: int | None = None,
        cache: Any = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        # Without a mask TransformerLens would guess one from pad tokens, which may be real ones.
        mask = torch.ones_like(tokens) if mask is None else mask[:, -tokens.shape[1] :].long()
        options = {} if cache is None else {"past_kv_cache": cache}
        until = model.cfg.n_layers if n_layers is None else n_layers
        return model(tokens, attention_mask=mask, stop_at_layer=until, **options)

    def run_on(
        self,
        model: Any,
        tokens: Int[Tensor, "batch pos"],
        resid: Float[Tensor, "batch pos d_model"],
        layer: int,
        *,
        n_layers: int | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        until = model.cfg.n_layers if n_layers is None else n_layers
        mask = torch.ones(resid.shape[:2], dtype=torch.long, device=resid.device)
        return model(resid, start_at_layer=layer + 1, stop_at_layer=until, attention_mask=mask)

    def new_cache(self, model: Any, n_rows: int) -> Any:
        """TransformerLens' own, each block's on the device of the block."""
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        return TransformerLensKeyValueCache.init_cache(model.cfg, model.W_E.device, n_rows)

    def whole(self, model: Any, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        return model(tokens, attention_mask=torch.ones_like(tokens))

    def resid_post(self, model: Any, layer: int) -> nn.Module:
        # A block that somebody put into a module of their own has no such attribute: there it is the whole's output.
        block = model.blocks[layer]
        return getattr(block, "hook_resid_post", block)

    def written(self, model: Any, layer: int) -> Mapping[str, nn.Module]:
        block = model.blocks[layer]
        kinds = ("attn",) if model.cfg.attn_only else ("attn", "mlp")
        return {kind: getattr(block, f"hook_{kind}_out", block) for kind in kinds}

    def site(self, model: Any, layer: int, site: str) -> nn.Module:
        """Another module may stand in a hook point's place, as sparse autoencoders are attached; and where nobody
        called `model.setup()` afterwards, hooks would still be added to the point that was taken out, and change
        nothing.
        """
        name, found = f"blocks.{layer}.{site}", model.blocks[layer]
        for part in site.split("."):
            found = getattr(found, part, None)
        if found is None or found is not model.hook_dict.get(name):
            raise ValueError(_unreachable(name, found, layer))
        return found

    def site_width(self, model: Any, layer: int, site: str) -> int | None:
        cfg = model.cfg
        return {"attn.hook_z": cfg.n_heads * cfg.d_head, "mlp.hook_post": cfg.d_mlp}.get(site, cfg.d_model)

    def listening(self, point: nn.Module, hear: Hear) -> AbstractContextManager[None]:
        return attached([(point, lambda module, given, out: hear(out))])

    def hook_points(self, model: Any, layer: int, site: str = HOOK_POINT) -> Sequence[Any]:
        """The attention pattern, which tells how many tokens lie behind, and the site."""
        return [self.site(model, layer, place) for place in ("attn.hook_pattern", site)]

    def entering(self, model: Any, layer: int, given: tuple, keywords: Mapping[str, Any]) -> Entry:
        cache = keywords.get("past_kv_cache_entry")
        return Entry(
            resid=given[0] if given else keywords["resid_pre"],
            behind=0 if cache is None else cache.past_keys.shape[1],
            cache=cache,
            mask=keywords.get("attention_mask"),
        )

    def final_norms(self, model: Any) -> Sequence[FinalNorm | None]:
        if model.cfg.normalization_type is None:
            return [None]
        norm = model.ln_final
        kind = type(norm).__name__
        if kind not in ("RMSNorm", "RMSNormPre", "LayerNorm", "LayerNormPre"):
            raise ValueError(
                f"the final norm of {model.cfg.model_name!r} is a {kind}, expected RMSNorm or LayerNorm: the lens "
                "knows no formula for another one"
            )
        weight, bias = getattr(norm, "w", None), getattr(norm, "b", None)  # absent where they were folded into W_U
        return [FinalNorm(kind="LN" if "LayerNorm" in kind else "RMS", weight=weight, bias=bias, eps=norm.eps)]

    def unembedding(self, model: Any) -> Unembedding | None:
        W_U = getattr(model, "W_U", None)
        return None if W_U is None else (W_U, model.b_U)

    def parts_behind(self, model: Any) -> Sequence[nn.Module]:
        return [model.unembed] if model.cfg.normalization_type is None else [model.ln_final, model.unembed]

    def scales(self, model: Any) -> Sequence[float]:
        return [1.0]

    def modules(self, model: Any) -> Iterator[tuple[str, nn.Module]]:
        return model.named_modules()

    def values_of(self, module: nn.Module) -> Iterator[Any]:
        for key, value in vars(module).items():
            if isinstance(value, str | int | float | bool):
                yield key, value
            elif callable(value):
                yield key, _identity(value)

    def stored_parameters(self, model: Any) -> dict[str, nn.Parameter] | None:
        return None  # it has more than that: see `loading.weights`

    def written_anew(self, model: Any) -> Iterator[tuple[str, nn.Module, nn.Module]]:
        return iter(())  # nothing is left of what it was made of

    def alterations(self, name: str, module: nn.Module, *, inside: bool = False) -> Sequence[str]:
        if inside and not is_transformer_lens(type(module)):
            return [f"{name} is a {type(module).__name__}"]
        return alterations(name, module)

    def altered(self, model: Any) -> Sequence[str]:
        found: list[str] = []
        for name, module in self.modules(model):
            found.extend(self.alterations(name, module))
            cfg = getattr(module, "cfg", model.cfg)
            if cfg is not model.cfg and vars(cfg) != vars(model.cfg):
                found.append(f"{name} has a configuration of its own")
        return found

    def depends_on_length(self, model: Any) -> str | None:
        if model.cfg.use_dynamic_ntk_rope or model.cfg.use_logn_attn:
            return "its attention is scaled by the length of the whole text"
        return None

    def cannot_share(self, model: Any) -> str | None:
        return not_a_plain_llama(model)

    def prefill(self, model: Any, prefixes: Sequence[Sequence[int]], n_layers: int | None = None) -> Any:
        return llama_blocks.prefill(model, prefixes, n_layers)

    def run_suffixes(
        self,
        model: Any,
        prefix: Any,
        suffixes: Sequence[Sequence[Sequence[int]]],
        edit: BlockEdit,
        n_layers: int | None = None,
        coming: Coming | None = None,
        parents: Sequence[Sequence[int]] | None = None,
    ) -> Float[Tensor, "question row pos d_model"]:
        if coming is not None:
            coming(slice(None), slice(None))
        return llama_blocks.run_suffixes(model, prefix, suffixes, edit, n_layers, parents)

    def kept_text(self, model: Any, n_rows: int, visible: Bool[Tensor, "batch pos"] | None, room: int) -> Text | None:
        return llama_blocks.KeptText(model, n_rows, visible, room)


def _unreachable(name: str, found: Any, layer: int) -> str:
    if any(base.__name__ == "HookPoint" for base in type(found).__mro__):
        return (
            f"the model does not know its hook point {name}, so that hooks would change nothing at layer {layer}: "
            "call model.setup() after putting a module in a hook point's place or taking it away"
        )
    what = f"{name} is missing" if found is None else f"{type(found).__name__} stands in the place of {name}"
    return (
        f"{what}, so that nothing can be steered at layer {layer}: steer at another layer, or take the module away "
        "that was put there (of SAELens: model.reset_saes())"
    )


def _identity(value: Any) -> Any:
    """Equal only for the same object: an `id` may be that of another one, once the first is gone."""
    try:
        return weakref.ref(value)
    except TypeError:
        return id(value)
