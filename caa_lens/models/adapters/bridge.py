"""A `TransformerBridge` of TransformerLens 3.9 or 4, seen through the library's eyes.

A bridge wraps a module of Hugging Face and runs it. What it shares with a HookedTransformer are names; what is behind
them is not the same: `stop_at_layer=n_layers` gives logits, `past_kv_cache` is ignored without a word, the KV cache is
Hugging Face's, and a sliding window keeps fewer keys than there are tokens. So every run here is the module's own
forward that a hook ends behind the last block that is wanted, with a cache that is compared with what was run.

Rows of one prompt share its keys: the prompt is run once into the cache, and suffixes run as one row each, so that
masks and rotary angles of the module's own making have a batch of one and fit however many rows split off between its
blocks. There is no code by architecture, and whether it holds is for `engine.shared_prefix.unsupported` to find out.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from caa_lens.models.adapters import hf_cache
from caa_lens.models.adapters.adapter import Adapter, BlockEdit, Coming, Entry, FinalNorm, Hear, Text, Unembedding
from caa_lens.models.adapters.bridge_parts import (
    device_of,
    dropouts,
    is_hook_point,
    norms_of,
    reads_both_ways,
    width_into,
)
from caa_lens.models.adapters.kept_weights import is_offloaded, packed_as, unembedding_of, weight_of
from caa_lens.models.adapters.torch_hooks import attached, attached_before, stream_of
from caa_lens.models.adapters.watch import Watch, check_filled, length_of, stamp, watch_at
from caa_lens.provenance import HOOK_POINT

# What TransformerLens calls the parts that use a cache, and by what name it hands it to them: keys, or a state.
_CACHES = {"attn": "past_key_values", "linear_attn": "cache_params", "mixer": "cache_params"}


class _Stop(Exception):
    """Ends a run behind the last block that is wanted."""


class Bridge(Adapter):
    """The adapter of a `TransformerBridge`: Hugging Face's own forward and cache."""

    wiring = frozenset({"transformer_lens", "transformers", "accelerate", "torch", "peft", "bitsandbytes"})
    rows_copy_prefix = True

    def meet(self, model: Any) -> Watch:
        """What counts a bridge's runs, so that its hook points know how many tokens lie behind; made once a model."""
        module = model.original_model
        if (known := watch_at(module)) is not None:
            return known
        watch = Watch(takes_positions="position_ids" in inspect.signature(module.forward).parameters)
        module.register_forward_pre_hook(watch.enter, with_kwargs=True)
        module.register_forward_hook(watch.leave, with_kwargs=True)
        stamp(module, watch)
        for block in model.blocks:
            for place in (block.hook_out, *filter(is_hook_point, block.modules())):
                stamp(place, watch)
            for name, wanted in _CACHES.items():
                if isinstance(part := getattr(block, name, None), nn.Module):
                    part.register_forward_pre_hook(partial(watch.repair, wanted=wanted), with_kwargs=True)
        return watch

    def check(self, model: Any) -> None:
        module = getattr(model, "original_model", None)
        what = f"the bridge {model.cfg.model_name!r}"
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"{what} runs its model elsewhere, expected one whose modules are here: load it with "
                "caa_lens.load_model(...)"
            )
        config = getattr(module, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            raise TypeError(
                f"{what} is an encoder with a decoder, whose prompt and answer are two streams: take a decoder alone"
            )
        causal = getattr(model.adapter, "supports_causal_loss", True)
        if not causal or getattr(model.cfg, "attention_dir", "causal") != "causal" or reads_both_ways(config):
            raise TypeError(f"{what} is an encoder, whose tokens see those behind them: take a model that generates")
        if not isinstance(getattr(model, "blocks", None), nn.ModuleList) or not len(model.blocks):
            raise TypeError(
                f"{what} has no list of blocks, expected one stack of them: {type(module).__name__} is not supported"
            )
        self.meet(model)
        lost = next((name for name, one in module.named_parameters() if one.is_meta), None)
        if lost is not None and not is_offloaded(module):
            lost = lost.replace("_original_component.", "")  # a bridge's own, within the module's names
            raise ValueError(
                f"the model's weights are not loaded ({lost} is on the device 'meta'): load it with "
                "caa_lens.load_model(...)"
            )
        if module.training and (names := dropouts(config)):
            raise ValueError(
                f"the model is in training mode and has dropout ({', '.join(names)}), which changes every "
                "number: call model.eval()"
            )

    def quantised(self, model: Any) -> str | None:
        return packed_as(model.original_model)

    def dtype(self, model: Any) -> torch.dtype:
        weight = weight_of(model.embed)
        return weight.dtype if weight is not None and weight.is_floating_point() else model.original_model.dtype

    def device(self, model: Any) -> torch.device:
        return device_of(model.original_model, model.embed)

    def settle(self, model: Any) -> None:
        """Some parts of TransformerLens 3.9 fail without a cache. Found out once, on two tokens."""
        tokens = torch.zeros(1, 2, dtype=torch.long, device=self.device(model))
        try:
            self.run(model, tokens)
        except (AttributeError, TypeError, KeyError):
            self.meet(model).needs_cache = True
            self.run(model, tokens)

    def device_behind(self, model: Any) -> torch.device:
        return device_of(model.original_model, model.unembed)

    def run(
        self,
        model: Any,
        tokens: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "batch all_pos"] | None = None,
        *,
        n_layers: int | None = None,
        cache: Any = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        watch = self.meet(model)
        until = model.cfg.n_layers if n_layers is None else n_layers
        kept: list[Tensor] = []

        def stop(module: Any, given: Any, output: Any) -> None:
            kept.append(stream_of(output))
            raise _Stop

        def stop_before(module: Any, given: tuple, keywords: Mapping[str, Any]) -> None:
            stop(module, given, given[0] if given else keywords["hidden_states"])

        options = self._options(model) if cache is None else {"past_key_values": cache, "use_cache": True}
        if mask is not None:
            options["attention_mask"] = mask.long()
            if watch.takes_positions:
                position = (options["attention_mask"].cumsum(-1) - 1).clamp_min(0)
                options["position_ids"] = position[:, -tokens.shape[1] :]
        n_behind = 0 if cache is None else length_of(cache) or 0
        # Behind all other hooks of the block, which were there before.
        ending = attached([(model.blocks[until - 1], stop)]) if until else attached_before(model.blocks[0], stop_before)
        with ending, suppress(_Stop):
            model(tokens, **options)
        if cache is not None and until == model.cfg.n_layers:
            check_filled(cache, n_behind + tokens.shape[1])
        (resid,) = kept
        return resid

    def run_on(
        self,
        model: Any,
        tokens: Int[Tensor, "batch pos"],
        resid: Float[Tensor, "batch pos d_model"],
        layer: int,
        *,
        n_layers: int | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The blocks below run, too, and what they write is forgotten: a bridge starts at its first block only."""
        if layer + 1 >= (model.cfg.n_layers if n_layers is None else n_layers):
            return resid

        def put_in(module: Any, given: tuple, keywords: dict) -> tuple[tuple, dict]:
            return ((resid, *given[1:]), keywords) if given else (given, {**keywords, "hidden_states": resid})

        with attached_before(model.blocks[layer + 1], put_in):
            return self.run(model, tokens, n_layers=n_layers)

    def _options(self, model: Any) -> dict[str, Any]:
        """For a run that nobody goes on with, whose keys would be kept in vain."""
        return {} if self.meet(model).needs_cache else {"use_cache": False}

    def new_cache(self, model: Any, n_rows: int) -> Any:
        return hf_cache.new_cache(model.original_model.config)

    def whole(self, model: Any, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        return model(tokens, **self._options(model))

    def resid_post(self, model: Any, layer: int) -> nn.Module:
        return model.blocks[layer].hook_out

    def written(self, model: Any, layer: int) -> Mapping[str, nn.Module]:
        block = model.blocks[layer]
        points = {kind: getattr(block, f"hook_{kind}_out", None) for kind in ("attn", "mlp")}
        return {kind: point for kind, point in points.items() if isinstance(point, nn.Module)}

    def site(self, model: Any, layer: int, site: str) -> nn.Module:
        found = model.blocks[layer]
        for part in site.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.Module) and is_hook_point(found):
            if site.startswith("mlp.") and found in (model.blocks[layer].mlp.hook_in, model.blocks[layer].mlp.hook_out):
                raise ValueError(
                    f"the MLP of layer {layer} of {model.cfg.model_name!r} is made of experts, and its neurons are in "
                    "them: take another site, such as 'hook_mlp_out'"
                )
            return found
        raise ValueError(
            f"{model.cfg.model_name!r} has no hook point blocks.{layer}.{site}, so that nothing can be read or steered "
            "there: take another site, such as 'hook_resid_post'"
        )

    def site_width(self, model: Any, layer: int, site: str) -> int | None:
        """By the projection that reads the site, since the configuration names it differently in every family."""
        block = model.blocks[layer]
        if site == "attn.hook_z":
            return width_into(getattr(block.attn, "o", None))
        return width_into(getattr(block.mlp, "out", None)) if site == "mlp.hook_post" else model.cfg.d_model

    @contextmanager
    def listening(self, point: Any, hear: Hear) -> Iterator[None]:
        """By TransformerLens' own hook: some points run only if they have one, and some give several heads as such."""

        def hook(out: Tensor, hook: Any) -> Tensor | None:
            return hear(out)

        point.add_hook(hook)
        mine = point.fwd_hooks[-1]
        try:
            yield
        finally:
            mine.hook.remove()
            point.fwd_hooks = [one for one in point.fwd_hooks if one is not mine]

    def hook_points(self, model: Any, layer: int, site: str = HOOK_POINT) -> Sequence[Any]:
        """The site alone: how many tokens lie behind, the model's cache tells."""
        self.meet(model)
        if site != HOOK_POINT:
            return [self.site(model, layer, site)]
        point = model.blocks[layer].hook_out
        if not is_hook_point(point):
            raise ValueError(
                f"{type(point).__name__} stands in the place of blocks.{layer}.hook_out, so that nothing can be "
                f"steered at layer {layer}: steer at another layer, or take the module away that was put there"
            )
        return [point]

    def entering(self, model: Any, layer: int, given: tuple, keywords: Mapping[str, Any]) -> Entry:
        run, block = self.meet(model).run, model.blocks[layer]
        injected = getattr(block, "_start_residual", None) is not None
        return Entry(
            resid=given[0] if given else keywords["hidden_states"],
            behind=run.behind or 0,
            cache=run.cache,
            mask=run.mask,
            run=run.number,
            injected=injected and getattr(block, "_start_at_layer_idx", None) == layer,
            stops=getattr(block, "_stop_at_layer_idx", None) == layer,
        )

    def cache_of(self, model: Any, run: int) -> Any:
        return self.meet(model).cache_of(run)

    def final_norms(self, model: Any) -> Sequence[FinalNorm | None]:
        return norms_of(getattr(model, "ln_final", None), model.cfg.eps)

    def unembedding(self, model: Any) -> Unembedding | None:
        return unembedding_of(model)

    def parts_behind(self, model: Any) -> Sequence[nn.Module]:
        norm = getattr(model, "ln_final", None)
        return [model.unembed] if norm is None else [norm, model.unembed]

    def scales(self, model: Any) -> Sequence[float]:
        """1, and every number of the configuration, and one by it: some models multiply, some divide."""
        text = model.original_model.config.get_text_config(decoder=True)
        numbers = {float(value) for value in vars(text).values() if isinstance(value, float) and 0 < abs(value) < 1e6}
        return [1.0, *sorted(numbers | {1 / one for one in numbers})]

    def modules(self, model: Any) -> Iterator[tuple[str, nn.Module]]:
        seen: set[int] = set()
        inside = ((f"original_model.{name}", module) for name, module in model.original_model.named_modules())
        for name, module in (*model.named_modules(), *inside):
            if id(module) not in seen:
                seen.add(id(module))
                yield name, module

    def values_of(self, module: nn.Module) -> Iterator[Any]:
        # Its wrappers note all kinds of things about the latest run in attributes.
        yield module.training
        if "forward" in vars(module):
            yield id(vars(module)["forward"])

    def stored_parameters(self, model: Any) -> dict[str, nn.Parameter] | None:
        return dict(model.original_model.named_parameters())

    def written_anew(self, model: Any) -> Iterator[tuple[str, nn.Module, nn.Module]]:
        if getattr(model, "compatibility_mode", False):  # its weights were processed, those of what it wraps not all
            return
        for layer, block in enumerate(model.blocks):
            for name, part in block.submodules.items():
                inner = getattr(part, "original_component", None)
                if isinstance(part, nn.Module) and isinstance(inner, nn.Module):
                    yield f"blocks.{layer}.{name}", part, inner

    def alterations(self, name: str, module: nn.Module, *, inside: bool = False) -> Sequence[str]:
        return ()  # whatever is in a bridge is run with it

    def altered(self, model: Any) -> Sequence[str]:
        return ()

    def depends_on_length(self, model: Any) -> str | None:
        return hf_cache.depends_on_length(model.original_model.config)

    def cannot_share(self, model: Any) -> str | None:
        reason = self.depends_on_length(model)
        try:
            reason = reason or hf_cache.recurrent_layers(self.new_cache(model, 1))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = f"transformers makes no KV cache for it ({error})"
        return None if reason is None else f"{model.cfg.model_name} has no keys to share: {reason}"

    def prefill(self, model: Any, prefixes: Sequence[Sequence[int]], n_layers: int | None = None) -> Any:
        shared = []
        for prefix in prefixes:
            cache = self.new_cache(model, 1)
            if len(prefix):
                tokens = torch.tensor([list(prefix)], device=self.device(model))
                self.run(model, tokens, n_layers=n_layers, cache=cache)
            shared.append(hf_cache.shared_by_rows(cache))
        return shared

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
        assert parents is None, "masks are of the module's own making"
        n_pos = max(len(row) for rows in suffixes for row in rows)
        found = []
        with self._between_blocks(model, edit, n_layers) as kept:
            for question, (cache, rows) in enumerate(zip(prefix, suffixes, strict=True)):
                branches = []
                for branch, row in enumerate(rows):
                    if coming is not None:
                        coming(slice(question, question + 1), slice(branch, branch + 1))
                    tokens = torch.tensor([list(row)], device=self.device(model))
                    with suppress(_Stop):
                        model(tokens, past_key_values=cache, use_cache=True)
                    branches.append(F.pad(kept.pop(), (0, 0, 0, n_pos - len(row))))  # [group pos d_model]
                found.append(torch.stack(branches, dim=1).flatten(0, 1))
        return torch.stack(found)

    @contextmanager
    def _between_blocks(self, model: Any, edit: BlockEdit, n_layers: int | None) -> Iterator[list[Tensor]]:
        """`edit` between all blocks; the list holds what it gave behind the last one, `[row pos d_model]`."""
        last = (model.cfg.n_layers if n_layers is None else n_layers) - 1
        kept: list[Tensor] = []

        def at(layer: int) -> Any:
            def hook(module: Any, given: Any, resid: Tensor) -> Tensor:
                edited = edit(layer, resid[None])[0]
                if layer == last:
                    kept.append(edited)
                    raise _Stop
                return edited

            return hook

        with attached([(self.resid_post(model, layer), at(layer)) for layer in range(last + 1)]):
            yield kept

    def kept_text(self, model: Any, n_rows: int, visible: Bool[Tensor, "batch pos"] | None, room: int) -> Text | None:
        return None
