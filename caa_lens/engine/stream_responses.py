"""What the last block's output does when the stream is pushed at one layer: exactly to first order, or finitely.

With F_l the map from `resid_post` of layer l to the last block's output, and s a step that is added at layer l at
every position from the steering start on::

    to first order    J_l s = d/de F_l(h + e s) at e = 0        the prompt's own unsteered state
    finite            F_l(h + s), or F_l of whatever an edit makes of h

A position's response sums over all pushed positions up to it. Many (layer, step) pairs are the rows of one staircase
behind the prompt, which is run once (`shared_prefix`, `staircase`); where that does not hold, each of them is one run
of the model's own forward.

The derivative is taken in forward mode: each row carries its tangent through the model's own modules, so that there is
no step to choose, and half precision rounds a tangent as it rounds everything else. Whether every operation of a model
hands its tangent on is not taken for granted: once a model, and again when its structure has changed, it is compared
with differences on a short prompt. Where an operation has no forward mode, it is a central difference, ::

    ( F_l(h + e s) - F_l(h - e s) ) / 2 e,      e |s| = eps^(1/3) |h_l|     (eps of the number format)

whose errors by rounding and by curvature are then about equal; this too is compared, with twice the step. In half
precision such a step would drown in rounding, so it is refused.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.autograd.forward_ad as forward_ad
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from caa_lens.engine import shared_prefix
from caa_lens.engine.edits import Edit
from caa_lens.engine.overflow import check_steps
from caa_lens.engine.staircase import EditedCondition, Staircases
from caa_lens.engine.streams import last_residual, reading
from caa_lens.models.placement import device_behind, device_of_tokens, dtype_name, dtype_of
from caa_lens.models.structure import once_a_structure, structure_of
from caa_lens.prompts.prompt_formats import Prompt

Edits = Sequence[EditedCondition] | Callable[[Prompt], Sequence[EditedCondition]]
PRECISE = (torch.float32, torch.float64)
TANGENT_COST = 3  # a row with its tangent, in rows
_FORWARD, _DIFFERENCE = "forward mode", "central difference"
_UNKNOWN = (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError)


class NoDerivativeError(ValueError):
    """A model's response cannot be had to first order, with the reason and what to read instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPrompt:
    """A prompt, and the half-open span of positions at which its response is read."""

    prompt: Prompt
    first: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Response:
    """What some of the steps do at one prompt's positions.

    Attributes:
        steps: which (layer, direction) pairs these are, counted row by row.
        prompt: index of the prompt.
        before: the last block's output without any step.
        after: with each step; or to first order, its change by the step.
    """

    steps: Int[Tensor, " step"]
    prompt: int
    before: Float[Tensor, "pos d_model"]
    after: Float[Tensor, "step pos d_model"]


def responses(
    model: Any,
    prompts: Sequence[ReadPrompt],
    steps: Float[Tensor, "layer direction d_model"],
    layers: Sequence[int],
    *,
    to_first_order: bool,
    edits: Edits | None = None,
    max_tokens: int | None = None,
    what: str = "read",
    progress: bool = True,
) -> Iterator[Response]:
    """The response of the last block's output to every step, prompt by prompt, some steps at a time.

    Args:
        steps: what is added at each of the layers, several directions one at a time.
        edits: what is done instead of adding them, finite only, in the steps' order: counted from the steering start;
            or a function that gives a prompt's, counted from its first token, and then each prompt is run in full.
        max_tokens: suffix tokens in flight at once; worked out from the free memory by default.

    Raises:
        NoDerivativeError: neither way to a derivative holds for this model.
        ValueError: for steps beyond the model's dtype.
    """
    if to_first_order:
        method = derivative_method(model)
    with _no_inference():
        rows = [row.detach().clone().float() for row in steps.flatten(0, 1)]
        of_layer = [layer for layer in layers for _ in range(steps.shape[1])]
        if edits is None:
            edits = [] if to_first_order else [(_edit(row, i),) for row, i in zip(rows, of_layer, strict=True)]
        if not callable(edits):
            check_steps(model, [edit for condition in edits for edit in condition])
    reason = "the edits change it, or act inside of a block" if callable(edits) else shared_prefix.unsupported(model)
    if reason is not None:
        shared_prefix.warn_unshared(reason)
    order = sorted(range(len(prompts)), key=lambda i: -prompts[i].stop)
    with tqdm(total=len(prompts), desc=what, unit="prompt", disable=not progress) as bar:
        while order:
            n = 1 if reason else _batch_size(model, [prompts[i] for i in order], len(rows), max_tokens)
            indices, order = order[:n], order[n:]
            run = _Run(model, [prompts[i] for i in indices], rows, of_layer, shared=reason is None, budget=max_tokens)
            if not to_first_order:
                found = run.finite(edits)
            elif method == _FORWARD:
                found = run.forward_mode()
            else:
                found = run.differences(_relative_step(model))
            for chunk, before, after in found:
                for row, i in enumerate(indices):
                    here = slice(prompts[i].first - run.starts[row], prompts[i].stop - run.starts[row])
                    yield Response(steps=chunk, prompt=i, before=before[row][here], after=after[row][:, here])
            bar.update(n)


def derivative_method(model: Any) -> str:
    """How a response to first order is computed: "forward mode" or "central difference".

    Raises:
        NoDerivativeError: neither holds.
    """
    structure = structure_of(model)
    kinds = [id(type(module)) for module in model.modules()]
    method, why = once_a_structure(_checked, model, (structure.signature, *kinds), _find_method)
    if method is None:
        raise NoDerivativeError(
            f"{model.cfg.model_name} gives no derivative of its last block's output ({why}): read it with "
            "reading='effect', which needs none, or with reading='in_context'"
        )
    return method


_checked: WeakKeyDictionary[Any, tuple[tuple, tuple[str | None, str]]] = WeakKeyDictionary()


def _find_method(model: Any) -> tuple[str | None, str]:
    """Which way holds on a short random prompt, at the first, the middle and the last layer but one; and why."""
    cfg, precise = model.cfg, dtype_of(model) in PRECISE
    generator = torch.Generator().manual_seed(0)
    n = min(7, cfg.n_ctx)
    prompt = Prompt.from_tokens(torch.randint(cfg.d_vocab, (n,), generator=generator).tolist(), start=max(0, n - 3))
    layers = sorted({0, cfg.n_layers // 2, max(0, cfg.n_layers - 2)})
    spans = [ReadPrompt(prompt=prompt, first=prompt.steer_start, stop=n)]
    units = torch.randn(len(layers), cfg.d_model, generator=generator)
    with _no_inference(), warnings.catch_warnings():
        warnings.simplefilter("ignore", shared_prefix.SharedPrefixWarning)
        shared = shared_prefix.unsupported(model) is None
        run = _Run(model, spans, list(units.to(device_of_tokens(model))), layers, shared=shared, budget=None)
        step = _relative_step(model) if precise else 2**-4
        told = _only(run.differences(step))
        twice = _only(run.differences(2 * step))
        try:
            tangent = _only(run.forward_mode())
        except _UNKNOWN as error:
            tangent, why = None, str(error).partition("\n")[0] or type(error).__name__
    if tangent is not None:
        # Half precision differs by several in a hundred; an operation that drops a tangent, by far more.
        if _apart(tangent, told) <= (0.02 if precise else 0.35):
            return _FORWARD, ""
        why = f"its tangents miss the differences by {_apart(tangent, told):.2g} of their size"
    if not precise:
        return None, f"{why}, and in {dtype_name(model)} a difference would drown in rounding"
    if _apart(told, twice) <= 0.05:
        return _DIFFERENCE, why
    return None, f"{why}, and differences with two steps are {_apart(told, twice):.2g} apart: it rounds its activations"


def _only(found: Iterator[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The one prompt's responses, `[step pos d_model]`, in the order of the steps."""
    chunks, afters = zip(*[(chunk, after[0]) for chunk, _, after in found], strict=True)
    return torch.cat(afters)[torch.cat(chunks).argsort().cpu()]


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest relative difference of any step's response."""
    gap, size = (one - other).flatten(1).norm(dim=1), other.flatten(1).norm(dim=1)
    return float((gap / size.clamp_min(1e-30)).nan_to_num(nan=torch.inf).max())


def _relative_step(model: Any) -> float:
    """|e s| / |h|: the cube root of the number format's eps, where rounding and curvature do equal harm."""
    return float(torch.finfo(dtype_of(model)).eps) ** (1 / 3)


@contextmanager
def _no_inference() -> Iterator[None]:
    """Tangents are unknown to inference mode, and no gradient is wanted."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def tangents() -> Iterator[None]:
    """A level of forward mode. Attention runs as matrix products and a softmax: fused kernels have no tangents."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with warnings.catch_warnings():
        # Torch makes rules of its own when forward mode is first used, and warns of how it makes them.
        warnings.simplefilter("ignore", FutureWarning)
        import torch._decomp.decompositions_for_jvp  # noqa: F401
    with _no_inference(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        yield


def _edit(row: Tensor, layer: int, multiplier: float = 1.0) -> Edit:
    return Edit(direction=row, layer=layer, positions=(0, None), multiplier=multiplier)


class _Run:
    """A batch of prompts under all steps; each way of running yields `(steps, before, after)` by chunks of steps."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[ReadPrompt],
        rows: Sequence[Float[Tensor, " d_model"]],
        layers: Sequence[int],
        *,
        shared: bool,
        budget: int | None,
    ) -> None:
        self.model, self.prompts, self.rows, self.layers, self.shared = model, prompts, rows, layers, shared
        self.starts = [one.prompt.steer_start for one in prompts]
        self.suffixes = [[one.prompt.tokens[start : one.stop]] for one, start in zip(prompts, self.starts, strict=True)]
        n_pos = max(len(rows[0]) for rows in self.suffixes)
        self.at_once = max(1, _budget(model, prompts, budget) // (n_pos * len(prompts)))
        with _no_inference():
            self.prefix = None
            if shared:
                prefixes = [one.prompt.tokens[:start] for one, start in zip(prompts, self.starts, strict=True)]
                self.prefix = shared_prefix.prefill(model, prefixes)

    def finite(self, edits: Edits) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        before, in_place = self._resid([()])[:, 0], callable(edits)
        conditions = edits(self.prompts[0].prompt) if callable(edits) else edits
        for chunk in self._chunks():
            yield torch.tensor(chunk), before, self._resid([conditions[i] for i in chunk], in_place=in_place)

    def forward_mode(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for chunk in self._chunks():
            with tangents():
                # Nothing is added; only the tangent is.
                edits: list[EditedCondition] = [
                    (_edit(forward_ad.make_dual(torch.zeros_like(self.rows[i]), self.rows[i]), self.layers[i]),)
                    for i in chunk
                ]
                primal, tangent = forward_ad.unpack_dual(self._resid(edits))
                if tangent is None:
                    raise RuntimeError("an operation of the model drops tangents")
                found = primal[:, 0].clone(), tangent.clone()
            yield torch.tensor(chunk), *found

    def differences(self, relative: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        before, sizes = self._resid([()])[:, 0], self._stream_sizes()
        for chunk in self._chunks():
            steps = [relative * sizes[self.layers[i]] / float(self.rows[i].norm()) for i in chunk]
            edits: list[EditedCondition] = [
                (_edit(self.rows[i], self.layers[i], sign * step),)
                for i, step in zip(chunk, steps, strict=True)
                for sign in (1, -1)
            ]
            both = self._resid(edits).unflatten(1, (-1, 2))
            width = 2 * torch.tensor(steps, device=both.device, dtype=both.dtype)[:, None, None]
            yield torch.tensor(chunk), before, (both[:, :, 0] - both[:, :, 1]) / width

    def _chunks(self) -> list[list[int]]:
        """Steps at a time; those of neighbouring layers share the most rows."""
        order = sorted(range(len(self.rows)), key=lambda i: self.layers[i])
        return [order[first : first + self.at_once] for first in range(0, len(order), self.at_once)]

    def _resid(
        self, edits: Sequence[EditedCondition], *, in_place: bool = False
    ) -> Float[Tensor, "prompt condition pos d_model"]:
        """The last block's output from the steering start on, where the unembedding lies, in float32 at least.

        Args:
            in_place: whether the edits' positions are those of the text, not counted from the steering start.
        """
        model, behind = self.model, device_behind(self.model)
        with _no_inference():
            if self.shared:
                ((_, stairs),) = Staircases(edits, device_of_tokens(model)).at_most(len(edits))
                resid = shared_prefix.run_suffixes(model, self.prefix, self.suffixes, stairs)
                return _wide(resid.to(behind)[:, stairs.condition_groups().to(behind)])
            found = []
            for one, start in zip(self.prompts, self.starts, strict=True):
                tokens = torch.tensor([one.prompt.tokens[: one.stop]], device=device_of_tokens(model))
                moved = [
                    condition if in_place else [replace(edit, positions=(start, None)) for edit in condition]
                    for condition in edits
                ]
                found.append(torch.stack([last_residual(model, tokens, edits=some)[0, start:] for some in moved]))
            return _wide(torch.stack(found).to(behind))  # one prompt at a time

    def _stream_sizes(self) -> list[float]:
        """||resid_post|| of each layer, mean over the first prompt's positions from the steering start on."""
        one, start, sizes = self.prompts[0], self.starts[0], []
        tokens = torch.tensor([one.prompt.tokens[: one.stop]], device=device_of_tokens(self.model))

        def keep(layer: int, resid: Tensor) -> None:
            sizes.append(resid[0, start:].float().norm(dim=-1).mean())

        with _no_inference(), reading(self.model, range(self.model.cfg.n_layers), keep):
            last_residual(self.model, tokens)
        return [float(size) for size in sizes]


def _wide(resid: Tensor) -> Tensor:
    return resid if resid.dtype == torch.float64 else resid.float()


def _budget(model: Any, prompts: Sequence[ReadPrompt], max_tokens: int | None) -> int:
    longest = max(one.stop for one in prompts)
    suffix = max(one.stop - one.prompt.steer_start for one in prompts)
    return max_tokens or max(suffix, shared_prefix.token_budget(model, longest, suffix) // TANGENT_COST)


def _batch_size(model: Any, prompts: Sequence[ReadPrompt], n_steps: int, max_tokens: int | None) -> int:
    """How many of the leading prompts go in one batch with all their steps; at least one."""
    most = min(len(prompts), shared_prefix.prefix_budget(model, prompts[0].stop))
    budget, longest = _budget(model, prompts, max_tokens), 0
    for n, one in enumerate(prompts[:most], start=1):
        longest = max(longest, one.stop - one.prompt.steer_start)
        if n * longest * n_steps > budget:
            return max(1, n - 1)
    return most
