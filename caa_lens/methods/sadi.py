"""SADI: make larger, in place, what tells right from wrong answers: a mask chooses it, and no direction is added.

    D = mean over pairs of (a+ - a-)          at the last token of question and answer
    M = 1 at the K elements of the largest D, 0 elsewhere
    h' = h + strength (h * M)                 the paper's delta; its code's factor is 1 + delta

Sites: "heads" (each head's output before the projection; an element is a whole head), "neurons" (the MLP's hidden
units), "hidden" (the MLP's output, as in the authors' code), which rank all layers jointly; and "stream", the residual
stream, where norms grow with depth and two coordinates are most of the norm, so there each layer is ranked by itself,
on differences in units of the coordinate's standard deviation.

Source: arXiv 2410.12299 and its authors' code. That ranks the largest *signed* differences, the paper's text takes
absolute ones: `rank` is either. Departures: scaling happens within the one run; their code scales the record of an
unsteered run and overwrites all heads with that. A neuron is read as its activation as there, before the product with
the other half of a gated MLP, and scaled behind it, which is the same since the product is linear in it.

It has no sign: what stands for the wrong side in this input is made larger as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import reduce, repeat
from jaxtyping import Float
from torch import Tensor

from caa_lens.arguments import as_float, check_count
from caa_lens.contrast.sets import ContrastSet, check_contrast_set
from caa_lens.engine.positions import Positions
from caa_lens.methods.data import check_finite_streams, two_sets
from caa_lens.methods.fitted import Fitted
from caa_lens.methods.neurons import read_neurons
from caa_lens.methods.reading import at_last, read_all, read_last_at_sites
from caa_lens.models.checks import check_layers, check_model
from caa_lens.prompts.prompt_formats import PromptFormat
from caa_lens.provenance import HOOK_POINT
from caa_lens.steering.interventions import Intervention

SITES = {"heads": "attn.hook_z", "neurons": "mlp.hook_post", "hidden": "hook_mlp_out", "stream": HOOK_POINT}
RANKS = ("signed", "absolute")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Sadi(Fitted):
    """A mask over a site's numbers, a row a layer; only layers with something in it are kept.

    Attributes:
        mask: 1 where it is scaled, 0 elsewhere; several heads as one width.
        site: "heads", "neurons", "hidden" or "stream".
        k: how many elements it has: over all layers, or for "stream" in each.
    """

    mask: Float[Tensor, "layer width"]
    site: str = "heads"
    k: int = 0

    def interventions(
        self, strength: float | int = 1.0, *, positions: str | Positions = "caa"
    ) -> tuple[Intervention, ...]:
        """The scaling at every layer; `strength` is delta. The original scales the prompt's last token only."""
        strength = as_float("strength", strength)
        where = self._place(positions, original="last")
        return tuple(
            Intervention(
                operator="scale",
                parameters={"factor": self.mask[row]},
                layer=layer,
                site=SITES[self.site],
                multiplier=strength,
                positions=where,
                provenance=self._fitted_at(layer, SITES[self.site]),
            )
            for row, layer in enumerate(self.layers)
        )

    def _in_words(self) -> str:
        return f"{self.k} {'coordinates a layer' if self.site == 'stream' else self.site}, "


def top_elements(
    scores: Float[Tensor, "layer element"], k: int, rank: str = "signed"
) -> Float[Tensor, "layer element"]:
    """1 at the K elements with the largest score (or absolute score) over all layers jointly, 0 elsewhere.

    Raises:
        ValueError: for an unknown rank, or more elements than there are.
    """
    if rank not in RANKS:
        raise ValueError(f"unknown rank {rank!r}: expected one of {', '.join(RANKS)}")
    if k > scores.numel():
        raise ValueError(f"k={k} elements are asked for, and there are {scores.numel()}")
    chosen = (scores if rank == "signed" else scores.abs()).flatten().topk(k).indices
    mask = torch.zeros(scores.numel())
    mask[chosen] = 1.0
    return mask.reshape(scores.shape)


def fit(
    model: Any,
    data: ContrastSet,
    *,
    k: int,
    site: str = "heads",
    rank: str = "signed",
    layers: Sequence[int] | None = None,
    prompt_format: PromptFormat | str | None = None,
    system: str | None = None,
    batch_size: int = 8,
    progress: bool = True,
    seed: int = 0,
) -> Sadi:
    """Choose what is scaled, from the last tokens of both answers of each pair.

    Args:
        k: how many heads, neurons or coordinates; for "stream" of each layer.
        layers: 0-based blocks to choose from; all by default.
        seed: of nothing, since nothing is drawn; every fit takes one.

    Raises:
        ValueError: for an unknown site or rank, or more elements than there are.
    """
    check_model(model)
    check_contrast_set(data)
    layers = check_layers(model, layers)
    k, batch_size = check_count("k", k), check_count("batch_size", batch_size)
    if site not in SITES:
        raise ValueError(f"unknown site {site!r}: expected one of {', '.join(SITES)}")
    sets = two_sets(model, data, prompt_format=prompt_format, system=system)
    n = len(sets.positive)
    prompts = [*sets.positive, *sets.negative]
    how: dict[str, Any] = {"batch_size": batch_size, "what": f"fit {sets.name}", "progress": progress}
    if site == "stream":
        values = read_all(model, at_last(prompts), layers, **how)
    elif site == "neurons":
        values = read_neurons(model, prompts, layers, **how)
    else:
        values = read_last_at_sites(model, prompts, layers, [SITES[site]], **how)[SITES[site]]
    check_finite_streams(model, values)
    if site == "heads" and values.shape[-1] != model.cfg.n_heads * model.cfg.d_head:
        raise ValueError(
            f"attention of {model.cfg.model_name!r} gives {values.shape[-1]} numbers, and not those of "
            f"{model.cfg.n_heads} heads of {model.cfg.d_head}, so which belong to a head is not known: take "
            "site='hidden' or 'neurons'"
        )
    difference = (values[:n].double() - values[n:].double()).mean(0)  # [layer width]
    if site == "stream":
        spread = values.double().std(0).clamp_min(1e-12)
        rows = [top_elements(row[None], k, rank)[0] for row in difference / spread]
        mask = torch.stack(rows)
    elif site == "heads":
        d_head = model.cfg.d_head
        of_head = reduce(difference, "layer (head d_head) -> layer head", "mean", d_head=d_head)
        mask = repeat(top_elements(of_head, k, rank), "layer head -> layer (head d_head)", d_head=d_head)
    else:
        mask = top_elements(difference, k, rank)
    kept = [i for i in range(len(layers)) if bool(mask[i].any())]
    return Sadi(
        mask=mask[kept],
        site=site,
        k=k,
        layers=tuple(layers[i] for i in kept),
        provenance=sets.provenance(model, f"SADI, {site}"),
        settings={"k": str(k), "site": site, "rank": rank, "searched_layers": str(list(layers)), **sets.settings},
    )
