"""Read and keep the activations of every contrast pair: what extraction averages, pair by pair.

`resid_post` at the answer letter, or averaged over the completion's tokens, of both sides. It can be saved, so that the
analyses of `pair_geometry`, and comparisons of two models, need no model in memory.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from caa_lens.arguments import check_count, check_list, describe
from caa_lens.atomic_files import write_atomically
from caa_lens.contrast.sets import ContrastSet, check_contrast_set
from caa_lens.engine.activations import read_norms, read_pairs
from caa_lens.models.checks import check_layers, check_model
from caa_lens.models.placement import dtype_name, dtype_of
from caa_lens.prompts.pair_prompts import encode_pairs
from caa_lens.prompts.prompt_formats import Prompt, PromptFormat, resolve_format
from caa_lens.provenance import Provenance, layer_ranges


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairActivations:
    """`resid_post` of both sides of every pair. Indexed by block id: `activations[13]` is `[pair side d_model]`.

    Attributes:
        values: in float32 on the CPU, pairs in the order of the set, side 0 positive.
        norms: mean over the read tokens of ||resid_post||; for completions more than ||values||, which is of a mean.
        layers: the 0-based blocks, ascending.
        letters: each pair's positive and negative answer letter, `("A", "B")`; empty strings for completions.
        provenance: model, data and read positions.
    """

    values: Float[Tensor, "pair side layer d_model"]
    norms: Float[Tensor, "pair side layer"]
    layers: tuple[int, ...]
    letters: tuple[tuple[str, str], ...]
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        expected = (len(self.letters), 2, len(self.layers))
        if tuple(self.values.shape[:-1]) != expected or tuple(self.norms.shape) != expected:
            got = f"activations of shape {tuple(self.values.shape)} with norms of shape {tuple(self.norms.shape)}"
            raise ValueError(f"{got}, expected {expected} (pair, side, layer), and d_model last for activations")
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must be distinct and in order, got {self.layers}")

    def __getitem__(self, layer: int) -> Float[Tensor, "pair side d_model"]:
        if layer not in self.layers:
            raise IndexError(f"no activations of layer {layer}: read were layers {list(self.layers)} (0-based blocks)")
        return self.values[:, :, self.layers.index(layer)]

    def __len__(self) -> int:
        return len(self.letters)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, atomically; layers, letters and provenance stand in its metadata."""
        from safetensors.torch import save

        about = {"layers": self.layers, "letters": self.letters, "provenance": asdict(self.provenance)}
        tensors = {"values": self.values.contiguous(), "norms": self.norms.contiguous()}
        data = save(tensors, {"pair_activations": json.dumps(about)})
        return write_atomically(Path(path), lambda temporary: temporary.write_bytes(data))

    @classmethod
    def load(cls, path: str | Path) -> "PairActivations":
        """Read a file that `save` wrote.

        Raises:
            ValueError: if it is another kind of file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                about = json.loads((file.metadata() or {})["pair_activations"])
                values, norms = file.get_tensor("values").clone(), file.get_tensor("norms").clone()
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} was not written by PairActivations.save, or is damaged ({error})") from None
        return cls(
            values=values,
            norms=norms,
            layers=tuple(about["layers"]),
            letters=tuple((positive, negative) for positive, negative in about["letters"]),
            provenance=Provenance(**about["provenance"]),
        )

    def __repr__(self) -> str:
        p, where = self.provenance, f"layers={layer_ranges(self.layers)}, d_model={self.values.shape[-1]}"
        return f"PairActivations({p.behavior}, {len(self)} pairs, {where}, model={p.model!r}, {p.token_position})"


def check_pair_activations(activations: object) -> None:
    """Raises `TypeError` for anything but `PairActivations`."""
    if not isinstance(activations, PairActivations):
        raise TypeError(
            f"expected PairActivations, as pair_activations(model, pairs) reads, got {describe(activations)}"
        )


def layers_among(activations: PairActivations, layers: Sequence[int] | None) -> list[int]:
    """The layers asked for, ascending, each once; all that were read where none are named.

    Raises:
        ValueError: for an empty list.
        IndexError: for a layer that was not read.
    """
    if layers is None:
        return list(activations.layers)
    chosen = sorted(set(check_list("layers", layers, int)))
    if not chosen:
        raise ValueError("no layers given: expected at least one")
    for layer in chosen:
        activations[layer]  # refuses one that was not read
    return chosen


def pair_activations(
    model: Any,
    pairs: ContrastSet,
    *,
    layers: Sequence[int] | None = None,
    prompt_format: PromptFormat | str | None = None,
    system: str | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> PairActivations:
    """Both sides' activations of every pair, at the positions that `extract` reads.

    Memory: pairs x layers x d_model x 8 bytes on the CPU. Warns of uneven letters, which every analysis would show.

    Raises:
        ValueError: for a layer out of range, a pair longer than the context, or activations that are not finite.
    """
    check_model(model)
    check_contrast_set(pairs)
    batch_size = check_count("batch_size", batch_size)
    pairs.warn_if_unbalanced(stacklevel=3)
    layers = check_layers(model, layers)
    prompt_format = resolve_format(model, prompt_format)
    prompts = encode_pairs(model, pairs, prompt_format, system=system)
    values = torch.empty(len(pairs), 2, len(layers), model.cfg.d_model)
    with tqdm(total=len(pairs), desc=f"read {pairs.behavior}", unit="pair", disable=not progress) as bar:
        for sides, indices in read_pairs(model, prompts, layers=layers, batch_size=batch_size):
            values[list(indices)] = sides.cpu()  # batches come sorted by length
            bar.update(len(indices))
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            f"activations of {model.cfg.model_name} are not finite in {dtype_of(model)}: load it in bfloat16 or float32"
        )
    is_ab = pairs.kind == "ab"
    norms = values.norm(dim=-1) if is_ab else _token_norms(model, prompts, layers, batch_size)
    return PairActivations(
        values=values,
        norms=norms,
        layers=layers,
        letters=tuple((p.positive.strip("()"), p.negative.strip("()")) if is_ab else ("", "") for p in pairs),
        provenance=Provenance(
            model=str(model.cfg.model_name),
            behavior=pairs.behavior,
            method="pair activations",
            prompt_format=prompt_format.name,
            token_position="answer letter" if is_ab else "mean over the completion",
            n_pairs=len(pairs),
            dataset_hash=pairs.content_hash,
            expression=pairs.behavior,
            details={
                **pairs.provenance_details,
                "model_dtype": dtype_name(model),
                "n_layers": str(model.cfg.n_layers),
                "system": system or "",
            },
        ),
    )


def _token_norms(
    model: Any, pairs: Sequence[tuple[Prompt, Prompt]], layers: Sequence[int], batch_size: int
) -> Float[Tensor, "pair side layer"]:
    """Mean of the tokens' norms over each prompt's read span; this takes another pass."""
    prompts = [prompt for pair in pairs for prompt in pair]
    norms = torch.cat(list(read_norms(model, prompts, layers=layers, batch_size=batch_size)))  # [prompt layer]
    return norms.cpu().reshape(len(pairs), 2, len(layers))
