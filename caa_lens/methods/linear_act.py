"""Linear-AcT: an affine map by coordinate that carries one set of activations onto another.

Of each text one number a coordinate is read, the mean over its tokens. Along a coordinate, optimal transport pairs the
k-th smallest of the source with the k-th smallest of the target; the map is the line of least squares through them::

    omega = sum(a~ b~) / sum(a~ a~)      beta = mean(b) - omega mean(a)      T(h) = omega * h + beta
    h' = (1 - strength) h + strength T(h)

with a, b the sorted values of source and target, and a~, b~ less their means. Mean-AcT has omega = 1 (CAA's vector,
read as means over texts); the Gaussian variant omega = sd(b) / sd(a). With a support, a coordinate of a token moves
only where it lies strictly between the smallest and the largest source value.

On the residual stream what one layer adds stays for the next, so maps that were fitted at once pile up. Several layers
are therefore fitted one after another, the source run through the maps below, the target left as it is. At the paper's
own sites, what attention or an MLP writes ("hook_attn_out", "hook_mlp_out"), both sets run through the maps below.

Source: arXiv 2410.23054; its definition 3.1 prints sum(b~ b~) below the line, which is not the least-squares solution
that its authors' code has. Departures: `resid_post` by default; norms' outputs are not among the sites; the first
token, whose stream is like no other's, is neither read nor moved.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from caa_lens.arguments import as_float, check_count
from caa_lens.contrast.sets import ContrastSet
from caa_lens.engine.edits import Edit
from caa_lens.engine.kept_streams import Streams, read_streams, run_on
from caa_lens.engine.positions import Positions
from caa_lens.engine.streams import reading_sites
from caa_lens.methods.data import check_finite_streams, two_sets
from caa_lens.methods.fitted import Fitted
from caa_lens.models.checks import check_layers, check_model
from caa_lens.prompts.prompt_formats import PromptFormat
from caa_lens.provenance import HOOK_POINT
from caa_lens.steering.interventions import Intervention
from caa_lens.steering.placing import span_of

KINDS = ("linear", "mean", "gaussian")
SITES = (HOOK_POINT, "hook_attn_out", "hook_mlp_out")
SMALL = 1e-4  # a coordinate with a smaller standard deviation is left alone by the Gaussian variant


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class LinearAct(Fitted):
    """A map a layer: `scale` (omega), `shift` (beta), and the source's `low` and `high` by coordinate.

    Attributes:
        kind: "linear", "mean" or "gaussian".
        support: whether coordinates outside of the source's range are left alone, unless said otherwise in use.
        site: the hook point of each block at which it was fitted, and acts.
    """

    scale: Float[Tensor, "layer d_model"]
    shift: Float[Tensor, "layer d_model"]
    low: Float[Tensor, "layer d_model"]
    high: Float[Tensor, "layer d_model"]
    kind: str = "linear"
    support: bool = False
    site: str = HOOK_POINT

    def interventions(
        self, strength: float | int = 1.0, *, positions: str | Positions = "caa", support: bool | None = None
    ) -> tuple[Intervention, ...]:
        """The maps of all layers; `strength` is the paper's lambda, for 0 to 1. Original: every token but the first."""
        strength = as_float("strength", strength)
        where = self._place(
            positions,
            original="after_first",
            cannot={"all": "the first token's stream is like no other's: take 'after_first'"},
        )
        bounded = self.support if support is None else support
        return tuple(
            Intervention(
                operator="affine",
                parameters={
                    "scale": self.scale[row],
                    "shift": self.shift[row],
                    **({"low": self.low[row], "high": self.high[row]} if bounded else {}),
                },
                layer=layer,
                site=self.site,
                multiplier=strength,
                positions=where,
                provenance=self._fitted_at(layer, self.site),
            )
            for row, layer in enumerate(self.layers)
        )

    def at(self, layers: Sequence[int]) -> "LinearAct":
        """The lowest of its layers: a map was fitted behind the maps below it.

        Raises:
            ValueError: for layers that leave out a lower one.
        """
        chosen = super(LinearAct, self).at(layers)
        if chosen.layers != self.layers[: len(chosen.layers)]:
            raise ValueError(
                f"the map of layer {chosen.layers[-1]} was fitted behind those of layers "
                f"{list(self.layers[: self.layers.index(chosen.layers[-1])])}: take these too, or fit layer "
                f"{chosen.layers[-1]} alone"
            )
        return chosen

    def _in_words(self) -> str:
        site = "" if self.site == HOOK_POINT else f", {self.site}"
        return f"{self.kind}{', with support' if self.support else ''}{site}, "


def fit_map(
    source: Float[Tensor, "source d_model"], target: Float[Tensor, "target d_model"], kind: str = "linear"
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
    """omega and beta by coordinate, in float64; see the module.

    Raises:
        ValueError: for an unknown kind, or sets of unequal size, which have no k-th smallest to pair.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: expected one of {', '.join(KINDS)}")
    if len(source) != len(target):
        raise ValueError(
            f"the source has {len(source)} texts and the target {len(target)}: the k-th smallest of one is paired with "
            "the k-th smallest of the other, so give as many of both"
        )
    a, b = source.double().sort(0).values, target.double().sort(0).values
    mean_a, mean_b = a.mean(0), b.mean(0)
    a, b = a - mean_a, b - mean_b
    scale = torch.ones_like(mean_a)
    spread = (a * a).sum(0)
    if kind == "linear":
        told = spread > 0  # a coordinate that never differs in the source is shifted only
        scale = torch.where(told, (a * b).sum(0) / torch.where(told, spread, 1.0), 1.0)
    elif kind == "gaussian":
        sd_a, sd_b = (spread / len(a)).sqrt(), ((b * b).sum(0) / len(b)).sqrt()
        told = (sd_a > SMALL) & (sd_b > SMALL)
        scale = torch.where(told, sd_b / torch.where(told, sd_a, 1.0), 1.0)
    return scale, mean_b - scale * mean_a


def fit(
    model: Any,
    data: ContrastSet | tuple[Sequence[str], Sequence[str]],
    *,
    layers: Sequence[int],
    kind: str = "linear",
    support: bool = False,
    site: str = HOOK_POINT,
    positions: str | None = None,
    prompt_format: PromptFormat | str | None = None,
    system: str | None = None,
    batch_size: int = 8,
    progress: bool = True,
    seed: int = 0,
) -> LinearAct:
    """Fit maps at some layers, the lowest first, each behind those below it.

    Args:
        data: pairs, of which the negative answers are the source and the positive ones the target, read over the
            answers' tokens; or two lists of texts `(source, target)` of equal length, read over all tokens but the
            first.
        layers: 0-based blocks, which act together; the last one has no effect but on the logits themselves.
        kind: "linear", "mean" (the shift alone) or "gaussian".
        support: whether interventions leave coordinates outside of the source's range alone; means of texts have a
            narrower range than tokens, so this moves far fewer.
        site: what is read and mapped: the stream, or what a block's attention or MLP writes to it ("hook_attn_out",
            "hook_mlp_out").
        positions: where the maps below act while a layer is fitted; "caa" for pairs, "after_first" for texts.
        seed: of nothing, since nothing is drawn; every fit takes one.

    Raises:
        ValueError: for sets of unequal size, fewer than two texts, an unknown site or kind, or activations that are not
            finite.
    """
    check_model(model)
    layers = check_layers(model, layers)
    if site not in SITES:
        raise ValueError(f"unknown site {site!r}: expected one of {', '.join(SITES)}")
    batch_size = check_count("batch_size", batch_size)
    sets = two_sets(model, data, prompt_format=prompt_format, system=system)
    source, target = sets.negative, sets.positive
    if len(source) != len(target):
        fit_map(torch.empty(len(source), 1), torch.empty(len(target), 1), kind)  # which says what to do
    if len(source) < 2:
        raise ValueError(f"a map needs two texts of each kind at least, got {len(source)}: give more")
    where = positions or ("caa" if isinstance(data, ContrastSet) else "after_first")
    maps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    moved = (("source",), ("source", "target"))  # what runs through the maps below: of the stream, and inside of blocks
    inside = site != HOOK_POINT
    # Of a site inside of a block, the stream behind the block below is kept, and the block is run to read.
    streams = {
        side: list(read_streams(model, some, layers[0] - inside, batch_size=batch_size))
        for side, some in (("source", source), ("target", target))
    }
    with tqdm(total=len(layers), desc=f"fit {sets.name}", unit="layer", disable=not progress) as bar, torch.no_grad():
        for i, layer in enumerate(layers):
            if i:
                edits = [_edit_of(maps[-1], layers[i - 1], site)]
                streams = {
                    side: [
                        _on(model, one, layer - inside, edits if side in moved[inside] else (), where) for one in some
                    ]
                    for side, some in streams.items()
                }
            a, b = (_means(model, streams[side], layer, site) for side in ("source", "target"))
            check_finite_streams(model, a, b)
            scale, shift = fit_map(a, b, kind)
            maps.append((scale, shift, a.double().amin(0), a.double().amax(0)))
            bar.update()
    stacked = [torch.stack([one[k] for one in maps]).float().cpu() for k in range(4)]
    return LinearAct(
        scale=stacked[0],
        shift=stacked[1],
        low=stacked[2],
        high=stacked[3],
        kind=kind,
        support=support,
        site=site,
        layers=layers,
        provenance=sets.provenance(model, f"Linear-AcT, {kind}"),
        settings={
            "kind": kind,
            "support": str(support),
            "site": site,
            "positions": where,
            "causal": "two-sided" if inside else "one-sided",
            **sets.settings,
        },
    )


def _edit_of(fitted: tuple[Tensor, Tensor, Tensor, Tensor], layer: int, site: str) -> Edit:
    parameters = {"scale": fitted[0], "shift": fitted[1]}
    return Edit(layer=layer, positions=(0, None), operator="affine", parameters=parameters, site=site)


def _on(model: Any, streams: Streams, layer: int, edits: Sequence[Edit], where: str) -> Streams:
    """The streams behind a higher layer, with the maps of layers from their own on in place."""
    spans = [span_of(where, prompt) for prompt in streams.prompts]
    first = torch.tensor([span[0] for span in spans])
    stop = None if spans[0][1] is None else torch.tensor([span[1] for span in spans])
    placed = [replace(one, positions=(first, stop)) for one in edits]
    resid = run_on(model, streams.tokens, streams.resid, streams.layer, until=layer, edits=placed)
    return Streams(resid=resid, layer=layer, prompts=streams.prompts)


def _means(model: Any, streams: Sequence[Streams], layer: int, site: str) -> Float[Tensor, "text d_model"]:
    """Each text's mean of a site over the tokens that are read."""
    means = []
    for one in streams:
        values = one.resid if site == HOOK_POINT else _at_site(model, one, layer, site)
        for row, prompt in zip(values, one.prompts, strict=True):
            means.append(row[prompt.read[0] : prompt.read[1]].float().mean(0))
    return torch.stack(means).cpu()


def _at_site(model: Any, streams: Streams, layer: int, site: str) -> Float[Tensor, "batch pos d_model"]:
    """What the block above the streams has at a site."""
    found: dict[int, Tensor] = {}
    with reading_sites(model, [layer], site, found.__setitem__):
        run_on(model, streams.tokens, streams.resid, streams.layer, until=layer)
    return found[layer]
